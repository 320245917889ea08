"""One module and one Jinja template per format; formats/registry.py finds them by their file names."""
