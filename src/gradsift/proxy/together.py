"""Training of several members side by side for one epoch, in shared passes over the frozen weights (`proxy.together`).

Each member keeps its own rows and their order, dropout masks, optimiser, learning rate, save point and files, so that
its artifact equals the artifact of a member trained alone, up to rounding. A step of the trainer is one step of every
member that has steps left. After an interruption, each member continues from its own last save point.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader

from gradsift.config import ComputeConfig
from gradsift.data.tokens import Encoded
from gradsift.gradients.callback import GradientNormCallback
from gradsift.gradients.norms_table import write_norms
from gradsift.proxy.epochs import EpochStart, ProxyInputs, optimizer_keeper, start_epoch, write_epoch
from gradsift.proxy.trajectory import Trajectory
from gradsift.runtime import Advance
from gradsift.training.finetuning import ShowProgress, require_finite_weights, train, with_save_point
from gradsift.training.lanes import Lanes
from gradsift.training.modules import AdapterModule, ProxyMember, Step
from gradsift.training.optimization import Optimization


class MemberEpoch:
    """One member's part in an epoch: its batches, its state at the start, its callbacks and its folder."""

    def __init__(
        self,
        plan: Sequence[Sequence[int]],
        optimization: Optimization,
        start: EpochStart,
        lora_seed: int,
        folder: Path,
        with_norms: bool,
    ) -> None:
        """
        Args:
            plan: batches, as positions in the examples.
            with_norms: whether the per-sample norms are recorded during the steps.
        """
        self.plan, self.optimization, self.start = plan, optimization, start
        self.lora_seed, self.folder = lora_seed, folder
        self._norms = GradientNormCallback() if with_norms else None
        self._trajectory: Trajectory | None = None

    def callbacks(self, adapted: Any, advance: Advance) -> list[L.Callback]:
        """Return callbacks for the training of the model's active adapter."""
        self._trajectory = Trajectory(adapted, self.start.first_step, len(self.plan))
        return [ShowProgress(advance), self._trajectory, *([self._norms] if self._norms else [])]

    def write(self, inputs: ProxyInputs) -> dict[str, Any]:
        """Write the trajectory and the norms; return entries for the artifact's `info`, {} if no norms are recorded."""
        if self._trajectory is not None:
            self._trajectory.write(self.folder)
        if self._norms is None:
            return {}
        encoded = inputs.encoded
        info = write_norms(self.folder, self._norms.records.columns(encoded), encoded, shard=0, shards=1)
        return {**info, "all_rows": len(encoded)}


def train_together(
    lanes: Lanes, inputs: ProxyInputs, epochs: Sequence[MemberEpoch], compute: ComputeConfig, advance: Advance
) -> list[dict[str, Any]]:
    """Train each member over an epoch, and write into its folder what `train_epoch` writes.

    Args:
        lanes: a fresh adapter for each of `epochs`.

    Returns:
        For each member, what `train_epoch` returns, and `forward_tokens`.
    """
    members, callbacks, left = [], [], []
    for lane, epoch in enumerate(epochs):
        lanes.activate(lane)
        member = start_epoch(lanes.adapted, inputs, epoch.optimization, epoch.start)
        own = [*epoch.callbacks(lanes.adapted, advance), optimizer_keeper(epoch.folder)]
        callbacks.append(with_save_point(member, inputs.encoded, epoch.plan, own, compute, epoch.folder))
        # `with_save_point` has restored the member, and `curve` has an entry for each step that it had taken
        left.append(epoch.plan[len(member.curve) :])
        members.append(member)

    def step(batches: Sequence[Sequence[int] | None]) -> Step:
        rows = [(lane, place) for lane, batch in enumerate(batches) for place in batch or ()]
        return Step([replace(inputs.encoded[place], lane=lane) for lane, place in rows])

    loader: Any = DataLoader(list(zip_longest(*left)), batch_size=None, collate_fn=step)  # type: ignore[arg-type]
    train(Members(lanes, members), loader, compute, [_OfEachMember(callbacks)])
    infos = []
    for lane, (member, epoch) in enumerate(zip(members, epochs, strict=True)):
        lanes.activate(lane)
        require_finite_weights(member)
        info = write_epoch(member, inputs, len(left[lane]), epoch.folder)
        taken = member.curve[len(member.curve) - len(left[lane]) :]
        infos.append({**info, "forward_tokens": sum(int(entry["tokens"]) for entry in taken)})
    return infos


