"""Errors, files, processes, devices, pictures and the command line."""
