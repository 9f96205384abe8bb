"""Config files, one per data set; --config=NAME:ROW selects one from any directory."""
