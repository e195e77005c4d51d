"""The one Lightning module that trains adapters, for the proxy and for the target.

Shape letters: N examples of a step, B of a batch, T tokens.
"""

from __future__ import annotations

import gc
import logging
import math
import signal
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader

from gradsift.config import ComputeConfig
from gradsift.cost import passed
from gradsift.data.batching import Batch, by_length, collate
from gradsift.data.tokens import Encoded
from gradsift.errors import GradsiftError
from gradsift.runtime import derive_seed
from gradsift.training import lora, ranks
from gradsift.training.device import TokenBudget, device_of, is_out_of_memory
from gradsift.training.head import OutputHead, token_losses
from gradsift.training.save_point import SavePoint

if TYPE_CHECKING:
    from gradsift.gradients.norms import PerSampleNorms


BETAS = (0.9, 0.999)  # of AdamW everywhere: its saved state does not tell them


@dataclass(frozen=True)
class Optimization:
    """AdamW, its learning rate over `total_steps` optimiser steps, and what a step minimises.

    The schedules are those of transformers' Trainer, and so is `loss="token"`. The defaults here are the proxies': they
    minimise the loss of which per-sample gradients are taken, and nothing is clipped (GRADFILTERING, section 3).
    """

    learning_rate: float
    weight_decay: float
    schedule: str  # constant, linear or cosine (both to zero at total_steps)
    warmup_steps: int
    total_steps: int
    loss: str = "example"  # mean of the examples' means; token: mean over the response tokens of the step
    max_grad_norm: float | None = None  # L2, over all parameters, of a step's gradient

    def factor(self, step: int) -> float:
        """Share of the learning rate at a step, counted from 0: k / w, then of T - w steps those left (or cosine)."""
        if step < self.warmup_steps:
            return step / self.warmup_steps
        if self.schedule == "constant":
            return 1.0
        done = min(1.0, (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps))
        return 1.0 - done if self.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))

    def mean_rate(self, first: int, last: int) -> float:
        """Mean learning rate over the steps from `first` to before `last`."""
        return self.learning_rate * sum(self.factor(step) for step in range(first, last)) / (last - first)


