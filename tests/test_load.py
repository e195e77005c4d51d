"""Laws of the load stage: nothing is lost from file to selection, and artifacts are found by content, not by path."""

from __future__ import annotations

import gzip
import io
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from gradsift.artifacts import Artifact, Store
from gradsift.config import COPIES, ComputeConfig, FieldsConfig, JsonDataConfig, VerifiableDataConfig
from gradsift.data.load import heldout_of, labels_of, load, pool_of
from gradsift.data.verifiable import DUPLICATES, SPOILT, answers_match, generate, task_of
from gradsift.errors import ConfigError, DataError
from gradsift.evaluation.stages.answers import embedded_items
from gradsift.runtime import Display, Runtime

ROWS: list[Any] = [
    {"instruction": "Name a colour.", "input": "", "output": "red 🟥", "source": {"id": 7, "tags": ["a", None]}},
    {"instruction": "Name a colour.", "input": "", "output": "red 🟥", "source": "again"},  # 1: an exact duplicate
    {"instruction": "No answer", "input": "", "output": "   "},
    {"instruction": "قل مرحبا", "input": "a\nb", "output": "שלום", "score": 0.5},
    "no object",
    {"instruction": "A number for an answer", "output": 12},
    {"instruction": "A NUL", "output": "a\0b"},
    *({"instruction": f"Say {i}.", "output": f"{i} it is", "number": i} for i in range(20)),
]
REJECTED = [2, 4, 5, 6]


def runtime(store: Path) -> Runtime:
    return Runtime(Store(store, say=lambda line: None), ComputeConfig(), Display(Console(file=io.StringIO())), seed=0)


def write(path: Path, rows: list[Any] = ROWS) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(rows) if ".json" in path.suffixes else "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def loaded(tmp_path: Path, path: Path, **changes: Any) -> Artifact:
    return load(runtime(tmp_path / "store"), JsonDataConfig(name="json", path=str(path), **changes))


def counts(info: Mapping[str, Any]) -> tuple[int, ...]:
    return tuple(info[name] for name in ("rows", "accepted", "heldout", "rejected"))


def ids(examples: Any) -> list[str]:
    return [example.example_id for example in examples]


# -------------------------------------------------------------------------------------------- json


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.json.gz"])
def test_every_row_is_either_an_example_or_rejected_with_a_reason(name: str, tmp_path: Path) -> None:
    artifact = loaded(tmp_path, write(tmp_path / name))
    pool = pool_of(artifact)
    rejected = [json.loads(line) for line in artifact.file("rejected.jsonl").read_text().splitlines()]
    assert [row["row"] for row in rejected] == REJECTED
    assert all(row["reason"] for row in rejected)
    assert "empty" in rejected[0]["reason"]
    assert "NUL" in rejected[3]["reason"]
    assert [example.row_index for example in pool] == [i for i in range(len(ROWS)) if i not in REJECTED]
    assert [example.original for example in pool] == [ROWS[example.row_index] for example in pool]
    assert counts(artifact.info) == (23, 23, 0, 4)
    assert heldout_of(artifact) == []
    assert labels_of(artifact) is None
    if name == "rows.jsonl":
        assert [row["line"] for row in rejected] == [row + 1 for row in REJECTED]


def test_example_ids_are_unique_and_duplicates_share_their_content_hash(tmp_path: Path) -> None:
    pool = pool_of(loaded(tmp_path, write(tmp_path / "a.json")))
    assert len(set(ids(pool))) == len(pool)
    first, second = pool[:2]
    assert first.content_hash == second.content_hash
    assert (first.example_id, second.example_id) == (f"{first.content_hash}-0", f"{first.content_hash}-1")


