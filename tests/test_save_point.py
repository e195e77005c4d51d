"""Laws of the save point: a resumed training ends like an uninterrupted one, and repeats or omits no row."""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_finetuning import (
    member_epoch,
    nano_examples,
    nano_target,
    optimization,
    poisoned,
    proxy_config,
    target_config,
    weights_of,
)
from test_norms import ragged_examples, tiny_model

from gradsift.config import ComputeConfig, LoraConfig
from gradsift.data.tokens import Encoded
from gradsift.errors import GradsiftError
from gradsift.manifests import UNFINISHED
from gradsift.training import finetuning, lora, modules
from gradsift.training.backbones import load_backbone
from gradsift.training.device import TokenBudget
from gradsift.training.finetuning import POINT_FILE, _checksum, fit, steps_saved
from gradsift.training.modules import ProxyMember
from gradsift.training.target import train_target

pytestmark = [pytest.mark.numerics, pytest.mark.usefixtures("one_thread")]

EVERY_STEP = ComputeConfig(device="cpu", save_every=0)
PLAN = [[4, 0, 7], [1, 8], [2, 3, 5, 6], [9, 4], [0, 2, 8], [6]]  # steps of different sizes; rows may come back


class Killed(Exception):
    """Simulates kill -9: nothing after it runs."""


class KillAfter(L.Callback):
    """Records the rows of each step, and dies after a number of steps, before or after the step is saved."""

    def __init__(self, steps: int | None = None) -> None:
        self._steps = steps
        self.rows: list[list[int]] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_index: int) -> None:
        if self._steps == len(self.rows):
            raise Killed
        self.rows.append([example.row for example in batch.examples])


def train(
    folder: Path | None, kill: KillAfter, encoded: Sequence[Encoded], dropout: float = 0.0, **options: Any
) -> tuple[ProxyMember, int]:
    adapted = lora.add_adapter(tiny_model("gpt2"), LoraConfig(rank=2, dropout=dropout), seed=1)
    rate = optimization(schedule="linear", warmup_steps=2, total_steps=len(PLAN) + 3)
    budget, dropout_seed = options.pop("budget", None) or TokenBudget(4096), options.pop("dropout_seed", 7)
    module = ProxyMember(adapted, rate, budget, 0, 3, dropout_seed)
    shared = {"compute": EVERY_STEP, "callbacks": [kill], "folder": folder}
    taken = fit(module, encoded, PLAN, **(shared | options))
    return module, taken


@functools.cache
def undisturbed(dropout: float = 0.0) -> ProxyMember:
    """Return the module of a training that is neither saved nor killed."""
    return train(None, KillAfter(), ragged_examples(10), dropout)[0]


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("stops", [[1], [2, 5], [1, 2, 3]])
def test_a_training_that_was_killed_ends_as_one_that_was_not(stops: list[int], dropout: float, tmp_path: Path) -> None:
    encoded, whole = ragged_examples(10), undisturbed(dropout)
    seen, before = [], 0
    for stop in stops:
        killed = KillAfter(stop - before)
        with pytest.raises(Killed):
            train(tmp_path / "killed", killed, encoded, dropout)
        assert steps_saved(tmp_path / "killed") == stop
        seen, before = seen + killed.rows, stop
    last = KillAfter()
    torch.manual_seed(99)
    module, taken = train(tmp_path / "killed", last, encoded, dropout)
    assert taken == len(PLAN) - stops[-1]
    assert seen + last.rows == PLAN
    ours, theirs = weights_of(module.model), weights_of(whole.model)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert module.curve == whole.curve
    assert not module.optimizer_state  # the training does not hold what the optimiser has a copy of


def test_restored_moments_are_on_the_device_of_their_parameter_and_step_counts_on_the_cpu() -> None:
    trained = {"weight": torch.nn.Parameter(torch.ones(3))}
    optimizer = torch.optim.AdamW(trained.values())
    trained["weight"].sum().backward()
    optimizer.step()
    tensors = lora.optimizer_tensors(optimizer, trained)
    elsewhere = {"weight": torch.nn.Parameter(torch.ones(3, device="meta"))}
    fresh = torch.optim.AdamW(elsewhere.values())
    lora.restore_optimizer(fresh, elsewhere, tensors)
    devices = {kind: value.device.type for kind, value in fresh.state[elsewhere["weight"]].items()}
    assert devices == {"step": "cpu", "exp_avg": "meta", "exp_avg_sq": "meta"}


def test_dropout_masks_are_those_of_the_seed(tmp_path: Path) -> None:
    """The counterpart of the law above: masks of another seed give another adapter."""
    encoded, whole = ragged_examples(10), undisturbed(0.4)
    with pytest.raises(Killed):
        train(tmp_path / "killed", KillAfter(3), encoded, 0.4)
    module, _ = train(tmp_path / "killed", KillAfter(), encoded, 0.4, dropout_seed=8)
    assert not all(map(torch.equal, weights_of(module.model).values(), weights_of(whole.model).values()))


def change_point(folder: Path, tensors: dict[str, torch.Tensor], sealed: bool = True, **about: Any) -> None:
    point = folder / UNFINISHED / POINT_FILE
    with safe_open(point, framework="pt") as file:
        text = json.dumps(json.loads(file.metadata()["about"]) | about)
    changed = load_file(point) | tensors
    checksum = {"checksum": _checksum(changed, text)} if sealed else {}
    save_file(changed, point, metadata={"about": text, **checksum})


