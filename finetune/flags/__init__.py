"""Flags of all scripts: parsers and converters, and recipes in the names of other trainers."""
