"""Data sets, one module each, and the input pipeline that reads them all."""
