"""A sweep that is killed several times ends with the same bytes as an undisturbed sweep (`benchmarks/soak.py`)."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import SMOKE

from benchmarks.soak import Forked, soak
from gradsift.manifests import UNFINISHED

ONE_RUN = (
    *(*SMOKE, "data.size=60", "data.benchmark_items=13", "proxy.batch_size=4", "proxy.lora.dropout=0.1"),
    *("target.steps=8", "target.lora.dropout=0.1"),
)


@pytest.mark.slow  # `.ci/run` runs it
def test_kills_within_an_epoch_and_the_judging_change_no_byte(tmp_path: Path) -> None:
    outcome = soak(tmp_path, 2, 0, ONE_RUN, ("member", "judge"), Forked)
    assert len(outcome.hits) == 2
    assert outcome.hits[1].at["judge/replies"] > 0
    assert outcome.differing == []
    assert outcome.files > 20
    assert not list(tmp_path.rglob(UNFINISHED))


@pytest.mark.slow
def test_twenty_kills_of_a_sweep_change_no_byte(tmp_path: Path) -> None:
    outcome = soak(tmp_path, 20, 0, start=Forked)
    assert len(outcome.hits) == 20
    assert outcome.twice_in_one_epoch()
    assert outcome.differing == []


def test_the_comparison_sees_one_byte_and_one_file(tmp_path: Path) -> None:
    from benchmarks.soak import compare

    for store in ("whole", "killed"):
        (tmp_path / store / "member" / "m0").mkdir(parents=True)
        (tmp_path / store / "member" / "m0" / "adapter").write_bytes(b"abc")
    assert compare(tmp_path / "whole", tmp_path / "killed") == (1, [])
    (tmp_path / "killed" / "member" / "m0" / "adapter").write_bytes(b"abd")
    (tmp_path / "whole" / "member" / "m0" / "curve").write_bytes(b"")
    assert compare(tmp_path / "whole", tmp_path / "killed") == (2, ["member/m0/adapter", "member/m0/curve"])