class ResponseLosses:
    """Mean negative log-likelihood of each example's response tokens, in nats, float32.

    Every example is weighed by its own tokens alone, so a loss does not depend on the batch.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._head = OutputHead.of(model)

    def __call__(self, batch: Batch) -> torch.Tensor:
        """Losses (B,)."""
        found = token_losses(self._model, self._head, batch.model_inputs(), batch.places, batch.targets)
        spread = found.new_zeros(batch.input_ids.numel()).scatter(0, batch.places, found)
        return spread.view_as(batch.input_ids).sum(1) / batch.counts


class Step:
    """The examples of one optimiser step. Lightning leaves it as it is: batches are made of it where they are used."""

    def __init__(self, examples: Sequence[Encoded]) -> None:
        self.examples = examples


class Finetuning(L.LightningModule):
    """Trains the trainable parameters of `model` on the mean loss of each step's examples or response tokens.

    The examples of a step pass through the model in batches of like length that the token budget
    allows; their gradients add up, so that neither memory nor speed depends on the size of a step.
    """

    def __init__(
        self,
        model: nn.Module,
        optimization: Optimization,
        budget: TokenBudget,
        pad_id: int,
        first_step: int = 0,
        dropout_seed: int = 0,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.model = model
        self.optimization = optimization
        self.budget = budget
        self.pad_id = pad_id
        self.first_step = first_step  # optimiser steps that earlier epochs took
        self.dropout_seed = dropout_seed
        self.restore_from: Path | None = None  # an earlier epoch's optimiser state
        self.norms: PerSampleNorms | None = None  # set while the norms of the training steps are wanted
        self.curve: list[dict[str, float]] = []  # one entry a step; its loss is there when `fit` has ended
        self._step_losses = torch.zeros(0)  # on the device: reading a loss there would wait for it every step
        self._losses = ResponseLosses(model)
        self._is_sharded = ranks.is_sharded(model)

    def resume(self, losses: torch.Tensor, tokens: Sequence[int]) -> None:
        """Go on after the steps that had these mean losses (n,) and tokens."""
        self.first_step += len(tokens)
        self._step_losses = losses.to(self.device)
        self.curve = [{"loss": math.nan, "tokens": count} for count in tokens]

    def curve_so_far(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean losses (n,) and tokens (n,) of the steps taken."""
        tokens = torch.tensor([int(entry["tokens"]) for entry in self.curve])
        return self._step_losses[: len(tokens)], tokens

    def training_step(self, step: Step, step_index: int) -> dict[str, torch.Tensor]:
        lengths = [len(example.input_ids) for example in step.examples]
        mine = ranks.share(step.examples)
        own = [len(example.input_ids) for example in mine]
        outputs = self._run(lambda tokens: self._backward(mine, step.examples, tokens), own)
        ranks.sum_gradients(list(lora.trainable_parameters(self.model).values()))
        outputs = ranks.gather(outputs, len(lengths))
        self._clip()
        self.optimizers().step()  # type: ignore[union-attr]
        self.lr_schedulers().step()  # type: ignore[union-attr]
        done = len(self.curve)
        if done >= len(self._step_losses):  # one tensor that grows: small ones would break up the memory
            room = torch.zeros(2 * done + 64, device=self.device)
            room[:done] = self._step_losses
            self._step_losses = room
        losses, counts = outputs["losses"], outputs.get("counts")
        self._step_losses[done] = losses.mean() if counts is None else (losses * counts).sum() / counts.sum()
        self.curve.append({"loss": math.nan, "tokens": sum(lengths)})
        return outputs

    def on_train_end(self) -> None:
        for entry, loss in zip(self.curve, self._step_losses.tolist(), strict=False):
            entry["loss"] = loss

    def _run(self, work: Callable[[int], dict[str, torch.Tensor]], lengths: Sequence[int]) -> dict[str, torch.Tensor]:
        if not self._is_sharded:
            return self.budget.run(work, lengths)
        try:
            done = work(self.budget.tokens)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise GradsiftError(
                f"memory ran out with {self.budget.tokens:,} tokens at once, and ranks that share weights cannot go "
                "back; give fewer with compute.tokens"
            ) from error
        passed(sum(lengths))
        return done

    def _backward(self, mine: Sequence[Encoded], examples: Sequence[Encoded], tokens: int) -> dict[str, torch.Tensor]:
        """This rank's part of the gradients of a step's loss.

        Args:
            mine: this rank's share of the step's examples.
            examples: of the step, N.

        Returns:
            rows, losses, for `loss=token` counts (of response tokens) and, where they are wanted, norm_A and norm_B,
            (n,) each.
        """
        # masks depend on the step and the rank, not on what went before: neither a training that goes on nor a step
        # that is repeated needs a random state
        torch.manual_seed(derive_seed(self.dropout_seed, len(self.curve), ranks.rank()))
        self.optimizers().zero_grad()  # type: ignore[union-attr]
        if self.norms is not None:
            self.norms.forget()
        by_token = self.optimization.loss == "token"
        names = ("rows", "losses", *(["counts"] if by_token else []), *(["norm_A", "norm_B"] if self.norms else []))
        # of the whole step, not of a batch or a rank: all examples or all tokens weigh the same
        divisor = sum(example.scored for example in examples) if by_token else len(examples)
        parts: list[tuple[torch.Tensor, ...]] = []
        batches = by_length(mine, tokens)
        # a rank with fewer batches than others lends them its weights by passes that count for nothing
        lent = ranks.most(len(batches)) - len(batches) if self._is_sharded else 0
        for part in batches:
            batch = collate(part, self.pad_id).to(self.device)
            losses = self._losses(batch)
            self.manual_backward((losses * batch.counts if by_token else losses).sum() / divisor)
            norms = self.norms.take(len(examples)) if self.norms is not None else ()
            parts.append((batch.rows, losses.detach(), *([batch.counts] if by_token else []), *norms))
        for _ in range(lent):
            shortest = min(examples, key=lambda example: len(example.input_ids))
            self.manual_backward(0 * self._losses(collate([shortest], self.pad_id).to(self.device)).sum())
        if not parts:  # more ranks than examples
            none = torch.empty(0, device=self.device)
            return {name: none.long() if name == "rows" else none for name in names}
        return {name: torch.cat(values) for name, values in zip(names, zip(*parts, strict=True), strict=True)}

    def _clip(self) -> None:
        """Scale the gradient of the whole step, which all ranks have by now, to the norm that it may have."""
        if self.optimization.max_grad_norm is not None:
            parameters = lora.trainable_parameters(self.model).values()
            nn.utils.clip_grad_norm_(parameters, self.optimization.max_grad_norm)

    def configure_optimizers(self) -> Any:
        parameters = lora.trainable_parameters(self.model)
        optimizer = torch.optim.AdamW(
            parameters.values(),
            lr=self.optimization.learning_rate,
            betas=BETAS,
            weight_decay=self.optimization.weight_decay,
        )
        if self.restore_from is not None:
            lora.load_optimizer(optimizer, parameters, self.restore_from)
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: self.optimization.factor(self.first_step + step)
        )
        return {"optimizer": optimizer, "lr_scheduler": scheduler}


