"""A run: builds it from a config, trains it, samples from it, and manages its directory."""
