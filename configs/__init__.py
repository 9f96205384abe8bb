"""Config files, one for each data set; --config=NAME:ROW chooses one, from any directory."""