class Members(AdapterModule):
    """Trains the adapters of `lanes`, each as its own `ProxyMember` would."""

    has_lanes = True

    def __init__(self, lanes: Lanes, members: Sequence[ProxyMember]) -> None:
        first = members[0]
        super().__init__(lanes.adapted, first.optimization, first.budget, first.pad_id)
        self.lanes = lanes
        self.of_lane = members
        self._children = nn.ModuleList(members)  # registered, so that Lightning sets their device

    def training_step(self, step: Step, step_index: int) -> dict[str, Any]:
        """Return the outputs of each member that has examples in the step, by its lane's number as a string."""
        outputs = self.pass_step(step)
        self.lanes.forget_rows()
        # a step may take several passes, each with rows of every lane; the sort is stable, so that a lane's rows stay
        # in the order of the passes
        order = outputs["lanes"].argsort(stable=True)
        counts = [len(_part(step, lane).examples) for lane in range(len(self.lanes))]
        columns = {name: values[order].split(counts) for name, values in outputs.items()}
        by_lane = {}
        for lane in (lane for lane, count in enumerate(counts) if count):
            own = {name: parts[lane] for name, parts in columns.items()}
            self.lanes.activate(lane)
            self.of_lane[lane].update(_part(step, lane), own)
            by_lane[str(lane)] = own
        return by_lane

    def on_train_end(self) -> None:
        for member in self.of_lane:
            member.on_train_end()

    def configure_optimizers(self) -> Any:
        for lane, member in enumerate(self.of_lane):
            self.lanes.activate(lane)
            member.configure_optimizers()
        return [member.optimizer for member in self.of_lane]

    def forget_gradients(self) -> None:
        for member in self.of_lane:
            member.forget_gradients()

    def _announced(self, examples: Sequence[Encoded]) -> list[Encoded]:
        rows = self.lanes.announce(examples)
        self._give_masks(self.of_lane[row.lane].mask_key(row) for row in rows)
        return rows

    def _divisor(self, rows: Sequence[Encoded], examples: Sequence[Encoded]) -> torch.Tensor:
        # each member minimises the mean over its own examples of the step; its last batch may have fewer examples
        counts = [float(sum(example.lane == lane for example in examples)) for lane in range(len(self.lanes))]
        return torch.tensor([counts[row.lane] for row in rows]).to(self.device, non_blocking=True)


def _part(step: Step, lane: int) -> Step:
    return Step([example for example in step.examples if example.lane == lane])


class _OfEachMember(L.Callback):
    """Calls the callbacks of each member with that member, while its adapter is the active one."""

    def __init__(self, callbacks: Sequence[Sequence[L.Callback]]) -> None:
        self._callbacks = callbacks

    def _call(self, hook: str, trainer: Any, module: Members, *arguments: Any) -> None:
        for lane, member in enumerate(module.of_lane):
            module.lanes.activate(lane)
            for callback in self._callbacks[lane]:
                getattr(callback, hook)(trainer, member, *arguments)

    def on_train_start(self, trainer: Any, module: Any) -> None:
        self._call("on_train_start", trainer, module)
        # if norms are recorded, each member's probe has replaced the probe of the member before, so the last one counts
        module.gradient_norms = module.of_lane[-1].gradient_norms

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_index: int) -> None:
        for lane, own in outputs.items():
            module.lanes.activate(int(lane))
            for callback in self._callbacks[int(lane)]:
                member = module.of_lane[int(lane)]
                callback.on_train_batch_end(trainer, member, own, _part(batch, int(lane)), batch_index)

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        self._call("on_train_epoch_end", trainer, module)

    def on_train_end(self, trainer: Any, module: Any) -> None:
        self._call("on_train_end", trainer, module)

    def on_exception(self, trainer: Any, module: Any, exception: BaseException) -> None:
        self._call("on_exception", trainer, module, exception)
