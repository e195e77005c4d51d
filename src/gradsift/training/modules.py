"""The Lightning modules: `ProxyMember` for the ensemble, `TargetFinetuning` for the target, and their base class.

Shape letters: N examples of a step, B examples of a batch, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from lightning.pytorch.strategies import ParallelStrategy
from torch import nn

from gradsift.data.batching import by_length, collate
from gradsift.data.tokens import Encoded
from gradsift.journal import Journal
from gradsift.runtime import derive_seed
from gradsift.training import lora, parallel
from gradsift.training.device import TokenBudget
from gradsift.training.head import ResponseLosses
from gradsift.training.masks import PassedRows
from gradsift.training.optimization import BETAS, Optimization

if TYPE_CHECKING:
    from gradsift.gradients.probes import NormProbe


class Step:
    """The examples of one optimiser step. Lightning hands a `Step` to the module as it is, but would copy a list."""

    def __init__(self, examples: Sequence[Encoded]) -> None:
        self.examples = examples


class AdapterModule(L.LightningModule):
    """Trains the trainable parameters of `model`.

    The loss of an optimiser step is the mean over the step's examples or over their response tokens, depending on
    `optimization.loss`.

    The examples of a step pass through the model in batches of similar length, as large as the token budget allows, and
    the gradients of the batches are added up. So neither the memory nor the time per token depends on the number of
    examples in a step.

    With several ranks, each rank passes its share of the step's examples through the model, and the ranks' gradients
    are averaged. DDP averages them in the step's last backward pass. If the model's layers are divided over the ranks,
    `_reduce_gradients` averages them.
    """

    has_lanes = False  # whether the rows of a step belong to several adapters

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
        # a step has one optimiser step and as many backward passes as its examples need at this token budget
        self.automatic_optimization = False
        self.model = model  # with an adapter, as returned by `lora.add_adapter`
        self.is_divided = parallel.is_divided(model)
        self.passed_rows: PassedRows = model.passed_rows  # type: ignore[assignment]
        self.optimization = optimization
        self.budget = budget
        self.pad_id = pad_id
        self.first_step = first_step  # number of optimiser steps that earlier epochs took
        self.dropout_seed = dropout_seed
        # of an earlier epoch or an interrupted run; `configure_optimizers` restores it
        self.optimizer_state: Mapping[str, torch.Tensor] = {}
        self.gradient_norms: NormProbe | None = None  # set by `GradientNormCallback`
        self.curve: list[dict[str, float]] = []  # one entry per step; `on_train_end` fills in the losses
        self._step_losses = torch.zeros(0)  # on the device: reading a loss would make the host wait in every step

    def resume(self, losses: torch.Tensor, tokens: Sequence[int]) -> None:
        """Continue after the n optimiser steps of an interrupted run.

        Args:
            losses: (n,) the loss of each step.
            tokens: the number of tokens of each step.
        """
        # the dropout masks of a step depend on the length of the curve, its learning rate on `first_step`
        self.first_step += len(tokens)
        self._step_losses = losses.to(self.device)
        self.curve = [{"loss": math.nan, "tokens": count} for count in tokens]

    def curve_so_far(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the losses (n,) and the numbers of tokens (n,) of the n optimiser steps taken so far."""
        tokens = torch.tensor([int(entry["tokens"]) for entry in self.curve])
        return self._step_losses[: len(tokens)], tokens

    def cpu(self) -> AdapterModule:
        """Return the module without moving it to the CPU.

        Lightning calls this method after a training, but later stages still need the backbone on its device.
        """
        return self

    def on_fit_start(self) -> None:
        self._losses = ResponseLosses(self.model)  # only now is the model on the device

    def training_step(self, step: Step, step_index: int) -> dict[str, Any]:
        outputs = self.pass_step(step)
        self.update(step, outputs)
        return outputs

    def pass_step(self, step: Step) -> dict[str, torch.Tensor]:
        """Accumulate the gradient of the step's loss; return what `_backward` returns, gathered from all ranks."""
        mine = parallel.share(step.examples)
        lengths = [len(example.input_ids) for example in mine]
        # If memory runs out, `_backward` runs again with fewer tokens. It starts without gradients and with the same
        # dropout masks, so the step does not depend on the number of attempts.
        outputs = parallel.run(self.budget, lambda tokens: self._backward(mine, step.examples, tokens), lengths)
        self._reduce_gradients()
        return parallel.gather(outputs, len(step.examples))

    def update(self, step: Step, outputs: Mapping[str, torch.Tensor]) -> None:
        """Take an optimiser step with the accumulated gradient, and record the step's loss and number of tokens."""
        if self.optimization.max_grad_norm is not None:
            # after the gradients of all batches and ranks were added: the bound is on the whole step's gradient
            nn.utils.clip_grad_norm_(lora.trainable_parameters(self.model).values(), self.optimization.max_grad_norm)
        self.optimizer.step()
        self.scheduler.step()
        done = len(self.curve)
        if done >= len(self._step_losses):  # one tensor that grows, as many small ones would fragment the memory
            larger = torch.zeros(2 * done + 64, device=self.device)
            larger[:done] = self._step_losses
            self._step_losses = larger
        # with `loss=token` the step's loss is sum_i n_i L_i / sum_i n_i, where L_i is the mean over n_i response tokens
        losses, counts = outputs["losses"], outputs.get("counts")
        self._step_losses[done] = losses.mean() if counts is None else (losses * counts).sum() / counts.sum()
        tokens = sum(len(example.input_ids) for example in step.examples)
        self.curve.append({"loss": math.nan, "tokens": tokens})

    def on_train_end(self) -> None:
        # the tensor may be longer than the curve
        for entry, loss in zip(self.curve, self._step_losses.tolist(), strict=False):
            entry["loss"] = loss

    def _backward(self, mine: Sequence[Encoded], examples: Sequence[Encoded], tokens: int) -> dict[str, torch.Tensor]:
        """Accumulate the gradient of the loss of a step with N `examples`, of which `mine` are this rank's share.

        Args:
            tokens: largest number of tokens that pass through the model at once.

        Returns:
            Tensors (n,) for this rank's n examples, by name. `rows` and `losses` are always there. With `loss=token`,
            `counts` are the numbers of response tokens. If `gradient_norms` is set, `norm_A` and `norm_B` are the norms
            of each example's gradients with respect to A and to B. If several adapters train, `lanes` are the indices
            of the examples' adapters.
        """
        # For layers with torch's own dropout. The seed depends only on step and rank, so neither a resumed training nor
        # a repeated step needs the random state of earlier steps.
        torch.manual_seed(derive_seed(self.dropout_seed, len(self.curve), parallel.rank()))
        self.forget_gradients()
        if self.gradient_norms is not None:
            self.gradient_norms.forget()
        by_token = self.optimization.loss == "token"
        parts: list[dict[str, Any]] = []
        strategy: Any = self.trainer.strategy
        batches = by_length(mine, tokens)
        passes = len(batches)  # of this rank; additional passes have weight 0
        if self.is_divided:
            passes = parallel.largest(passes)  # each pass through a divided model needs all ranks
        elif parallel.size() > 1:
            passes = max(1, passes)  # the last pass synchronises the gradients
        for number in range(passes):
            is_own = number < len(batches)
            # A rank without another batch of its own passes the shortest example with weight 0: the other ranks'
            # collective operations wait for this rank.
            shortest = [min(examples, key=lambda example: len(example.input_ids))]
            rows = self._announced(batches[number] if is_own else shortest)
            divisor = self._divisor(rows, examples)
            batch = collate(rows, self.pad_id).to(self.device)
            losses = self._losses(batch)
            terms = losses * batch.counts if by_token else losses
            weight = parallel.size() if is_own else 0  # the strategy divides the sum over the ranks by their number
            if isinstance(divisor, torch.Tensor):
                total = (terms / divisor).sum() * weight
            else:
                total = terms.sum() * weight / divisor
            # DDP must average the ranks' gradients only in the last backward pass
            blocks = number < passes - 1 and isinstance(strategy, ParallelStrategy)
            with strategy.block_backward_sync() if blocks else nullcontext():
                self.manual_backward(total)
            columns: dict[str, Any] = {"rows": batch.rows, "losses": losses.detach()}
            if by_token:
                columns["counts"] = batch.counts
            if self.gradient_norms is not None:
                # the loss above is sum_i L_i size / divisor, so |grad L_i| is the measured norm times divisor / size
                columns["norm_A"], columns["norm_B"] = self.gradient_norms.take(divisor / parallel.size())
            if self.has_lanes:
                columns["lanes"] = self.passed_rows.lanes
            parts.append(columns if is_own else {name: values[:0] for name, values in columns.items()})
        return {name: torch.cat([columns[name] for columns in parts]) for name in parts[0]}

    def forget_gradients(self) -> None:
        self.optimizer.zero_grad()

    def _announced(self, examples: Sequence[Encoded]) -> Sequence[Encoded]:
        """Tell the adapted layers about the examples of the next batch; return the examples in the batch's order."""
        self._give_masks(map(self.mask_key, examples))
        return examples

    def mask_key(self, example: Encoded) -> int:
        """Return the key of an example's dropout masks in the next step."""
        # step and example alone: the masks must not depend on batch, rank or interruptions
        return derive_seed(self.dropout_seed, len(self.curve), example.row)

    def _give_masks(self, keys: Iterable[int]) -> None:
        if self.passed_rows.drops:
            self.passed_rows.keys = torch.tensor(list(keys), device=self.device)

    def _divisor(self, rows: Sequence[Encoded], examples: Sequence[Encoded]) -> float | torch.Tensor:
        """Return the number by which the losses of `rows` are divided so that the step's loss is a mean.

        With several adapters, return a tensor (B,) with a divisor for each row.

        Args:
            rows: the B examples of a batch.
            examples: all examples of the step.
        """
        # the number of examples or tokens of the step: with a mean over each batch or rank, an example's weight would
        # depend on its batch
        return sum(example.scored for example in examples) if self.optimization.loss == "token" else len(examples)

    def _reduce_gradients(self) -> None:
        """Do nothing: DDP has averaged the ranks' gradients in the backward pass."""

    def configure_optimizers(self) -> Any:
        parameters = lora.trainable_parameters(self.model)
        optimizer = torch.optim.AdamW(
            parameters.values(),
            lr=self.optimization.learning_rate,
            betas=BETAS,
            weight_decay=self.optimization.weight_decay,
        )
        lora.restore_optimizer(optimizer, parameters, self.optimizer_state)
        self.optimizer_state = {}  # frees memory: it is twice as large as the adapter
        # LambdaLR counts from 0 in each process, so the steps of earlier epochs and interrupted runs are added
        first = self.first_step
        self.optimizer = optimizer
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: self.optimization.factor(first + s))
        return {"optimizer": optimizer, "lr_scheduler": self.scheduler}


