"""The nouns that several commands need; scripts import from here, and this package imports from `formats`."""