def fit(
    module: Finetuning,
    encoded: Sequence[Encoded],
    plan: Sequence[Sequence[int]],
    *,
    compute: ComputeConfig,
    callbacks: Sequence[L.Callback] = (),
    folder: Path | None = None,
) -> int:
    """Train over the steps of `plan` (positions in `encoded`) in the order given.

    Args:
        folder: of the artifact in the making: where an interrupted training left the point that this one goes on
            from, and where this one leaves its own.

    Returns:
        The number of optimiser steps that this process took; `module.curve` has them all.

    Raises:
        GradsiftError: a loss that is not finite, named by its rows; weights that are not; memory does not hold a
            single example.
    """
    handler = signal.getsignal(signal.SIGINT)
    callbacks = [StopAtNonFinite(encoded), *callbacks]
    if folder is not None:
        point = SavePoint(folder, compute.save_every, len(plan), callbacks)
        point.restore(module)
        callbacks.append(point)
    trainer = quiet_trainer(compute, callbacks)
    left = plan[len(module.curve) :]
    loader: Any = DataLoader(encoded, batch_sampler=left, collate_fn=Step)  # type: ignore[arg-type]
    try:
        trainer.fit(module, loader)
    except SystemExit:  # Lightning turns Ctrl-C into an exit and leaves the signal ignored
        signal.signal(signal.SIGINT, handler)
        raise KeyboardInterrupt from None
    if not all(bool(p.isfinite().all()) for p in lora.trainable_parameters(module.model).values()):
        raise GradsiftError(
            "the adapter's weights are not finite after the last step, though all losses were; lower the learning "
            "rate, or take compute.precision=float32"
        )
    if trainer.strategy.root_device.type == "cuda":
        gc.collect()  # Lightning's reference cycles would keep the model on the device
        torch.cuda.empty_cache()
    return int(trainer.global_step)


def step_counts(module: Finetuning, taken: int) -> dict[str, int]:
    """For a stage's counts: all steps of the training, and those of them that interrupted processes took."""
    return {"optimizer_steps": len(module.curve), "resumed_steps": len(module.curve) - taken}


def quiet_trainer(compute: ComputeConfig, callbacks: list[L.Callback]) -> L.Trainer:
    """A trainer for one pass over a loader that writes, logs and prints nothing by itself."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    # a loader over tokens in memory needs no workers; the frozen backbone is in evaluation mode on purpose
    for message in (".*does not have many workers.*", r".*module\(s\) in eval mode.*", ".*LeafSpec.*"):
        warnings.filterwarnings("ignore", message)
    return L.Trainer(
        accelerator="gpu" if device_of(compute).type == "cuda" else "cpu",
        strategy=ranks.Ranks() if ranks.size() > 1 else "auto",
        devices=compute.devices if ranks.size() > 1 else 1,
        num_nodes=compute.num_nodes if ranks.size() > 1 else 1,
        use_distributed_sampler=False,
        precision="32-true",  # nothing is cast: frozen weights have their precision since they were loaded
        max_epochs=1,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )


class ShowProgress(L.Callback):
    """Advances a bar by the examples of each step."""

    def __init__(self, advance: Callable[[int], None]) -> None:
        self._advance = advance
        self._done = 0  # examples

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_index: int) -> None:
        self._done += len(batch.examples)
        self._advance(len(batch.examples))

    def state_dict(self) -> dict[str, Any]:
        return {"done": self._done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._done = state["done"]
        self._advance(self._done)


class StopAtNonFinite(L.Callback):
    """Ends the training at a NaN or infinite loss or norm; looks every 16 steps, so as not to wait for the device."""

    def __init__(self, encoded: Sequence[Encoded]) -> None:
        self._encoded = encoded
        self._recent: list[dict[str, torch.Tensor]] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_index: int) -> None:
        self._recent.append(outputs)
        if len(self._recent) == 16:
            self._check()

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        self._check()

    def state_dict(self) -> dict[str, Any]:
        """Nothing to keep; but a point is not saved that nothing could go on from."""
        self._check()
        return {}

    def _check(self) -> None:
        names = {"losses": "training loss", "norm_A": "gradient norm", "norm_B": "gradient norm"}
        for outputs in self._recent:
            for name in names.keys() & outputs.keys():
                require_finite(names[name], outputs["rows"], outputs[name], self._encoded)
        self._recent.clear()


def require_finite(quantity: str, rows: torch.Tensor, values: torch.Tensor, encoded: Sequence[Encoded]) -> None:
    """Raise a `GradsiftError` that names the examples whose value is NaN or infinite by their row in the data's source.

    Args:
        quantity: name of the values in the message.
        rows: (B,) int64, `Encoded.row` of the values.
        values: (B,)
        encoded: examples that include all of `rows`.
    """
    bad = ~torch.isfinite(values)
    if bool(bad.any()):
        row_index = {example.row: example.row_index for example in encoded}
        named = ", ".join(str(row_index[row]) for row in rows[bad][:8].tolist())
        raise GradsiftError(
            f"the {quantity} of row {named} is not finite; lower the learning rate, or take compute.precision=float32"
        )
