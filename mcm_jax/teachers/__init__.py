"""Imports published networks as teachers."""
