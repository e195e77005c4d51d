"""Backbones, adapters, and the training loop that proxy and target share."""
