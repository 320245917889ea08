"""From the rows of one optimizer step to gradients: forward passes with shared prefixes, attention, loss."""
