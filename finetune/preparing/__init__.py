"""The work of `prepare_data.py`: check, split, report, audit and show conversations."""
