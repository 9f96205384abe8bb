"""Data sets: one file each, and the pipeline that reads them all."""
