"""Estimates a program's memory and time on a TPU topology by compiling it, without running it."""
