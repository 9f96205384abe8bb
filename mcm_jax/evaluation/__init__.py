"""Compares samples with a reference: features, moments, distances and the results that report them."""