class ProxyMember(AdapterModule):
    """Trains a member of the proxy ensemble, or the adapter for `gradsift.features.gradients`, for one epoch.

    With this module, `Trainer.validate` computes the examples' gradient norms, |g_i^(m,e)| in GRADFILTERING, without
    changing the weights.
    """

    journal: Journal | None = None  # keeps the norms of a pass, batch by batch
    masks: int | None = None  # seed of the dropout masks in a pass for norms; None: no dropout

    def on_validation_start(self) -> None:
        self._losses = ResponseLosses(self.model)

    def on_validation_model_eval(self) -> None:
        # Lightning would turn off the dropout by which the members of mc_dropout differ
        if self.masks is None:
            super().on_validation_model_eval()

    def validation_step(self, group: Step, index: int) -> dict[str, torch.Tensor]:
        parts = self.budget.group(group.examples, self._norms_of, self.journal)
        names = ("rows", "norm_A", "norm_B", "losses")
        return {name: torch.cat(columns) for name, columns in zip(names, zip(*parts, strict=True), strict=True)}

    def _norms_of(self, examples: Sequence[Encoded]) -> tuple[torch.Tensor, ...]:
        norms = self.gradient_norms
        if norms is None:
            raise RuntimeError("a pass over norms needs GradientNormCallback among the trainer's callbacks")
        if self.masks is not None:
            # for layers with torch's own dropout; a resumed pass has the same masks
            torch.manual_seed(derive_seed(self.masks, examples[0].row))
            self._give_masks(derive_seed(self.masks, example.row) for example in examples)
        norms.forget()
        batch = collate(examples, self.pad_id).to(self.device)
        with torch.enable_grad():
            losses = self._losses(batch)
            return (batch.rows, *norms.backward(losses), losses.detach())


class TargetFinetuning(AdapterModule):
    """The finetune of the target, whose layers may be divided over the ranks (`gradsift.training.parallel`)."""

    def configure_model(self) -> None:
        """Do nothing: the model was divided while it was loaded. ModelParallelStrategy requires this method."""

    def _reduce_gradients(self) -> None:
        """Average the adapter's gradients over the ranks if the model is divided.

        FSDP averages only the gradients of the weights that it divides, and the adapter is whole on every rank.
        """
        if not self.is_divided:
            return
        parameters = list(lora.trainable_parameters(self.model).values())
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        # one message for all parameters, of the same size from all ranks
        mean: Any = self.trainer.strategy.reduce(torch.cat([part.flatten() for part in parts]), reduce_op="mean")
        for parameter, part in zip(parameters, mean.split([part.numel() for part in parts]), strict=True):
            parameter.grad = part.view_as(parameter)
