"""Callbacks that collect the gradient norm of every example while a model with LoRA adapters trains.

`GradientNormCallback` works in any Lightning `Trainer`. `GradientNormTrainerCallback` works in transformers' `Trainer`
and in TRL's `SFTTrainer`. The norms are computed in the training's own backward passes, with the weights that the model
has at each step. A probe (`gradients/probes.py`), which is attached to the model while it trains, computes them.
transformers does not report exceptions to its callbacks, so after an exception the probe stays attached until the
model's next forward pass outside of a training.

The norm of example i is |grad L_i|, the norm of the gradient of the example's own loss L_i. It does not depend on how
the trainer scales the loss of a batch. L_i is the mean loss over the example's labelled tokens (transformers, TRL, and
Lightning with `reduction="token_mean"`). With `reduction="mean"` or `"sum"` in Lightning, L_i is the example's loss as
it enters the mean or sum over the batch.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from numbers import Integral
from typing import Any

import lightning as L
import numpy as np
import torch
from transformers import TrainerCallback

from gradsift.data.tokens import Encoded
from gradsift.errors import ConfigError, GradsiftError
from gradsift.gradients.per_sample import IGNORED, attached
from gradsift.gradients.probes import NormProbe
from gradsift.training import parallel
from gradsift.training.head import require_finite

COLUMNS = ("norm_A", "norm_B", "loss")


class NormRecords:
    """Collects norms and losses of examples, batch by batch.

    The values are kept in one tensor on the device, which is enlarged when it is full. A small tensor per batch,
    allocated between the large tensors of a training step, would fragment the memory (by gigabytes on a CPU).
    """

    def __init__(self) -> None:
        self._values = torch.empty(2 + len(COLUMNS), 0, dtype=torch.float64)  # id, epoch, norm_A, norm_B, loss
        self._count = 0
        self._names: dict[str, int] = {}  # numbers that stand for ids that are strings

    def add(
        self,
        ids: torch.Tensor | Sequence[Any] | None,
        epoch: int,
        norm_a: torch.Tensor,
        norm_b: torch.Tensor,
        losses: torch.Tensor | None = None,
        scale: torch.Tensor | float = 1.0,
    ) -> None:
        """Add a batch of B examples: ids (whole numbers or strings), norms and, if known, losses, (B,) each.

        The norms are multiplied by `scale`, a number or a tensor (B,).
        """
        if ids is None or len(ids) != len(norm_a):
            raise GradsiftError(
                f"a batch has {0 if ids is None else len(ids)} example ids, but the adapted layers saw {len(norm_a)} "
                "examples; packing and padding-free batches put several examples in one row, which cannot be separated"
            )
        if not isinstance(ids, torch.Tensor):
            if not all(isinstance(each, Integral) for each in ids):
                ids = [self._names.setdefault(str(name), len(self._names)) for name in ids]
            ids = torch.tensor([int(each) for each in ids])
        count = len(ids)
        if self._count + count > self._values.shape[1]:
            # the size doubles, so that N examples cause O(N) copies
            larger = self._values.new_empty((len(self._values), 2 * self._count + count + 64), device=norm_a.device)
            larger[:, : self._count] = self._values[:, : self._count]
            self._values = larger
        losses = torch.full_like(norm_a, torch.nan) if losses is None else losses
        columns = (ids.to(norm_a.device), torch.full_like(norm_a, epoch), norm_a * scale, norm_b * scale, losses)
        self._values[:, self._count : self._count + count] = torch.stack([column.double() for column in columns])
        self._count += count

    def state_dict(self) -> dict[str, Any]:
        """Return the records so far: a tensor and, if the ids are strings, the list of ids."""
        # a copy: a view would be saved with the spare columns, and might change before it is saved
        values = {"values": self._values[:, : self._count].clone()}
        return {**values, "names": list(self._names)} if self._names else values

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._values, self._count = state["values"].clone(), state["values"].shape[1]
        self._names = {name: number for number, name in enumerate(state.get("names", ()))}

    def table(self) -> dict[str, np.ndarray]:
        """Return columns with one entry per example and epoch, in the order in which the examples were added.

        Returns:
            `example_id` and `epoch` (int64), and `norm_A`, `norm_B` and `norm` (float32): the L2 norms of the gradient
            with respect to all LoRA factors A, to all factors B, and to both.

        Raises:
            GradsiftError: an id is too large to be kept exactly.
        """
        ids, epochs, norm_a, norm_b, _ = self._values[:, : self._count].cpu().numpy()
        if (np.abs(ids) >= 2**53).any():  # float64 holds smaller whole numbers exactly
            raise GradsiftError("ids of examples from 2^53 on are rounded; give smaller numbers, or strings")
        ids = ids.astype(np.int64)
        return {
            "example_id": np.array(list(self._names))[ids] if self._names else ids,
            "epoch": epochs.astype(np.int64),
            "norm_A": norm_a.astype(np.float32),
            "norm_B": norm_b.astype(np.float32),
            "norm": np.hypot(norm_a, norm_b).astype(np.float32),
        }

    def columns(self, encoded: Sequence[Encoded]) -> dict[str, np.ndarray]:
        """Return the columns norm_A, norm_B and loss, float32, in the order of `encoded`.

        The ids in the records must be the values of the attribute `row` of the examples in `encoded`.

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
        """Return the records of all ranks, of `total` examples together.

        Each rank calls this method of the records of its own share of the examples.
        """
        names = ("rows", "epochs", *COLUMNS)
        mine = self._values[:, : self._count].to(device)
        records = NormRecords()
        records._values = torch.stack(list(parallel.gather(dict(zip(names, mine, strict=True)), total).values()))
        records._count = total
        return records


