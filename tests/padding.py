"""Batches as transformers' collators make them, for the tests of several trainers."""

from __future__ import annotations

from typing import Any

import torch


def padded(examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Return ids, labels and attention mask (B, T), padded on the right."""
    longest = max(len(example["input_ids"]) for example in examples)
    fill = {"input_ids": 0, "labels": -100}
    batch = {
        name: torch.tensor([example[name] + [pad] * (longest - len(example[name])) for example in examples])
        for name, pad in fill.items()
    }
    lengths = torch.tensor([len(example["input_ids"]) for example in examples])
    return batch | {"attention_mask": (torch.arange(longest) < lengths[:, None]).long()}
