"""Several adapters (lanes) on one frozen model that train side by side, each on its own rows.

A batch holds rows of all adapters. They pass through the frozen weights together; only the small products with A and B
differ from row to row (`gradsift.training.adapted`). So the number of matrix products for a batch does not depend on
the number of adapters.

peft's model holds one adapter, under peft's default name. `activate` puts the adapter of a lane there, so that every
function that saves, loads or measures an adapter works on the adapter of that lane.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from gradsift.config import LoraConfig
from gradsift.data.tokens import Encoded
from gradsift.gradients.probes import ADAPTER
from gradsift.training import lora
from gradsift.training.masks import PassedRows


class Lanes(nn.Module):
    """M adapters on `model`, one for each seed; at first, adapter 0 is active."""

    def __init__(self, model: nn.Module, config: LoraConfig, seeds: Sequence[int]) -> None:
        """
        Args:
            model: frozen and without adapters, on its device.
            seeds: the seed of each adapter's A, as in `lora.add_adapter`.
        """
        super().__init__()
        device = next(model.parameters()).device
        factors: list[list[tuple[nn.Module, nn.Module]]] = []  # for each adapter, (A, B) of each layer
        for lane, seed in enumerate(seeds):
            if lane:
                lora.remove_adapter(self.adapted)
            self.adapted: Any = lora.add_adapter(model, config, seed).to(device)
            layers = [layer for _, layer in lora.lora_layers(self.adapted)]
            factors.append([(layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]) for layer in layers])
        self._layers = layers
        self._factors = factors
        self.parts = nn.ModuleList(part for pairs in factors for pair in pairs for part in pair)
        self.rows: PassedRows = self.adapted.passed_rows
        for place, layer in enumerate(layers):
            pairs = [of_lane[place] for of_lane in factors]
            layer.lanes = (self.rows, [a for a, _ in pairs] + [b for _, b in pairs])
        self.activate(0)

    def __len__(self) -> int:
        return len(self._factors)

    def activate(self, lane: int) -> None:
        """Put the adapter of a lane into peft's model."""
        for layer, (a, b) in zip(self._layers, self._factors[lane], strict=True):
            layer.lora_A[ADAPTER], layer.lora_B[ADAPTER] = a, b

    def announce(self, examples: Sequence[Encoded]) -> list[Encoded]:
        """Tell the layers to which adapter each row of the next batch belongs.

        Return the examples in the order in which the batch must hold them, sorted by adapter.
        """
        rows = sorted(examples, key=lambda example: example.lane)
        counts = Counter(example.lane for example in rows)
        device = next(self.parts.parameters()).device
        self.rows.counts = [counts[lane] for lane in range(len(self))]
        self.rows.lanes = torch.tensor([example.lane for example in rows], device=device)
        return rows

    def forget_rows(self) -> None:
        """Make all rows of later passes go through the active adapter."""
        self.rows.lanes = None


@contextmanager
def lanes(model: nn.Module, config: LoraConfig, seeds: Sequence[int]) -> Iterator[Lanes]:
    """Yield the `Lanes` of `model` with a fresh adapter for each seed; the adapters are removed afterwards."""
    made = Lanes(model, config, seeds)
    try:
        yield made
    finally:
        lora.remove_adapter(made.adapted)
