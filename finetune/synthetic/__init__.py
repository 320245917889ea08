"""Rows made from tool schemas and phrasings, seeded."""
