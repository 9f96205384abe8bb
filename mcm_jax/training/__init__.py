"""State, update, mesh, checkpoints and the loop."""
