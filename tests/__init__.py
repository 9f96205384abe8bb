"""A regular package: some dependency installs a top-level `tests` of its own, which would win otherwise."""
