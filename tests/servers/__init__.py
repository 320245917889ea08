"""Exports served by real servers (`make test-servers`): the calls they return against those of our own generation."""
