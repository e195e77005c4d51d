"""Laws of the cost counters: forward tokens are the real tokens (no padding) that pass through models."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SMOKE

from gradsift.artifacts import Store
from gradsift.cost import counting, passed, work_of
from gradsift.data.tokens import Encoded
from gradsift.report.run_tables import WORK_FILE, work_table
from gradsift.training.device import TokenBudget
from gradsift.training.nano import CONTEXT

SMALL_FEATURES = ("target_set=verifiable", "target_set.limit=2", "features.warmup.epochs=2", "features.dimensions=32")


def counts(run: dict[str, Any], name: str) -> list[int]:
    return [stage["forward_tokens"] for stage in run["stages"] if stage["name"] == name and not stage["reused"]]


@contextmanager
def seen_by_models() -> Iterator[list[int]]:
    """Yield a list to which each token embedding in this process appends its number of input tokens, with padding."""
    seen: list[int] = []

    def note(module: torch.nn.Module, given: Any) -> None:
        of_tokens = isinstance(module, torch.nn.Embedding) and module.num_embeddings > CONTEXT
        if of_tokens and given[0].shape != (2, 7):  # the check of an output head
            seen.append(given[0].numel())

    handle = torch.nn.modules.module.register_module_forward_pre_hook(note)
    try:
        yield seen
    finally:
        handle.remove()


def test_the_innermost_unit_counts_what_passes() -> None:
    passed(5)  # for nobody
    with counting() as outer:
        passed(1)
        with counting() as inner:
            passed(10)
        passed(2)
        assert (outer(), inner()) == (3, 10)
    assert (outer(), inner()) == (3, 10)


def test_a_unit_reports_its_tokens_once(tmp_path: Path) -> None:
    store = Store(tmp_path, say=lambda line: None)

    def make(folder: Path) -> dict[str, int]:
        passed(7)
        return {"rows": 1, "optimizer_steps": 2}

    for _ in range(2):
        store.obtain("stage", "slug", {}, [], make, version=1)
    again = Store(tmp_path, say=lambda line: None)
    assert again.obtain("stage", "slug", {}, [], make, version=1).info["forward_tokens"] == 7
    (made,), (reused,) = store.records_as_dicts(), again.records_as_dicts()
    assert [made[name] for name in ("forward_tokens", "optimizer_steps", "saved_tokens", "saved_steps")] == [7, 2, 0, 0]
    assert [reused[n] for n in ("forward_tokens", "optimizer_steps", "saved_tokens", "saved_steps")] == [0, 0, 7, 2]


@pytest.mark.parametrize(
    ("arguments", "stages"),
    [
        (("scorer=late_loss", "proxy.members=1"), "member finetune generate heldout"),
        (("scorer=superfilter", "stop_after=scores"), "score"),
        (("scorer=contrast", "scorer.neighbours=20", "stop_after=scores"), "member losses"),
        pytest.param(("scorer=perplexity", "stop_after=scores"), "score", marks=pytest.mark.slow),
        pytest.param(("scorer=gsnr_direction", "stop_after=scores"), "member direction", marks=pytest.mark.slow),
        pytest.param(("method=grads", "stop_after=scores"), "member embedding_gradients", marks=pytest.mark.slow),
        (("method=less", *SMALL_FEATURES, "stop_after=scores"), "warmup features"),
        (("method=rds_plus", "target_set=verifiable", "stop_after=scores"), "embeddings"),
        pytest.param(
            ("proxy.ensemble=mc_dropout", "proxy.lora.dropout=0.1", "stop_after=scores"),
            "member norms",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_reported_tokens_are_those_the_models_see(
    gradsift, monkeypatch, arguments: tuple[str, ...], stages: str
) -> None:
    """Every batch has one example, so there is no padding."""
    monkeypatch.setattr("gradsift.scoring.superfilter._BATCH_TOKENS", {"cpu": 1})
    for module in ("gradsift.inputs", "gradsift.training.target"):  # a trial's tokens are no work on the data
        monkeypatch.setattr(f"{module}.require_adaptable", lambda *given, **options: None)
    small = (
        "data.size=40",
        "compute.tokens=1",
        "benchmark.batch_size=1",
        "benchmark.limit=4",
        "data.benchmark_items=13",
        "target.batch_size=4",
    )
    with seen_by_models() as seen:
        assert gradsift(*SMOKE, *small, *arguments) == 0
    (run,) = gradsift.runs()
    assert sum(seen) == run["work"]["forward_tokens"] > 0
    for name in stages.split():
        assert min(counts(run, name)) > 0


@pytest.mark.parametrize("tokens", [1, 10, 1000])
def test_neither_padding_nor_repeated_batches_count(tokens: int) -> None:
    lengths = (9, 3, 5, 1)
    encoded = [Encoded(row, row, np.zeros(n, dtype=np.int32), np.ones(n, dtype=bool)) for row, n in enumerate(lengths)]
    failing = [MemoryError()] if tokens == 1000 else []  # once; where one example is a batch there is no smaller one

    def work(batch: list[Encoded]) -> None:
        if failing:
            raise failing.pop()

    with counting() as count:
        list(TokenBudget(tokens, lambda line: None).passes(encoded, work))
    assert count() == sum(lengths)


@pytest.mark.slow
def test_a_sweep_counts_every_unit_where_it_was_made(gradsift, capsys) -> None:
    """A sweep makes members, statistics and scores once each; a repeated sweep makes nothing."""
    sweep = ("-m", *SMOKE, "data.size=64", "scorer=gsnr,random", "proxy.members=2,3")
    sweep += ("proxy.snapshots=[1,2],[1,3]", "stop_after=selection")
    assert gradsift(*sweep) == 0
    runs = gradsift.runs()
    assert len(runs) == 8
    by_stage = {row["stage"]: row for row in work_table(runs).records}
    made = {name: work["made"] for name, work in by_stage.items()}
    assert made["member"] == 3 * 3  # members of the larger ensemble, epochs up to the latest snapshot
    assert by_stage["member"]["optimizer_steps"] == 9 * 2  # 64 rows in batches of 32
    assert made["norms"] == 3 * 3
    assert made["statistics"] == 2 * 2
    assert made["score"] == 2 * 2 + 1  # gsnr for each M and pair of snapshots, random once
    assert made["select"] == 5
    assert by_stage["all"]["optimizer_steps"] == sum(w["optimizer_steps"] for n, w in by_stage.items() if n != "all")
    fingerprints = [stage["fingerprint"] for run in runs for stage in run["stages"] if not stage["reused"]]
    assert len(set(fingerprints)) == len(fingerprints)
    (file,) = gradsift.folder.glob(f"multirun/*/*/{WORK_FILE}")
    with file.open(newline="") as stream:
        rows = {row.pop("stage"): row for row in csv.DictReader(stream)}
    assert rows["member"]["made"] == "9"
    out = capsys.readouterr().out
    assert "Work by stage" in out
    assert f", {work_of(runs[-1]['stages'])['reused']} reused" in out

    assert gradsift(*sweep) == 0
    again = work_table(gradsift.runs()[8:]).records[-1]
    assert (again["made"], again["optimizer_steps"], again["forward_tokens"]) == (0, 0, 0)
    assert again["saved_tokens"] > by_stage["all"]["forward_tokens"]
