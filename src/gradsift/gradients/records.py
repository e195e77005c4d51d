"""Per-sample gradient norms, in the order in which the examples are added."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

import numpy as np
import torch

from gradsift.data.tokens import Encoded
from gradsift.errors import GradsiftError
from gradsift.training import parallel
from gradsift.training.head import require_finite

COLUMNS = ("norm_A", "norm_B", "loss")
_LARGEST_ID = 2**53  # whole numbers up to here are exact in float64


class NormRecords:
    """Collects norms and losses of examples, batch by batch.

    The values are kept in one tensor on the device, which is enlarged when it is full. Thousands of small tensors, each
    allocated among the large tensors of its step, would fragment the memory (gigabytes on a CPU).
    """

    def __init__(self) -> None:
        self._values = torch.empty(2 + len(COLUMNS), 0, dtype=torch.float64)  # id, epoch, norm_A, norm_B, loss
        self._count = 0
        self._names: dict[str, int] = {}  # the number of each id that is a string

    def add(
        self,
        ids: torch.Tensor | Sequence[Any],
        epoch: int,
        norm_a: torch.Tensor,
        norm_b: torch.Tensor,
        losses: torch.Tensor | None = None,
    ) -> None:
        """Add a batch of B examples: ids (whole numbers or strings), norms and, if known, losses, (B,) each."""
        if not isinstance(ids, torch.Tensor) and all(isinstance(each, Integral) for each in ids):
            ids = torch.tensor([int(each) for each in ids])
        elif not isinstance(ids, torch.Tensor):
            ids = torch.tensor([self._names.setdefault(str(name), len(self._names)) for name in ids])
        count = len(ids)
        if self._count + count > self._values.shape[1]:
            # the size doubles, so N examples cause at most 2 N copies; otherwise each batch would copy all examples
            larger = self._values.new_empty((len(self._values), 2 * self._count + count + 64), device=norm_a.device)
            larger[:, : self._count] = self._values[:, : self._count]
            self._values = larger
        known = losses if losses is not None else torch.full_like(norm_a, torch.nan)
        columns = (ids.to(norm_a.device), torch.full_like(norm_a, epoch), norm_a, norm_b, known)
        self._values[:, self._count : self._count + count] = torch.stack([column.double() for column in columns])
        self._count += count

    def state_dict(self) -> dict[str, Any]:
        """Return the records so far, for `load_state_dict`: a tensor and, if ids are strings, a list of them."""
        # a copy without the spare columns: a view may be overwritten before it is saved, or saved with these columns
        values = {"values": self._values[:, : self._count].clone()}
        return {**values, "names": list(self._names)} if self._names else values

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._values, self._count = state["values"].clone(), state["values"].shape[1]
        self._names = {name: number for number, name in enumerate(state.get("names", ()))}

    def table(self) -> dict[str, np.ndarray]:
        """Return columns with an entry for each example in each epoch, in the order in which they were added.

        Returns:
            example_id, epoch (int64), norm_A, norm_B and norm (float32): the L2 norms of the gradient with respect to
            all A, to all B, and to both.

        Raises:
            GradsiftError: an id is too large to be kept exactly.
        """
        ids, epochs, norm_a, norm_b, _ = self._values[:, : self._count].cpu().numpy()
        if (np.abs(ids) >= _LARGEST_ID).any():
            raise GradsiftError("ids of examples from 2^53 on are rounded; give smaller numbers, or strings")
        names = np.array(list(self._names))
        return {
            "example_id": names[ids.astype(np.int64)] if self._names else ids.astype(np.int64),
            "epoch": epochs.astype(np.int64),
            "norm_A": norm_a.astype(np.float32),
            "norm_B": norm_b.astype(np.float32),
            "norm": np.hypot(norm_a, norm_b).astype(np.float32),
        }

    def columns(self, encoded: Sequence[Encoded]) -> dict[str, np.ndarray]:
        """Return norm_A, norm_B and loss, float32, in the order of `encoded`; the ids must be the examples' `row`.

        Raises:
            GradsiftError: a value is not finite (the message names the rows), or an example does not have exactly one
                entry.
        """
        rows, _, *values = self._values[:, : self._count].cpu()
        places = {example.row: place for place, example in enumerate(encoded)}
        order = torch.tensor([places[row] for row in rows.long().tolist()], dtype=torch.int64)
        if self._count != len(encoded) or len(order.unique()) != len(encoded):
            raise GradsiftError(
                f"the epoch gave {self._count} gradient norms for {len(encoded)} examples; each must have exactly one"
            )
        columns = {}
        for name, column in zip(COLUMNS, values, strict=True):
            require_finite("loss" if name == "loss" else "gradient norm", rows.long(), column, encoded)
            columns[name] = np.empty(len(encoded), dtype=np.float32)
            columns[name][order.numpy()] = column.numpy()
        return columns

    def of_all_ranks(self, total: int, device: torch.device) -> NormRecords:
        """Return the records of all ranks; each rank has the records of its share of `total` examples."""
        if parallel.size() == 1:
            return self
        ids, epochs, *values = self._values[:, : self._count].to(device)
        names = ("rows", "epochs", *COLUMNS)
        columns = parallel.gather(dict(zip(names, (ids, epochs, *values), strict=True)), total)
        records = NormRecords()
        records._values, records._count = torch.stack([columns[name] for name in names]), total
        return records
