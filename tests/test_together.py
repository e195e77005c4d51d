"""Laws of members that train side by side: their artifacts are those of members trained alone."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exactness import assert_close_by_norm
from safetensors.numpy import load_file
from test_ensembles import config, inputs, parents
from test_finetuning import runtime
from test_norms import ragged_examples

from gradsift.artifacts import Artifact
from gradsift.config import ComputeConfig, LoraConfig, ProxyConfig
from gradsift.data.tokens import Encoded
from gradsift.gradients.statistics import NORMS_FILE, read_norms
from gradsift.proxy.ensemble import train_adapters
from gradsift.proxy.epochs import OPTIMIZER_FILE, Ensemble, ProxyInputs
from gradsift.proxy.trajectory import Trajectory
from gradsift.training import lora
from gradsift.training.device import TokenBudget
from gradsift.training.finetuning import steps_saved
from gradsift.training.optimization import TRAJECTORY_FILE, read_curve

pytestmark = [pytest.mark.numerics, pytest.mark.usefixtures("one_thread")]


def trained(
    store: Path,
    settings: ProxyConfig,
    encoded: list[Encoded] | None = None,
    dtype: torch.dtype = torch.float64,
    **compute: Any,
) -> tuple[list[list[Artifact]], list[str]]:
    """Return the adapters, as [adapter][epoch - 1], and the names of the members' epochs that were made."""
    run = replace(runtime(store), compute=ComputeConfig(device="cpu", **compute))
    roots = parents(run)

    def load() -> ProxyInputs:
        given = inputs(encoded or ragged_examples(10))
        given.backbone.model.to(dtype)
        return given._replace(budget=TokenBudget(run.compute.tokens or 4096))

    adapters = train_adapters(Ensemble(run, settings, *roots, load))
    records = [record for record in run.store.records if record.name == "member" and not record.reused]
    return adapters, sorted(Path(record.artifact).name[:5] for record in records)


def require_equal(computed: Artifact, expected: Artifact, ignored: Collection[str] = ()) -> None:
    """Assert that two epochs hold the same, up to the rounding of float64 (norms and losses: of float32)."""
    assert computed.path.name == expected.path.name
    assert computed.manifest["files"].keys() == expected.manifest["files"].keys()
    left_out = {"size_A", "size_B", *ignored}
    ours, theirs = ({k: v for k, v in each.info.items() if k not in left_out} for each in (computed, expected))
    assert ours == theirs
    for name in (lora.ADAPTER_FILE, OPTIMIZER_FILE, TRAJECTORY_FILE):
        ours, theirs = (load_file(each.file(name)) for each in (computed, expected))
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            assert np.allclose(ours[key], value, rtol=1e-6, atol=1e-6 * np.abs(value).max()), (name, key)
    assert np.allclose(losses(computed), losses(expected), rtol=1e-5)
    if (expected.path / NORMS_FILE).exists():
        ours, theirs = (read_norms([each]) for each in (computed, expected))
        assert all(np.allclose(ours[name], theirs[name], rtol=1e-5) for name in theirs)


def losses(epoch: Artifact) -> list[float]:
    return [entry["loss"] for entry in read_curve(epoch.path)]


@pytest.mark.parametrize(
    ("mode", "dropout", "collect"),
    [
        ("lora_seeds", 0.0, "during_training"),
        ("lora_seeds", 0.4, "during_training"),
        ("bootstrap", 0.4, "epoch_end"),
    ],
)
def test_members_side_by_side_are_members_alone(mode: str, dropout: float, collect: str, tmp_path: Path) -> None:
    """With other batches too: the token budget is another one."""
    settings = config(mode, members=3, schedule="linear", collect=collect)
    settings = replace(settings, lora=LoraConfig(rank=2, dropout=dropout))
    alone, _ = trained(tmp_path / "alone", settings)
    together, units = trained(tmp_path / "together", replace(settings, together=2), tokens=40)
    assert units == ["m0-e1", "m0-e2", "m1-e1", "m1-e2", "m2-e1", "m2-e2"]
    for one, other in zip(chain.from_iterable(alone), chain.from_iterable(together), strict=True):
        require_equal(other, one)


def test_in_float32_both_are_as_near_to_the_same_training_in_float64(tmp_path: Path) -> None:
    """Adam divides by a gradient's size, so the rounding of a tiny gradient is more than that of a weight."""
    settings = replace(config("lora_seeds", members=3), lora=LoraConfig(rank=2, dropout=0.4))
    exact, _ = trained(tmp_path / "exact", settings)
    alone, _ = trained(tmp_path / "alone", settings, dtype=torch.float32)
    together, _ = trained(tmp_path / "together", replace(settings, together=3), tokens=40, dtype=torch.float32)
    chains = (chain.from_iterable(adapters) for adapters in (exact, alone, together))
    for epochs in zip(*chains, strict=True):
        expected, *computed = (load_file(each.file(lora.ADAPTER_FILE)) for each in epochs)
        for weights in computed:
            for name, value in expected.items():
                assert_close_by_norm(weights[name], value.astype(np.float64), k=256, dtype=torch.float32)


class Stopped(Exception):
    pass


def test_interrupted_members_continue_from_different_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first of two members is interrupted alone, then both, and then both are trained to the end."""
    settings = replace(config("lora_seeds", members=2, batch_size=2), lora=LoraConfig(rank=2, dropout=0.4))
    alone, _ = trained(tmp_path / "alone", settings)
    noted = Trajectory.on_train_batch_end

    def stop_after(steps: int) -> Any:
        left = iter(range(steps))

        def note(self: Trajectory, *arguments: Any) -> None:
            noted(self, *arguments)
            if next(left, None) is None:
                raise Stopped

        return note

    for together, steps in ((1, 1), (2, 3)):
        with monkeypatch.context() as patch, pytest.raises(Stopped):
            patch.setattr(Trajectory, "on_train_batch_end", stop_after(steps))
            trained(tmp_path / "stopped", replace(settings, together=together), save_every=0)
    saved = [steps_saved(folder) for folder in sorted((tmp_path / "stopped" / "member").glob("*.part"))]
    assert saved == [3, 1]  # the second member's second step was not saved
    resumed, _ = trained(tmp_path / "stopped", replace(settings, together=2), save_every=0)
    assert [epochs[0].info["resumed_steps"] for epochs in resumed] == saved
    for one, other in zip(chain.from_iterable(alone), chain.from_iterable(resumed), strict=True):
        require_equal(other, one, ignored={"resumed_steps", "forward_tokens"})


def test_members_that_exist_are_not_trained_again(tmp_path: Path) -> None:
    settings = config("lora_seeds", members=4)
    (first,), _ = trained(tmp_path, replace(settings, members=1))
    chains, units = trained(tmp_path, replace(settings, together=3))
    assert units == ["m1-e1", "m1-e2", "m2-e1", "m2-e2", "m3-e1", "m3-e2"]
    assert [epoch.path for epoch in chains[0]] == [epoch.path for epoch in first]
    seconds = [chains[member][0].manifest["seconds"] for member in (1, 2)]
    assert seconds[0] == seconds[1] > 0  # half of what the two took
    assert trained(tmp_path, replace(settings, together=2))[1] == []
