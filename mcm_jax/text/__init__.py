"""Text encoders in Flax NNX: strings -> an embedding of each token, a mask, and one vector of the whole text.

`encoders.load` reads BERT (all-MiniLM-L6-v2 comes in a package), the encoder of T5 v1.1, and CLIP's text
encoder from the files that Hugging Face's `transformers` writes. `transformers` itself is not needed.
"""
