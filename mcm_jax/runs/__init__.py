"""One run: built from its config, trained, sampled, kept in a directory."""
