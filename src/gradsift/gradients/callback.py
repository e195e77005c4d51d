"""The Lightning callback that collects per-sample gradient norms of one epoch.

`epoch_end`: after the epoch every example passes once at the fixed weights theta^(m,e), dropout off.
This is the paper's g_i^(m,e). `during_training`: the norms come from the training steps' own
backward passes, at weights that move during the epoch; no extra pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import lightning as L
import numpy as np
import torch

from gradsift.data.batching import collate
from gradsift.data.tokens import Encoded
from gradsift.errors import GradsiftError
from gradsift.gradients.norms import PerSampleNorms
from gradsift.training import lora
from gradsift.training.device import TokenBudget
from gradsift.training.finetuning import ResponseLosses, require_finite

COLUMNS = ("norm_A", "norm_B", "loss")
Progress = Callable[[int], None]  # called with the number of examples that are done


class GradientNorms(L.Callback):
    """Collects `norm_A`, `norm_B` and `loss` of every example, in the order of `encoded`."""

    def __init__(
        self,
        adapted: Any,
        encoded: Sequence[Encoded],
        collect: str,
        *,
        row_indices: Sequence[int],
        progress: Progress | None = None,
    ) -> None:
        """
        Args:
            row_indices: of the examples that `Encoded.row` counts, in the data's source; for errors.
            collect: `epoch_end` or `during_training`.
        """
        self._norms = PerSampleNorms(adapted)
        self._encoded = encoded
        self._collect = collect
        self._row_indices = row_indices
        self._progress = progress
        self._parts: list[tuple[torch.Tensor, ...]] = []  # rows, norm_A, norm_B, loss; on the device

    def on_train_start(self, trainer: Any, module: Any) -> None:
        if self._collect == "during_training":
            module.norms = self._norms.__enter__()

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_index: int) -> None:
        if self._collect == "during_training":
            self._parts.append(tuple(outputs[name] for name in ("rows", "norm_A", "norm_B", "losses")))

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        if self._collect == "during_training":
            self._stop(module)
        else:
            self._parts = collect_norms(
                module.model, self._encoded, module.budget, module.pad_id, module.device, self._progress
            )

    def on_exception(self, trainer: Any, module: Any, exception: BaseException) -> None:
        self._stop(module)

    def _stop(self, module: Any) -> None:
        module.norms = None
        self._norms.__exit__(None, None, None)

    def table(self) -> dict[str, np.ndarray]:
        """What was collected, as `norms_columns` gives it."""
        return norms_columns(self._parts, self._encoded, self._row_indices)


def norms_columns(
    parts: Sequence[tuple[torch.Tensor, ...]], encoded: Sequence[Encoded], row_indices: Sequence[int]
) -> dict[str, np.ndarray]:
    """The columns, float32, one entry an example in the order of `encoded`; every example exactly once.

    Args:
        parts: rows, norm_A, norm_B, loss; of each batch.
        row_indices: of the examples that `Encoded.row` counts, in the data's source; for errors.

    Raises:
        GradsiftError: a norm or loss that is not finite, or an example without one; names the rows.
    """
    expected = torch.tensor([example.row for example in encoded])
    rows = torch.cat([part[0] for part in parts]).cpu()
    order, expected_order = rows.argsort(), expected.argsort()
    if not torch.equal(rows[order], expected[expected_order]):
        raise GradsiftError(
            f"the epoch gave {len(rows)} gradient norms for {len(expected)} examples; each must have exactly one"
        )
    columns = {}
    for index, name in enumerate(COLUMNS, start=1):
        values = torch.cat([part[index] for part in parts]).float().cpu()
        require_finite("loss" if name == "loss" else "gradient norm", rows, values, row_indices)
        columns[name] = torch.empty_like(values).index_copy_(0, expected_order, values[order]).numpy()
    return columns


def collect_norms(
    adapted: Any,
    encoded: Sequence[Encoded],
    budget: TokenBudget,
    pad_id: int,
    device: torch.device,
    progress: Progress | None = None,
    *,
    dropout: bool = False,
) -> list[tuple[torch.Tensor, ...]]:
    """One pass at fixed weights; leaves neither gradients nor a changed mode behind.

    Args:
        dropout: leave the adapters' dropout as it is, on after `lora.add_adapter`; an example's norm is then that
            of its gradient under the masks that its batch drew. Off otherwise.

    Returns:
        For each batch rows, norm_A, norm_B, loss; (B,) each.
    """
    parts: list[tuple[torch.Tensor, ...]] = []
    response_losses = ResponseLosses(adapted)

    def one_batch(examples: Sequence[Encoded]) -> tuple[torch.Tensor, ...]:
        norms.forget()
        adapted.zero_grad(set_to_none=True)
        batch = collate(examples, pad_id).to(device)
        losses = response_losses(batch)
        losses.sum().backward()
        return (batch.rows, *norms.take(), losses.detach())

    mode = nullcontext() if dropout else lora.evaluating(adapted)
    with mode, PerSampleNorms(adapted) as norms, torch.enable_grad():
        for examples, found in budget.passes(encoded, one_batch):
            parts += found
            if progress is not None:
                progress(len(examples))
        adapted.zero_grad(set_to_none=True)
    return parts
