"""One training run: trainer, memory plan, order of rows, callbacks, the run table."""
