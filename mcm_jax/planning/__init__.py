"""What a program would need and take on a TPU topology, from its compilation alone."""
