"""Laws of `data=mixture`: shares, the source of each row, and unique ids over the sources."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from conftest import Cli
from test_load import runtime

from gradsift.artifacts import Artifact
from gradsift.config import CorruptionConfig, MixtureDataConfig, SourceConfig
from gradsift.data.load import heldout_of, load, pool_of
from gradsift.errors import ConfigError, DataError
from gradsift.report.notes import remarks

RIVERS = [{"instruction": f"Name river {number}.", "output": f"River {number}."} for number in range(30)]
TALKS = [
    {"messages": [{"role": "user", "content": f"Hill {n}?"}, {"role": "assistant", "content": "Yes."}]}
    for n in range(10)
]


def written(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def mixed(folder: Path, rivers: float | None = None, talks: float | None = None, **changes: Any) -> Artifact:
    sources = {
        "rivers": SourceConfig(path=written(folder / "rivers.jsonl", RIVERS), weight=rivers),
        "talks": SourceConfig(path=written(folder / "talks.jsonl", [*TALKS, {"messages": []}]), weight=talks),
    }
    return load(runtime(folder), MixtureDataConfig(**({"name": "mixture", "sources": sources} | changes)))


def counts(artifact: Artifact) -> dict[str, int]:
    pool = pool_of(artifact)
    found = dict(Counter(example.original["source"] for example in pool))
    assert artifact.info["sources"] == found
    assert all(("messages" in example.original) == (example.original["source"] == "talks") for example in pool)
    return found


def test_without_weights_every_row_of_every_source_is_there(tmp_path: Path) -> None:
    artifact = mixed(tmp_path)
    assert counts(artifact) == {"rivers": 30, "talks": 10}
    assert [example.row_index for example in pool_of(artifact)] == list(range(40))
    (line,) = artifact.file("rejected.jsonl").read_text().splitlines()
    rejected = json.loads(line)
    assert rejected["row"] == 40 and rejected["reason"].startswith("talks: ")


@pytest.mark.parametrize(
    ("weights", "limit", "expected"),
    [
        ((1, 1), None, {"rivers": 10, "talks": 10}),
        ((3, 1), None, {"rivers": 30, "talks": 10}),
        ((1, 2), None, {"rivers": 5, "talks": 10}),
        ((0.75, 0.25), 8, {"rivers": 6, "talks": 2}),
        ((1, 1), 7, {"rivers": 4, "talks": 3}),
    ],
)
def test_shares_follow_the_weights(weights: Any, limit: int | None, expected: Any, tmp_path: Path) -> None:
    assert counts(mixed(tmp_path, *weights, limit=limit)) == expected


def test_rows_are_held_out_from_every_source(tmp_path: Path) -> None:
    artifact = mixed(tmp_path, 1, 1, limit=10, holdout=6)
    assert artifact.info["rows"] == 10 and len(heldout_of(artifact)) == 6
    assert sum(counts(artifact).values()) == 10


def test_equal_rows_of_two_sources_have_different_ids(tmp_path: Path) -> None:
    same = (
        SourceConfig(path=written(tmp_path / "a.jsonl", RIVERS)),
        SourceConfig(path=written(tmp_path / "b.jsonl", RIVERS)),
    )
    pool = pool_of(mixed(tmp_path, sources=dict(zip("ab", same, strict=True))))
    assert len({example.example_id for example in pool}) == 60
    assert len({example.content_hash for example in pool}) == 30


def test_what_changes_the_rows_changes_the_artifact(tmp_path: Path) -> None:
    first = mixed(tmp_path, 1, 1)
    assert mixed(tmp_path, 1, 1).fingerprint == first.fingerprint
    assert mixed(tmp_path, 1, 2).fingerprint != first.fingerprint
    RIVERS[0]["output"] += " "
    try:
        assert mixed(tmp_path, 1, 1).fingerprint != first.fingerprint
    finally:
        RIVERS[0]["output"] = RIVERS[0]["output"][:-1]
    assert mixed(tmp_path, corruption=CorruptionConfig(share=0.2)).info["corrupted"]


def test_a_mixture_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.sources\.talks has 10, enough for 20 in these shares"):
        mixed(tmp_path, 1, 1, limit=21)
    with pytest.raises(ConfigError, match=r"data\.sources\.talks\.weight is not set"):
        mixed(tmp_path, 1)
    with pytest.raises(ConfigError, match=r"data\.sources=\{\} names no sources"):
        MixtureDataConfig(name="mixture", sources={})
    with pytest.raises(ConfigError, match=r"data\.sources\.a: .*'pth'.*give a source as in"):
        MixtureDataConfig(name="mixture", sources={"a": {"pth": "x"}})
    with pytest.raises(ConfigError, match="path=None and id=None; give one of the two"):
        SourceConfig()
    missing = {"a": SourceConfig(path=str(tmp_path / "missing.jsonl"))}
    with pytest.raises(DataError, match=r"data\.sources\.a\.path=.*missing\.jsonl does not exist"):
        mixed(tmp_path, sources=missing)
    with pytest.raises(ConfigError, match=r"data\.sources\.NAME\.id=a/b/c is no name of a hub dataset"):
        SourceConfig(id="a/b/c")
    with pytest.raises(ConfigError, match="give one of the two"):
        SourceConfig(path="a", id="b")
    taken = SourceConfig(path=written(tmp_path / "c.jsonl", [row | {"source": "x"} for row in RIVERS]))
    with pytest.raises(DataError, match=r"already has a column 'source'.*data\.source_column"):
        mixed(tmp_path, sources={"c": taken})
    pool = pool_of(mixed(tmp_path, sources={"c": taken}, source_column="from_file"))
    assert {(example.original["source"], example.original["from_file"]) for example in pool} == {("x", "c")}


def test_a_run_with_quotas_counts_the_selected_rows_of_each_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    gradsift = Cli(tmp_path, monkeypatch)
    written(tmp_path / "rivers.jsonl", RIVERS)
    written(tmp_path / "talks.jsonl", TALKS)
    sources = "data.sources={rivers: {path: rivers.jsonl, weight: 3}, talks: {path: talks.jsonl, weight: 1}}"
    shares = ("selector=quotas", "selector.shares={rivers: 1, talks: 4}", "alpha=0.25")
    options = ("tracker=none", "scorer=random", "stop_after=selection", "proxy=gpt2", "report=false")
    assert gradsift("data=mixture", sources, *shares, *options) == 0
    (folder,) = tmp_path.glob("outputs/*/*/run.json")
    run = json.loads(folder.read_text(encoding="utf-8"))
    assert run["selection"]["sources"] == {"rivers": 2, "talks": 8}
    lines = folder.with_name("selection.jsonl").read_text(encoding="utf-8").splitlines()
    assert Counter(json.loads(line)["source"] for line in lines) == {"rivers": 2, "talks": 8}
    assert run["diagnostics"]["quotas"]["verdict"] == "ok"
    assert "selected rows by source: rivers 2 of 30, talks 8 of 10" in remarks(run)
