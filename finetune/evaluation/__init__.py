"""What `evaluate_lora.py` does: items, answers, verdicts, metrics, report."""
