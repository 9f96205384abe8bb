"""Tests the paper's findings at a scale that two CPU cores can run: small runs and their analysis."""