@functools.cache
def saved_point() -> bytes:
    """Return the save point of a training that was killed after three steps."""
    with tempfile.TemporaryDirectory() as folder:
        with pytest.raises(Killed):
            train(Path(folder), KillAfter(3), ragged_examples(10))
        assert steps_saved(Path(folder)) == 3
        return (Path(folder) / UNFINISHED / POINT_FILE).read_bytes()


@pytest.mark.parametrize("damage", ["cut", "other format", "header", "about", "weights", "no checksum", "empty"])
def test_a_point_that_cannot_be_used_costs_no_more_than_itself(damage: str, tmp_path: Path) -> None:
    encoded = ragged_examples(10)
    content = bytearray(saved_point())
    point = tmp_path / "killed" / UNFINISHED / POINT_FILE
    point.parent.mkdir(parents=True)
    places = {"header": 9, "about": content.index(b"steps"), "weights": len(content) - 3}
    if damage in places:
        content[places[damage]] ^= 1
    left = {"cut": 1000, "empty": 0}.get(damage, len(content))
    point.write_bytes(content[:left])
    if damage == "other format":
        change_point(tmp_path / "killed", {}, format=0)
    elif damage == "no checksum":
        change_point(tmp_path / "killed", {}, sealed=False)
    assert steps_saved(tmp_path / "killed") == 0
    said: list[str] = []
    module, taken = train(tmp_path / "killed", KillAfter(), encoded, budget=TokenBudget(4096, said.append))
    assert taken == len(PLAN)
    assert module.curve == undisturbed().curve
    assert said == ["  the save point of killed is damaged or of another version; its training begins anew"]


def test_a_point_is_never_saved_after_a_loss_that_is_not_finite(tmp_path: Path, monkeypatch: Any) -> None:
    encoded = ragged_examples(10)
    monkeypatch.setattr(modules, "ResponseLosses", poisoned(2, float("nan")))  # in the third step
    with pytest.raises(GradsiftError, match="row 12 is not finite"):
        train(tmp_path, KillAfter(), encoded)
    assert steps_saved(tmp_path) == 2


def test_what_memory_taught_is_known_after_a_restart(tmp_path: Path) -> None:
    encoded, budget = ragged_examples(10), TokenBudget(4096)
    budget.tokens = 17  # as after memory ran out
    with pytest.raises(Killed):
        train(tmp_path, KillAfter(2), encoded, budget=budget)
    for asked, then in ((4096, 17), (5, 5)):
        fresh = TokenBudget(asked)
        with pytest.raises(Killed):
            train(tmp_path, KillAfter(1), encoded, budget=fresh)
        assert fresh.tokens == then


def test_nothing_is_written_before_its_time(tmp_path: Path) -> None:
    train(tmp_path, KillAfter(), ragged_examples(10), compute=ComputeConfig(device="cpu"))
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------ stages

FILES = ["adapter_model.safetensors", "optimizer.safetensors", "curve.jsonl"]


def dies_after(calls: int) -> Callable[[int], None]:
    """A progress bar that kills the process at its n-th advance, during the end of a step."""
    left = [calls]

    def advance(done: int) -> None:
        left[0] -= 1
        if not left[0]:
            raise Killed

    return advance


@pytest.mark.parametrize("collect", ["epoch_end", "during_training"])
def test_a_member_goes_on_within_its_epoch(collect: str, tmp_path: Path) -> None:
    config = proxy_config(collect=collect, schedule="linear", lora=LoraConfig(rank=2, dropout=0.2), batch_size=3)
    encoded = ragged_examples(14)
    options = {"compute": EVERY_STEP}
    first = tmp_path / "first"
    member_epoch(first, tiny_model("gpt2"), config, encoded, 1, None)
    whole = member_epoch(tmp_path / "whole", tiny_model("gpt2"), config, encoded, 2, first)
    for saved in (2, 3):
        with pytest.raises(Killed):
            member_epoch(tmp_path / "killed", tiny_model("gpt2"), config, encoded, 2, first, dies_after(3), **options)
        assert steps_saved(tmp_path / "killed") == saved
    killed = member_epoch(tmp_path / "killed", tiny_model("gpt2"), config, encoded, 2, first, **options)
    assert (whole["optimizer_steps"], whole["resumed_steps"]) == (5, 0)
    assert (killed["optimizer_steps"], killed["resumed_steps"]) == (5, 3)
    for name in [*FILES, *(["gradient_norms.parquet"] if collect == "during_training" else [])]:
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_a_finetune_goes_on_within_its_steps(tmp_path: Path, backbones: Path, monkeypatch: Any) -> None:
    run, model, made = nano_target(backbones)
    run.compute = EVERY_STEP
    config = target_config(steps=7, lora=LoraConfig(dropout=0.1))

    def tune(folder: Path) -> dict[str, Any]:
        folder.mkdir(exist_ok=True)
        return train_target(run, config, load_backbone(made, model, EVERY_STEP), nano_examples(), folder)

    whole = tune(tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(finetuning, "ShowProgress", lambda advance: KillAfter(4))
        with pytest.raises(Killed):
            tune(tmp_path / "killed")
    killed = tune(tmp_path / "killed")
    assert (killed.pop("resumed_steps"), whole.pop("resumed_steps")) == (4, 0)
    assert killed == whole
    for name in ("adapter/adapter_model.safetensors", "curve.jsonl"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
