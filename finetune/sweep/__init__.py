"""Many runs of train_lora.py: which ones, where they run, what came out."""
