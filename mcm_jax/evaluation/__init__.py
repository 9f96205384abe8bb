"""Features, moments and distances of samples against a reference."""
