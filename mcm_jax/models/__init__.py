"""The networks, implemented in Flax NNX."""
