"""Backbones, adapters, and the one loop that finetunes proxy and target."""
