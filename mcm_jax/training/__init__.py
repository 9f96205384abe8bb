"""Training: state, optimizer, update, loop, checkpoints and progress."""
