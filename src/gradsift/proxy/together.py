"""Training of several members side by side for one epoch (`proxy.together`), with shared forward and backward passes.

Each member has its own data order, dropout masks, optimiser, learning rate, save point and files. So a member's
artifact equals that of a member trained alone, up to rounding. In each step of the trainer, every member that has steps
left takes one optimiser step. After an interruption, each member continues from its own last save point.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from itertools import zip_longest
from typing import Any

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader

from gradsift.config import ComputeConfig, LoraConfig
from gradsift.data.tokens import Encoded
from gradsift.proxy.epochs import Epoch, ProxyInputs
from gradsift.training.finetuning import require_finite_weights, train, with_save_point
from gradsift.training.lora import Lanes
from gradsift.training.modules import AdapterModule, ProxyMember, Step


def train_together(
    inputs: ProxyInputs, epochs: Sequence[Epoch], config: LoraConfig, compute: ComputeConfig
) -> list[dict[str, Any]]:
    """Train all members for one epoch, and return what `Epoch.write` returns for each member.

    Each dict also has `forward_tokens`, the number of tokens in the steps that this process has taken for the member.
    """
    with closing(Lanes(inputs.backbone.model, config, [epoch.lora_seed for epoch in epochs])) as adapters:
        members, callbacks, left = [], [], []
        for lane, epoch in enumerate(epochs):
            adapters.activate(lane)
            member = epoch.start(adapters.adapted, inputs)
            own = with_save_point(member, inputs.encoded, epoch.plan, epoch.callbacks, compute, epoch.folder)
            # `with_save_point` has restored the member; `curve` has one entry for each of the steps already taken
            left.append(epoch.plan[len(member.curve) :])
            members.append(member)
            callbacks.append(own)

        def step(batches: Sequence[Sequence[int] | None]) -> Step:
            rows = [(lane, place) for lane, batch in enumerate(batches) for place in batch or ()]
            return Step([replace(inputs.encoded[place], lane=lane) for lane, place in rows])

        loader: Any = DataLoader(list(zip_longest(*left)), batch_size=None, collate_fn=step)  # type: ignore[arg-type]
        train(Members(adapters, members), loader, compute, [_OfEachMember(callbacks)])
        infos = []
        for lane, (member, epoch) in enumerate(zip(members, epochs, strict=True)):
            adapters.activate(lane)
            require_finite_weights(member)
            info = epoch.write(member, inputs, len(left[lane]))
            taken = member.curve[len(member.curve) - len(left[lane]) :]
            infos.append({**info, "forward_tokens": sum(int(entry["tokens"]) for entry in taken)})
    return infos


class Members(AdapterModule):
    """Trains the adapters of `lanes` (one lane per member), each as a `ProxyMember` alone would train it."""

    has_lanes = True

    def __init__(self, lanes: Lanes, members: Sequence[ProxyMember]) -> None:
        first = members[0]
        super().__init__(lanes.adapted, first.optimization, first.budget, first.pad_id)
        self.lanes = lanes
        self.of_lane = members
        self._children = nn.ModuleList(members)  # registered, so that Lightning sets their device

    def training_step(self, step: Step, step_index: int) -> dict[str, Any]:
        """Return the outputs of each member that has examples in the step. The keys are lane numbers as strings."""
        outputs = self.pass_step(step)
        self.lanes.forget_rows()
        # A step may take several passes, each with rows of every lane. The sort is stable, so the rows of a lane stay
        # in the order of the passes.
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
    """Calls each member's callbacks with that member as their module, while the member's adapter is the active one."""

    def __init__(self, callbacks: Sequence[Sequence[L.Callback]]) -> None:
        self._callbacks = callbacks

    def _call(self, hook: str, trainer: Any, module: Members, *arguments: Any) -> None:
        for lane, member in enumerate(module.of_lane):
            module.lanes.activate(lane)
            for callback in self._callbacks[lane]:
                getattr(callback, hook)(trainer, member, *arguments)

    def on_train_start(self, trainer: Any, module: Any) -> None:
        self._call("on_train_start", trainer, module)
        # if norms are recorded, each member's callback has replaced the model's probe, so the last member's is attached
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