class GradientNormCallback(L.Callback):
    """Collects per-sample gradient norms in a Lightning `Trainer`.

    With automatic optimisation, `training_step` must run one forward pass of the batch and return the loss of the
    batch. Gradient accumulation does not change the norms. In a distributed training, each rank collects the norms of
    the examples in its own batches.

    A module with an attribute `gradient_norms` computes the norms itself. (gradsift's modules do, because their steps
    have several backward passes.) The callback sets this attribute to a `NormProbe`, and the module returns `rows`,
    `losses`, `norm_A` and `norm_B`, (B,) each, from `training_step` or, in `Trainer.validate`, from `validation_step`.
    """

    def __init__(self, example_id: str = "example_id", reduction: str = "mean") -> None:
        """
        Args:
            example_id: key (or attribute) of a batch that holds the ids of its B examples: whole numbers (a tensor or a
                list), or a list of strings.
            reduction: how the loss of a batch is made from the losses of its examples. `mean` is their mean, and `sum`
                is their sum. `token_mean` is the mean over all labelled tokens of the batch, as transformers computes
                it. A token is labelled if its entry of `labels` is not -100.
        """
        if reduction not in ("mean", "token_mean", "sum"):
            raise ConfigError(f"reduction={reduction!r} is not known; choose one of: mean, token_mean, sum")
        self._example_id = example_id
        self._reduction = reduction
        self._norms: Any = None  # the attached `NormProbe`
        self._attached = ExitStack()
        self._of_batch: list[tuple[torch.Tensor, torch.Tensor]] = []  # one pair per backward pass of this batch
        self.records = NormRecords()

    def table(self) -> dict[str, np.ndarray]:
        """Return the ids and norms collected so far; see `NormRecords.table`."""
        return self.records.table()

    def on_train_start(self, trainer: Any, module: Any) -> None:
        if trainer.precision == "16-mixed":
            raise GradsiftError("precision=16-mixed scales the loss, and with it the gradient norms; take bf16-mixed")
        self._attach(module)

    def on_validation_start(self, trainer: Any, module: Any) -> None:
        if trainer.state.fn == "validate" and hasattr(module, "gradient_norms"):
            self._attach(module)

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_index: int) -> None:
        self._of_batch.clear()
        self._norms.forget()

    def on_after_backward(self, trainer: Any, module: Any) -> None:
        if not hasattr(module, "gradient_norms"):
            self._of_batch.append(self._norms.take())

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_index: int) -> None:
        if hasattr(module, "gradient_norms"):
            self._add(outputs)
            return
        if len(self._of_batch) != 1:
            raise GradsiftError(
                f"a training step had {len(self._of_batch)} backward passes; gradient norms need exactly one"
            )
        ids = _entry(batch, self._example_id, "give each batch the ids of its examples, or name their key")
        norm_a, norm_b = self._of_batch[0]
        # Lightning divides the loss of each batch by accumulate_grad_batches before its backward pass
        scale = trainer.accumulate_grad_batches * self._divisors(batch, norm_a)
        self.records.add(ids, trainer.current_epoch, norm_a, norm_b, scale=scale)

    def on_validation_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_index: int, dataloader_index: int = 0
    ) -> None:
        if self._norms is not None and trainer.state.fn == "validate":
            self._add(outputs)

    def on_train_end(self, trainer: Any, module: Any) -> None:
        self._detach(module)

    def on_validation_end(self, trainer: Any, module: Any) -> None:
        if trainer.state.fn == "validate":
            self._detach(module)

    def on_exception(self, trainer: Any, module: Any, exception: BaseException) -> None:
        self._detach(module)

    def state_dict(self) -> dict[str, Any]:
        return self.records.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.records.load_state_dict(state)

    def _attach(self, module: Any) -> None:
        self._norms = self._attached.enter_context(attached(module, NormProbe()))
        if hasattr(module, "gradient_norms"):
            module.gradient_norms = self._norms

    def _detach(self, module: Any) -> None:
        if hasattr(module, "gradient_norms"):
            module.gradient_norms = None
        self._attached.close()
        self._norms = None

    def _add(self, outputs: Mapping[str, torch.Tensor]) -> None:
        self.records.add(outputs["rows"], 0, outputs["norm_A"], outputs["norm_B"], outputs["losses"])

    def _divisors(self, batch: Any, norms: torch.Tensor) -> torch.Tensor:
        """Return, for each example, the number that divides its own loss L_i in the loss of the batch, (B,)."""
        if self._reduction != "token_mean":
            return torch.full_like(norms, len(norms) if self._reduction == "mean" else 1)
        # L = sum_i n_i L_i / sum_j n_j for n_i labelled tokens: example i's own loss is divided by sum_j n_j / n_i
        counts = _labelled(_entry(batch, "labels", "reduction='token_mean' counts them")).to(norms)
        return counts.sum() / counts


