"""Passes a trained run on: as a folder with its parameters, or as a program that needs only JAX."""
