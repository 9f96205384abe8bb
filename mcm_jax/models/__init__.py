"""The networks, in Flax NNX."""
