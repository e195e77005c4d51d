"""Laws from end to end: the scores on disk are the paper's formula of the norms on disk, and the selection is theirs.

One small run is shared; every law recomputes its part from the files alone, in float64 and the obvious way.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from conftest import SMOKE, Cli, cli_on_one_thread

from gradsift.composition import conf_folder
from gradsift.config import GsnrConfig, LoraConfig, ModelConfig, ProxyConfig, TargetConfig

pytestmark = [pytest.mark.numerics, pytest.mark.usefixtures("one_thread")]

EARLY, LATE = 1, 3
SMALL = (*SMOKE, "data.size=80", "proxy.members=3", f"proxy.snapshots=[{EARLY},{LATE}]", "stop_after=selection")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, backbones: Path) -> Iterator[Cli]:
    """The command line in a folder whose store keeps the ensemble for the next test."""
    with cli_on_one_thread(tmp_path_factory.mktemp("laws"), backbones) as run:
        yield run


def stage_folders(run: dict[str, Any], stage: str) -> list[Path]:
    return [Path(entry["artifact"]) for entry in run["stages"] if entry["name"] == stage]


def norms_on_disk(run: dict[str, Any], epoch: int) -> np.ndarray:
    """(M, N) norms of all members after an epoch, by row."""
    folders = sorted(folder for folder in stage_folders(run, "norms") if f"-e{epoch}-" in folder.name)
    members = []
    for folder in folders:
        table = pq.read_table(folder / "gradient_norms.parquet").to_pydict()
        columns = [np.array(table[name], dtype=np.float64) for name in ("norm_A", "norm_B")]
        norms = np.full(1 + max(table["row"]), np.nan)
        norms[table["row"]] = np.sqrt(columns[0] ** 2 + columns[1] ** 2)
        members.append(norms)
    return np.array(members)


def eq_5(early: np.ndarray, late: np.ndarray, eps: float) -> np.ndarray:
    """Eq. 5 of arXiv 2601.13697: (G_s - G_t) / (G_s + eps) x 1 / (V_t + eps)."""
    g_s, g_t = early.mean(0), late.mean(0)
    v_t = ((late - g_t) ** 2).mean(0)
    return (g_s - g_t) / (g_s + eps) / (v_t + eps)


def scores_on_disk(run: dict[str, Any]) -> dict[str, list[Any]]:
    (folder,) = stage_folders(run, "score")
    table: dict[str, list[Any]] = pq.read_table(folder / "scores.parquet").to_pydict()
    return table


ABLATIONS: dict[str, Callable[[np.ndarray, np.ndarray, float], np.ndarray]] = {  # of the paper's Table 2
    "gsnr": eq_5,
    "gsnr_raw_drop": lambda early, late, eps: early.mean(0) - late.mean(0),
    "gsnr_normalized_drop": lambda early, late, eps: (early.mean(0) - late.mean(0)) / (early.mean(0) + eps),
    "gsnr_variance_normalized": lambda early, late, eps: (early.mean(0) - late.mean(0)) / (late.var(0) + eps),
}


def test_scores_are_eq_5_of_the_norm_files_with_g_s_early_and_g_t_and_v_t_late(small: Cli) -> None:
    for scorer, formula in ABLATIONS.items():
        assert small(*SMALL, f"scorer={scorer}", "alpha=0.1") == 0
        run = small.runs()[-1]
        early, late = norms_on_disk(run, EARLY), norms_on_disk(run, LATE)
        assert early.shape == late.shape
        assert len(early) == 3
        expected = formula(early, late, GsnrConfig().eps)
        scores = np.array(scores_on_disk(run)["score"], dtype=np.float64)
        known = ~np.isnan(expected)
        np.testing.assert_allclose(scores[known], expected[known], rtol=1e-9)
        swapped = formula(late, early, GsnrConfig().eps)
        assert not np.allclose(scores[known], swapped[known], rtol=0.01)  # or the law could not tell the epochs apart


def test_the_selection_is_the_highest_alpha_of_the_scores_on_disk(small: Cli) -> None:
    for alpha in ("0.05", "0.29", "0.5"):
        assert small(*SMALL, "scorer=gsnr", f"alpha={alpha}") == 0
        run = small.runs()[-1]
        table = scores_on_disk(run)
        scored = [place for place, status in enumerate(table["status"]) if status == "scored"]
        ranked = sorted(scored, key=lambda place: (-table["score"][place], place))
        expected = [table["example_id"][place] for place in ranked[: math.floor(Fraction(alpha) * len(table["score"]))]]
        (file,) = sorted(small.folder.glob("outputs/*/*/selection.jsonl"))[-1:]
        lines = [json.loads(line)["gradsift"] for line in file.read_text(encoding="utf-8").splitlines()]
        assert [line["example_id"] for line in lines] == expected
        assert [line["rank"] for line in lines] == list(range(1, len(expected) + 1))


def yaml_of(name: str) -> dict[str, Any]:
    values: dict[str, Any] = yaml.safe_load((conf_folder() / f"{name}.yaml").read_text(encoding="utf-8"))
    return values


def test_the_proxys_hyperparameters_are_the_papers() -> None:
    """arXiv 2601.13697, experimental set-up: GPT-2, M = 5, T = 2, learning rate 5e-5, s = 1, t = 2."""
    gpt2 = yaml_of("proxy/gpt2")
    defaults = ProxyConfig(name="gpt2", model=ModelConfig(path="gpt2"))
    assert gpt2["model"]["path"].rsplit("/", 1)[-1] == "gpt2"
    assert not {"members", "snapshots", "epochs", "learning_rate", "schedule"} & set(
        gpt2
    )  # the defaults are the paper's
    assert (defaults.members, list(defaults.snapshots), defaults.total_epochs) == (5, [1, 2], 2)
    assert defaults.learning_rate == 5e-5
    assert (defaults.schedule, defaults.collect, defaults.norm_scope) == ("constant", "epoch_end", "all")


def test_the_targets_recipe_is_as_documented() -> None:
    """LoRA finetunes of LLaMA-2; the paper gives no rate: ours is QLoRA's. The rest is transformers' and Alpaca's."""
    target = TargetConfig(name="x", model=ModelConfig(path="x"), epochs=1)
    assert (target.learning_rate, target.batch_size, target.schedule) == (2e-4, 16, "linear")
    assert (target.loss, target.max_grad_norm, target.warmup_steps, target.warmup_ratio) == ("token", 1.0, 0, 0.0)
    assert (LoraConfig().rank, LoraConfig().alpha, LoraConfig().dropout) == (8, 16.0, 0.0)
    for name in ("llama2_7b", "llama2_13b"):
        values = yaml_of(f"target/{name}")
        assert "learning_rate" not in values, name
        recipe = {key: values[key] for key in ("epochs", "batch_size", "schedule", "warmup_ratio")}
        assert recipe == {"epochs": 3, "batch_size": 128, "schedule": "cosine", "warmup_ratio": 0.03}, name
