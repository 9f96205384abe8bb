"""The training objectives, one module per method."""
