"""Per-sample gradient norms of all examples: from the steps of a training epoch, or by a pass at fixed weights.

`GradientNorms` is the Lightning callback of `proxy.collect=during_training`: the norms come from the training
steps' own backward passes, at weights that move during the epoch; no extra pass. `collect_norms` is the pass of
`proxy.collect=epoch_end`: at the fixed weights theta^(m,e), dropout off, which is the paper's g_i^(m,e).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import lightning as L
import numpy as np
import torch

from gradsift.data.batching import collate
from gradsift.data.tokens import Encoded
from gradsift.errors import GradsiftError
from gradsift.gradients.norms import PerSampleNorms
from gradsift.journal import Journal
from gradsift.runtime import Advance, derive_seed
from gradsift.training import lora, parallel
from gradsift.training.device import TokenBudget
from gradsift.training.finetuning import require_finite
from gradsift.training.modules import ResponseLosses

COLUMNS = ("norm_A", "norm_B", "loss")


class GradientNorms(L.Callback):
    """Collects `norm_A`, `norm_B` and `loss` of every example while it is trained on, in the order of `encoded`."""

    def __init__(self, adapted: Any, encoded: Sequence[Encoded]) -> None:
        self._norms = PerSampleNorms(adapted)
        self._collected = Collected(encoded)

    def on_train_start(self, trainer: Any, module: Any) -> None:
        module.norms = self._norms.__enter__()

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_index: int) -> None:
        self._collected.add(*(outputs[name] for name in ("rows", "norm_A", "norm_B", "losses")))

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        self._stop(module)

    def on_exception(self, trainer: Any, module: Any, exception: BaseException) -> None:
        self._stop(module)

    def state_dict(self) -> dict[str, Any]:
        """What the training steps gave so far."""
        return self._collected.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._collected.load_state_dict(state)

    def _stop(self, module: Any) -> None:
        module.norms = None
        self._norms.__exit__(None, None, None)

    def table(self) -> dict[str, np.ndarray]:
        """What was collected, as `Collected.columns` gives it."""
        return self._collected.columns()


class Collected:
    """Norms and losses of N examples, gathered on the device batch by batch.

    They are written into one tensor: thousands of small ones, each kept among the large ones of its step,
    would leave the memory between them to nobody (gigabytes on a CPU).
    """

    def __init__(self, encoded: Sequence[Encoded]) -> None:
        self._encoded = encoded
        self._rows = torch.tensor([example.row for example in encoded], dtype=torch.int64)
        self._places = torch.full((int(self._rows.max()) + 1 if len(encoded) else 0,), -1)  # of a row in `encoded`
        self._places[self._rows] = torch.arange(len(encoded))
        self._values = torch.full((len(COLUMNS), len(encoded)), torch.nan)
        self._times = torch.zeros(len(encoded), dtype=torch.int64)  # that an example came by

    def add(self, rows: torch.Tensor, *columns: torch.Tensor) -> None:
        """One batch: rows (B,), then norm_A, norm_B and loss, (B,) each."""
        if self._places.device != rows.device:
            self._places, self._values, self._times = (
                tensor.to(rows.device) for tensor in (self._places, self._values, self._times)
            )
        places = self._places[rows]
        self._values[:, places] = torch.stack([column.float() for column in columns])
        self._times.index_add_(0, places, torch.ones_like(places))

    def state_dict(self) -> dict[str, torch.Tensor]:
        """What was added so far, for `load_state_dict` of another process."""
        return {"values": self._values, "times": self._times}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        self._values, self._times = (state[name].to(self._places.device) for name in ("values", "times"))

    def of_all_ranks(self, encoded: Sequence[Encoded]) -> Collected:
        """What all ranks collected, for the examples of all ranks."""
        if parallel.size() == 1:
            return self
        own = {"rows": self._rows, "times": self._times, **dict(zip(COLUMNS, self._values, strict=True))}
        found = parallel.gather({name: column.to(self._values.device) for name, column in own.items()}, len(encoded))
        whole = Collected(encoded)
        whole.add(found["rows"], *(found[name] for name in COLUMNS))
        whole._times[whole._places[found["rows"]]] = found["times"]
        return whole

    def columns(self) -> dict[str, np.ndarray]:
        """Return the columns, float32, one entry an example in the order of `encoded`.

        Raises:
            GradsiftError: a norm or loss that is not finite, or an example that did not come by exactly once;
                names the rows.
        """
        times = self._times.cpu()
        if bool((times != 1).any()):
            raise GradsiftError(
                f"the epoch gave {int(times.sum())} gradient norms for {len(times)} examples; each must have exactly "
                "one"
            )
        values = self._values.cpu()
        for name, column in zip(COLUMNS, values, strict=True):
            require_finite("loss" if name == "loss" else "gradient norm", self._rows, column, self._encoded)
        return {name: column.numpy() for name, column in zip(COLUMNS, values, strict=True)}


def collect_norms(
    adapted: Any,
    encoded: Sequence[Encoded],
    budget: TokenBudget,
    pad_id: int,
    device: torch.device,
    progress: Advance = lambda done: None,
    *,
    masks: int | None = None,
    journal: Journal | None = None,
) -> Collected:
    """One pass at fixed weights, divided over the ranks; leaves neither gradients nor a changed mode behind.

    Args:
        masks: leave the adapters' dropout as it is, on after `lora.add_adapter`; an example's norm is then that
            of its gradient under the masks that its batch draws with this seed, whatever went before. Dropout is
            off otherwise.
        journal: keeps the norms batch by batch.
    """
    mine = parallel.share(encoded)
    collected = Collected(mine)
    response_losses = ResponseLosses(adapted)

    def one_batch(examples: Sequence[Encoded]) -> tuple[torch.Tensor, ...]:
        if masks is not None:
            torch.manual_seed(derive_seed(masks, examples[0].row))
        norms.forget()
        adapted.zero_grad(set_to_none=True)
        batch = collate(examples, pad_id).to(device)
        losses = response_losses(batch)
        losses.sum().backward()
        return (batch.rows, *norms.take(), losses.detach())

    mode = lora.evaluating(adapted) if masks is None else nullcontext()
    with mode, PerSampleNorms(adapted) as norms, torch.enable_grad():
        for found in budget.passes(mine, one_batch, journal, lambda done: progress(done * parallel.size())):
            for part in found:
                collected.add(*part)
        adapted.zero_grad(set_to_none=True)
    return collected.of_all_ranks(encoded)
