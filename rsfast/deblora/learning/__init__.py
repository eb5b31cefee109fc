"""Learning a LoRA, or a map of features."""
