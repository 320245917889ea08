"""Models and tokenizers from disk or from the Hub: loading, LoRA, quantized layers."""
