"""Makes tables, plots and the HTML page from results."""
