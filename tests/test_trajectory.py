"""Laws of the trajectories: they do not change the training, every epoch has its points, a resume loses none."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from test_ensembles import config, given, trained
from test_finetuning import runtime
from test_norms import tiny_model
from torch import nn

from gradsift.config import ComputeConfig, LoraConfig
from gradsift.gradients.probes import ADAPTER
from gradsift.proxy.ensemble import train_adapters
from gradsift.proxy.trajectory import DIMENSIONS, POINTS, Trajectory
from gradsift.training import lora
from gradsift.training.optimization import TRAJECTORY_FILE, read_trajectory

pytestmark = [pytest.mark.numerics, pytest.mark.usefixtures("one_thread")]


class Blind(L.Callback):
    """Replaces the trajectory's callback and does nothing."""

    def __init__(self, *arguments: Any) -> None:
        pass


def adapted() -> Any:
    return lora.add_adapter(tiny_model("gpt2"), LoraConfig(rank=2), seed=0)


def move(model: nn.Module, step: int) -> None:
    """Change the adapter as a function of the step's number."""
    generator = torch.Generator().manual_seed(step)
    for _, layer in lora.lora_layers(model):
        for factor in (layer.lora_A, layer.lora_B):
            weight = factor[ADAPTER].weight.data
            weight += 0.1 * torch.randn(weight.shape, generator=generator)


def noted(steps: int, first_step: int = 0, stop_at: int | None = None) -> tuple[list[int], torch.Tensor]:
    """Return steps and points of a training; at `stop_at` another callback continues with the state."""
    model = adapted()
    trajectory, module = Trajectory(first_step, steps, Path()), SimpleNamespace(model=model)
    trajectory.on_train_start(None, module)
    for step in range(1, steps + 1):
        move(model, step)
        trajectory.on_train_batch_end(None, None, None, None, step - 1)
        if step == stop_at:
            state = trajectory.state_dict()
            assert all(isinstance(value, torch.Tensor) for value in state.values())
            trajectory = Trajectory(first_step, steps, Path())
            trajectory.load_state_dict(state)  # before the start of the training, as save points do
            trajectory.on_train_start(None, module)
    state = trajectory.state_dict()
    return state["steps"].tolist(), state["points"]


def test_training_is_the_same_whether_its_trajectory_is_noted_or_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With dropout, whose masks would change if the callback used the training's random stream."""
    settings = config("mc_dropout")
    ((*epochs,),), _ = trained(tmp_path / "noted", settings)
    monkeypatch.setattr("gradsift.proxy.trajectory.Trajectory", Blind)
    ((*blind,),), _ = trained(tmp_path / "blind", settings)
    for one, other in zip(epochs, blind, strict=True):
        names = set(one.manifest["files"]) - {TRAJECTORY_FILE}
        assert names == set(other.manifest["files"]) and len(names) > 2
        assert all(one.file(name).read_bytes() == other.file(name).read_bytes() for name in names)


def test_the_epochs_of_a_member_make_one_way_from_zero(tmp_path: Path) -> None:
    (chain, _), _ = trained(tmp_path, config("lora_seeds", members=2))
    steps, points = zip(*(read_trajectory(epoch.path) for epoch in chain), strict=True)
    taken = [epoch.info["optimizer_steps"] for epoch in chain]
    assert steps[0].tolist() == list(range(taken[0] + 1)) and not points[0][0].any()
    assert steps[1].tolist() == [taken[0] + step for step in range(1, taken[1] + 1)]
    assert points[0].shape == (len(steps[0]), DIMENSIONS) and np.isfinite(np.concatenate(points)).all()
    assert not np.array_equal(points[0][-1], points[1][-1])


@pytest.mark.parametrize(("steps", "first", "expected"), [(3, 0, 4), (16, 0, 17), (1000, 0, 17), (1000, 1000, 16)])
def test_points_lie_at_even_distances_and_the_last_at_the_end(steps: int, first: int, expected: int) -> None:
    at, points = noted(steps, first)
    assert len(at) == len(points) == expected <= POINTS + 1
    assert at[-1] == first + steps
    assert np.ptp(np.diff(at)) <= 1 or steps < POINTS


@pytest.mark.parametrize("stop_at", [1, 3, 20, 39, 40])
def test_a_training_that_goes_on_from_a_saved_state_notes_the_same(stop_at: int) -> None:
    whole, resumed = noted(40), noted(40, stop_at=stop_at)
    assert whole[0] == resumed[0] and torch.equal(whole[1], resumed[1])


def test_distances_between_updates_are_kept() -> None:
    """Mean over pairs of updates, which the callback never forms, within the error of 64 dimensions."""
    model = adapted()
    exact, projected = [], []
    for step in range(1, 13):
        move(model, step)
        trajectory = Trajectory(0, 1, Path())
        trajectory.on_train_start(None, SimpleNamespace(model=model))
        projected.append(trajectory.state_dict()["points"][0])
        layers = [layer for _, layer in lora.lora_layers(model)]
        exact.append(torch.cat([(la.lora_B[ADAPTER].weight @ la.lora_A[ADAPTER].weight).flatten() for la in layers]))
    first, second = np.triu_indices(12, k=1)
    ratios = [
        float((projected[i] - projected[j]).norm() / (exact[i] - exact[j]).norm())
        for i, j in zip(first, second, strict=True)
    ]
    assert np.mean(ratios) == pytest.approx(1, abs=0.15)
    assert np.std(ratios) < 0.25  # .6 in a single dimension


def test_a_member_that_was_interrupted_has_the_trajectory_of_one_that_was_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second step of the first epoch fails once; the same command continues after the first."""
    settings = config("lora_seeds", members=1, batch_size=2)
    (whole,), _ = trained(tmp_path / "whole", settings)
    seen, steps = Trajectory.on_train_batch_end, iter(range(100))

    def stop(self: Trajectory, *arguments: Any) -> None:
        seen(self, *arguments)
        if next(steps) == 1:
            raise KeyboardInterrupt

    run = replace(runtime(tmp_path / "resumed"), compute=ComputeConfig(device="cpu", save_every=0))
    ensemble = given(run, settings)
    monkeypatch.setattr(Trajectory, "on_train_batch_end", stop)
    with pytest.raises(KeyboardInterrupt):
        train_adapters(ensemble)
    (resumed,) = train_adapters(ensemble)
    assert resumed[0].info["resumed_steps"] == 1
    for one, other in zip(whole, resumed, strict=True):
        assert one.file(TRAJECTORY_FILE).read_bytes() == other.file(TRAJECTORY_FILE).read_bytes()
