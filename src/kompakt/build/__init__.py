"""Plans carried out: the quantized and the pruned model, and the one training loop."""
