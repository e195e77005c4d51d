"""Per-sample LoRA gradients and their statistics."""