class GradientNormTrainerCallback(TrainerCallback):  # type: ignore[misc]
    """Collects per-sample gradient norms in transformers' `Trainer` or TRL's `SFTTrainer`, in one process.

    The training set needs a column with the ids of the examples (whole numbers or strings). The trainer must keep this
    column, so set `TrainingArguments(remove_unused_columns=False)`. The callback hides the ids from the collator, adds
    them to the collated batch, and removes them before the model's forward pass. The factor by which the trainer scales
    the loss is measured in each backward pass, so gradient accumulation and `num_items_in_batch` do not change the
    norms.
    """

    def __init__(self, example_id: str = "example_id") -> None:
        """
        Args:
            example_id: name of the training set's column with the ids of the examples.
        """
        self._example_id = example_id
        self._norms: NormProbe | None = None
        self._attached = ExitStack()  # closing it removes the hooks, the probe and the collator
        self._ids: Any = None
        self._labels: torch.Tensor | None = None
        self._divided_by: torch.Tensor | float | None = None  # divisor in the model's loss; None: number of labels
        self._token_weight: torch.Tensor | None = None  # d (loss of the step) / d (negative log-likelihood of a token)
        self.records = NormRecords()

    def table(self) -> dict[str, np.ndarray]:
        """Return the ids and norms collected so far; see `NormRecords.table`."""
        return self.records.table()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.world_size > 1 or args.n_gpu > 1:
            raise GradsiftError("GradientNormTrainerCallback works in one process with one device")
        self._detach()  # removes what a failed training has attached: `auto_find_batch_size` starts the training again
        model, loader = kwargs["model"], kwargs["train_dataloader"]
        loader = getattr(loader, "base_dataloader", loader)  # accelerate wraps the loader
        self._norms = self._attached.enter_context(attached(model, NormProbe()))
        # before all other hooks, so that none of them sees the ids
        before = model.register_forward_pre_hook(self._before_forward, with_kwargs=True, prepend=True)
        self._attached.callback(before.remove)
        self._attached.callback(model.register_forward_hook(self._after_forward).remove)
        collate = loader.collate_fn

        def collate_with_ids(examples: Any) -> Any:
            if self._example_id not in examples[0]:
                raise GradsiftError(
                    f"the training set has no column {self._example_id!r} when its rows are collated; add it, and give "
                    "remove_unused_columns=False to the trainer"
                )
            bare = [{key: value for key, value in each.items() if key != self._example_id} for each in examples]
            return {**collate(bare), self._example_id: [each[self._example_id] for each in examples]}

        loader.collate_fn = collate_with_ids
        self._attached.callback(setattr, loader, "collate_fn", collate)

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._norms is None or self._labels is None or self._token_weight is None:
            raise GradsiftError(
                "the trainer's loss is not that of the model (label smoothing, compute_loss_func?), so gradient norms "
                "cannot be computed; let the model compute its loss from `labels`"
            )
        norm_a, norm_b = self._norms.take()
        # example i adds w sum_t l_it = w n_i L_i to the loss of the step, where l_it is the loss of its token t
        scale = 1 / (self._token_weight * _labelled(self._labels).to(norm_a))
        self.records.add(self._ids, int(state.epoch or 0), norm_a, norm_b, scale=scale)
        self._ids = None

    on_pre_optimizer_step = on_substep_end  # the event after a step's last backward pass, which has no `on_substep_end`

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._detach()

    def _detach(self) -> None:
        self._attached.close()
        self._norms = None

    def _before_forward(self, model: Any, positional: Any, named: dict[str, Any]) -> Any:
        if not _is_training():
            self._detach()
            return positional, named
        ids = named.pop(self._example_id, None)
        if torch.is_grad_enabled() and self._norms is not None:
            self._norms.forget()
            self._ids, self._labels, self._token_weight = ids, named.get("labels"), None
            self._divided_by = named.get("num_items_in_batch")
        return positional, named

    def _after_forward(self, model: Any, positional: Any, outputs: Any) -> None:
        """Register a hook on the backward pass that records the weight of a token's loss in the trainer's loss."""
        if not torch.is_grad_enabled() or self._labels is None:
            return
        log_probs = getattr(outputs, "log_probs", None)  # only TRL's model has them: TRL's trainer computes the loss
        if log_probs is not None and log_probs.requires_grad:
            log_probs.register_hook(self._weigh_by_log_probs)
        elif getattr(outputs, "loss", None) is not None and outputs.loss.requires_grad:
            # The gradient with respect to the model's loss is the factor by which the trainer scales that loss
            # (gradient accumulation included). The model has divided the sum over the tokens by `divided_by`.
            divided_by = _labelled(self._labels).sum() if self._divided_by is None else self._divided_by
            outputs.loss.register_hook(lambda gradient: setattr(self, "_token_weight", gradient / divided_by))

    def _weigh_by_log_probs(self, gradient: torch.Tensor) -> None:
        # the loss is -sum_t w_t log p_t, so minus its gradient is w_t; it is zero at tokens without a label
        weights = -gradient[gradient != 0]
        if len(weights) and not torch.allclose(weights, weights[0]):
            raise GradsiftError("the tokens of a batch have unequal weights in its loss; take loss_type='nll'")
        self._token_weight = weights[0] if len(weights) else torch.ones_like(gradient.sum())


def _is_training() -> bool:
    """Return whether `Trainer.train` is on the call stack."""
    from transformers import Trainer  # the import takes a second; the callers have made it already

    frame = inspect.currentframe()
    while frame is not None and frame.f_code is not Trainer.train.__code__:
        frame = frame.f_back
    return frame is not None


def _entry(batch: Any, name: str, purpose: str) -> Any:
    """Return the entry or attribute `name` of a batch; if there is none, raise an error that ends with `purpose`."""
    value = batch.get(name) if isinstance(batch, Mapping) else getattr(batch, name, None)
    if value is None:
        raise GradsiftError(f"the batch has no {name!r}: {purpose}")
    return value


def _labelled(labels: torch.Tensor) -> torch.Tensor:
    """Return each example's number of tokens with a loss, (B,).

    The first token of an example has no loss, because it is never predicted.
    """
    return (labels[:, 1:] != IGNORED).sum(1)
