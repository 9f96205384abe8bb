"""Tables, plots and the page that are made from results."""
