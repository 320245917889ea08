"""What `prepare_data.py` does with conversations: check, split, report, audit, show."""
