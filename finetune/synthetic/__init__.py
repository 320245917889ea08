"""Synthetic rows from tool schemas and phrasings, reproducible for a seed."""
