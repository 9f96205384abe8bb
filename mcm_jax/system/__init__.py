"""Errors, files, processes, devices, image grids and the command line."""
