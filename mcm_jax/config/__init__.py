"""Settings, their validation, and the rows of config files."""
