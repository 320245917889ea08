"""From what is on disk or on the Hub to a model and a tokenizer: loading, LoRA, quantized layers."""