def test_limit_and_holdout_draw_disjoint_rows_in_the_order_of_the_file(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json")
    artifact = loaded(tmp_path, path, limit=8, holdout=5)
    pool, held = pool_of(artifact), heldout_of(artifact)
    assert (len(pool), len(held)) == (8, 5)
    assert counts(artifact.info) == (8, 23, 5, 4)
    assert not set(ids(pool)) & set(ids(held))
    for examples in (pool, held):
        rows = [example.row_index for example in examples]
        assert rows == sorted(rows)
    larger = loaded(tmp_path, path, limit=12, holdout=5)
    assert heldout_of(larger) == held  # the held-out rows do not depend on the limit
    assert set(ids(pool)) < set(ids(pool_of(larger)))
    other = loaded(tmp_path, path, limit=8, holdout=5, seed=1)
    assert ids(pool_of(other)) != ids(pool)


def test_a_holdout_that_leaves_nothing_is_refused_and_leaves_no_artifact(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json")
    for holdout in (23, 24):
        with pytest.raises(ConfigError, match=f"data.holdout={holdout}"):
            loaded(tmp_path, path, holdout=holdout)
    assert not list(tmp_path.glob("store/load/*/manifest.json"))


def test_other_names_of_the_columns(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", [{"q": "Say a.", "context": "b", "a": "a it is"}])
    fields = FieldsConfig(instruction="q", input="context", output="a")
    (example,) = pool_of(loaded(tmp_path, path, fields=fields))
    assert (example.instruction, example.input, example.output) == ("Say a.", "b", "a it is")
    assert example.original == {"q": "Say a.", "context": "b", "a": "a it is"}


@pytest.mark.parametrize(("name", "reason"), [("nowhere.json", "does not exist"), (".", "is a folder")])
def test_a_path_that_is_no_file_is_refused(name: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=reason):
        loaded(tmp_path, tmp_path / name)


def test_a_broken_file_leaves_no_artifact_and_a_mended_one_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"instruction": "a", "output": "b"}\n{"instruction": "c", "out')
    with pytest.raises(DataError, match="line 2"):
        loaded(tmp_path, path)
    assert not list(tmp_path.glob("store/load/*/manifest.json"))
    path.write_text('{"instruction": "a", "output": "b"}\n{"instruction": "c", "output": "d"}\n')
    assert [example.output for example in pool_of(loaded(tmp_path, path))] == ["b", "d"]


# ------------------------------------------------------------------------------------- fingerprint


def test_the_fingerprint_follows_the_content_and_not_the_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = loaded(tmp_path, write(tmp_path / "a.json"))
    assert loaded(tmp_path, write(tmp_path / "elsewhere" / "b.json")).path == here.path
    monkeypatch.chdir(tmp_path)
    assert loaded(tmp_path, Path("a.json")).path == here.path
    monkeypatch.setenv("HOME", str(tmp_path))
    assert loaded(tmp_path, Path("~/a.json")).path == here.path
    changed = [*ROWS[:-1], {**ROWS[-1], "number": 20}]  # a column that no stage reads
    assert loaded(tmp_path, write(tmp_path / "a.json", changed)).fingerprint != here.fingerprint


@pytest.mark.parametrize(
    "change",
    [{"limit": 9}, {"holdout": 3}, {"seed": 1}, {"format": "alpaca"}, {"fields": FieldsConfig(input="number")}],
)
def test_every_option_that_changes_the_rows_is_in_the_fingerprint(change: dict[str, Any], tmp_path: Path) -> None:
    path = write(tmp_path / "a.json")
    assert loaded(tmp_path, path).fingerprint != loaded(tmp_path, path, **change).fingerprint


def test_a_dot_in_the_name_of_a_file_is_no_other_content(tmp_path: Path) -> None:
    first, second = (loaded(tmp_path, write(tmp_path / name)) for name in ("rows.v1.json", "rows.v2.json"))
    assert first.fingerprint == second.fingerprint


# --------------------------------------------------------------------------------------- selection


def select_all(gradsift: Any, rows: list[Any]) -> list[dict[str, Any]]:
    """Return the rows of `selection.jsonl` when every row is selected at random."""
    path = write(gradsift.folder / "rows.json", rows)
    foreign = ("data=json", f"data.path={path}", "tracker=none", "scorer=random", "stop_after=selection", "proxy=gpt2")
    assert gradsift(*foreign, "alpha=1.0") == 0
    (selection,) = gradsift.folder.glob("outputs/*/*/selection.jsonl")
    return [json.loads(line) for line in selection.read_text(encoding="utf-8").splitlines()]


def test_the_selection_holds_every_original_column(gradsift) -> None:
    selected = select_all(gradsift, ROWS)
    assert len(selected) == 23
    by_row = {row["gradsift"]["row_index"]: row for row in selected}
    for index, row in by_row.items():
        own = row.pop("gradsift")
        assert row == ROWS[index]
        assert set(own) == {"rank", "score", "example_id", "row_index"}
    (run,) = gradsift.runs()
    assert counts(run["data"]) == (23, 23, 0, 4)
    rejected = Path(run["files"]["rejected rows"])
    rejected = rejected if rejected.is_absolute() else gradsift.folder / rejected
    assert len(rejected.read_text().splitlines()) == 4


def test_a_column_that_utf_8_cannot_hold_comes_through(gradsift) -> None:
    rows = [{"instruction": "a", "output": "b", "raw": "cut \ud83d"}, {"instruction": "c", "output": "d", "raw": ""}]
    assert {row["raw"] for row in select_all(gradsift, rows)} == {"cut \ud83d", ""}


def test_datasets_reads_the_selection_in_one_line(gradsift, tmp_path: Path) -> None:
    from datasets import load_dataset

    rows = [{"instruction": f"Say {n}.", "input": "", "output": f"{n}", "meta": {"id": n}} for n in range(4)]
    selected = select_all(gradsift, rows)
    (file,) = gradsift.folder.glob("outputs/*/*/selection.jsonl")
    read = load_dataset("json", data_files=str(file), split="train", cache_dir=str(tmp_path / "cache"))
    assert read.to_list() == selected and len(selected) == 4


# ----------------------------------------------------------------------------------------- the world


def world(tmp_path: Path, **changes: Any) -> Artifact:
    config = VerifiableDataConfig(**({"name": "verifiable", "size": 300, "benchmark_items": 40} | changes))
    return load(runtime(tmp_path), config)


@pytest.mark.parametrize("limit", [None, 1, 70, 299, 1000])
def test_labels_are_in_the_order_of_the_examples_for_any_limit(limit: int | None, tmp_path: Path) -> None:
    artifact = world(tmp_path, limit=limit)
    pool, labels = pool_of(artifact), labels_of(artifact)
    count = min(limit or 300, 300)
    assert labels is not None
    assert len(pool) == len(labels.quality) == len(labels.family) == artifact.info["rows"] == count
    truth = generate(size=300, benchmark_items=40, seed=0)
    for example, quality, family in zip(pool, labels.quality, labels.family, strict=True):
        right = task_of(example.instruction, example.input).answer
        assert task_of(example.instruction, example.input).question[0] == family
        assert quality in ("clean", *SPOILT, *DUPLICATES)
        assert answers_match(example.output, right) is (quality not in SPOILT)
        label = truth.labels[example.row_index]
        lone = label.quality in COPIES and quality == "clean"  # the row it repeats is not in the pool
        assert (quality if lone else label.quality, label.family) == (quality, family)
        assert limit != 1000 or not lone


def test_the_worlds_examples_have_unique_ids_and_its_held_out_ones_are_right(tmp_path: Path) -> None:
    artifact = world(tmp_path)
    pool, held, items = pool_of(artifact), heldout_of(artifact), embedded_items(artifact)
    assert len(set(ids(pool))) == 300
    assert max(Counter(example.content_hash for example in pool).values()) > 1  # exact duplicates are there
    assert [(h.instruction, h.input, h.output) for h in held] == [(i.instruction, i.input, i.reference) for i in items]
    assert len(items) == artifact.info["heldout"] == 40
    prompts = {(example.instruction, example.input) for example in pool}
    assert not prompts & {(item.instruction, item.input) for item in items}


@pytest.mark.parametrize(
    "change", [{"size": 299}, {"spoilt": 0.4}, {"duplicates": 0.1}, {"benchmark_items": 41}, {"seed": 1}, {"limit": 50}]
)
def test_another_world_is_another_artifact(change: dict[str, Any], tmp_path: Path) -> None:
    assert world(tmp_path).fingerprint != world(tmp_path, **change).fingerprint


def test_a_holdout_of_the_world_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.holdout"):  # its benchmark is the held-out set
        world(tmp_path, holdout=10)
