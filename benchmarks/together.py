"""Compare members that train side by side (`proxy.together`) with the same members one after another.

    python -m benchmarks.together [--model nano|gpt2] [--members 5] [--steps 20] [--rounds 3]

Both ways train `--members` members for one epoch of `--steps` steps of 8 rows in float32, and are timed in each round.
The table gives seconds (on a CPU, processor time of one thread), their ratio, and the number of torch operations that a
member's step starts. On a GPU, most of the time of a small model is spent on starting operations, so the ratio of the
numbers of operations bounds the gain.
"""

from __future__ import annotations

import argparse
import io
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.workload import alpaca_rows, gpt2, interleaved, spread
from gradsift.artifacts import Store
from gradsift.config import ComputeConfig, LoraConfig, ModelConfig, ProxyConfig
from gradsift.data.tokens import Encoded
from gradsift.proxy.ensemble import member_settings, train_members_epoch
from gradsift.proxy.epochs import ProxyInputs
from gradsift.runtime import Display, Runtime
from gradsift.training.backbones import Backbone
from gradsift.training.device import TokenBudget
from gradsift.training.nano import nano_model, nano_tokenizer

BATCH = 8


class Operations(TorchDispatchMode):
    """Counts the operations that start work on a device: neither views nor operations on single numbers only."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
        self.count += not function.is_view and any(each.dim() for each in tensors)
        return function(*args, **(kwargs or {}))


class Members:
    """Members of one proxy, which are trained on the first rows of a list."""

    def __init__(self, model: Any, rows: list[Encoded], count: int, compute: ComputeConfig) -> None:
        self._model, self._rows, self._members, self._compute = model, rows, range(count), compute

    def train(
        self, together: bool, steps: int, tokens: int | None = None
    ) -> tuple[float, list[Path], tempfile.TemporaryDirectory[str]]:
        """Train the members; return the seconds, the members' folders, and the temporary folder that holds these.

        Args:
            tokens: number of tokens that pass through the model at once; None: chosen for the device.
        """
        owner = tempfile.TemporaryDirectory(prefix="gradsift-together-")
        display = Display(Console(file=io.StringIO()))
        run = Runtime(Store(Path(owner.name)), self._compute, display, seed=0)
        model = ModelConfig(kind="tiny_bytes")
        config = ProxyConfig(name="proxy", model=model, lora=LoraConfig(), members=len(self._members))
        tokenizer: Any = type("Tokenizer", (), {"pad_token_id": 0, "eos_token_id": 0})()
        budget = TokenBudget.of(self._model, tokens, print)
        inputs = ProxyInputs(Backbone(self._model, tokenizer), self._rows[: BATCH * steps], budget)
        settings = [member_settings(config, run, member, 1) for member in self._members]
        folders = [Path(owner.name) / str(member) for member in self._members]
        for folder in folders:
            folder.mkdir()
        clock = time.perf_counter if self._compute.device == "cuda" else time.process_time
        started = clock()
        units = [(each, None, folder) for each, folder in zip(settings, folders, strict=True)]
        for group in [units] if together else [[unit] for unit in units]:
            train_members_epoch(run, config, inputs, group, lambda done: None)
        if self._compute.device == "cuda":
            torch.cuda.synchronize()
        return clock() - started, folders, owner

    def operations(self, together: bool) -> float:
        """Return the number of operations in a member's step, from the difference of epochs of 16 and 20 steps.

        Both epochs record 16 points of the trajectory. As on a GPU, AdamW changes lists of tensors in one operation,
        and the rows of a step pass in one batch.
        """
        counts = []
        for steps in (16, 20):
            adamw = partial(torch.optim.AdamW, foreach=True)
            with mock.patch.object(torch.optim, "AdamW", adamw), Operations() as operations:
                self.train(together, steps, tokens=16384)
            counts.append(operations.count)
        return (counts[1] - counts[0]) / 4 / len(self._members)


def members_of(kind: str, count: int, steps: int, compute: ComputeConfig) -> Members:
    model: Any = gpt2(torch.float32) if kind == "gpt2" else nano_model("gpt2").requires_grad_(False).eval()
    rows, _ = alpaca_rows(BATCH * max(steps, 20))
    if kind == "nano":
        vocabulary, most = len(nano_tokenizer()), model.config.n_positions
        rows = [
            Encoded(row.row, row.row_index, row.input_ids[:most] % vocabulary, row.is_response[:most])
            for row in rows
            if row.is_response[1:most].any()
        ]
    return Members(model.to(compute.device), rows, count, compute)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("nano", "gpt2"), default="nano")
    parser.add_argument("--members", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(1)  # with more threads, the time that they wait for each other would count
    members = members_of(options.model, options.members, options.steps, ComputeConfig(device=device))

    def seconds(number: int, together: bool) -> float:
        return members.train(together, options.steps if number >= 0 else 1)[0]

    ways: dict[str, Callable[[int], float]] = {
        "alone": partial(seconds, together=False),
        "together": partial(seconds, together=True),
    }
    taken = interleaved(ways, options.rounds)
    print(f"{options.model}, {device}, {options.members} members, {options.steps} steps of {BATCH} rows, float32")
    for name, values in taken.items():
        print(f"  {name}: {spread(values)} s, {members.operations(name == 'together'):,.0f} operations a member's step")
    ratios = [alone / together for alone, together in zip(taken["alone"], taken["together"], strict=True)]
    print(f"  together is faster by {spread(ratios)}")


if __name__ == "__main__":
    main()
