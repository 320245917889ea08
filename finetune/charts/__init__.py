"""Curves of many runs: reading their logs, naming, drawing."""
