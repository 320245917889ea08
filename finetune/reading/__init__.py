"""Reads files, databases and Hub datasets of any common shape into canonical conversations."""
