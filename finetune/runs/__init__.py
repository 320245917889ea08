"""The run folder: created, logged, found, finished."""
