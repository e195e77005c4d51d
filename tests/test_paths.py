"""Laws of `data.path`: each way to name files gives the same rows, in order, and names no file twice."""

from __future__ import annotations

import gzip
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest

from gradsift.data import files
from gradsift.data.files import files_of, read_files
from gradsift.errors import DataError

ROWS = [{"instruction": f"Name river {number}.", "output": f"River {number}, \u00e4."} for number in range(7)]


def lines(rows: list[dict[str, str]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def write(path: Path, rows: list[dict[str, str]]) -> Path:
    """Write rows in the format that the name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".arrow":
        table = pa.Table.from_pylist(rows)
        with pa.ipc.new_stream(str(path), table.schema) as stream:
            stream.write_table(table)
    elif path.suffix == ".zst":
        with pa.CompressedOutputStream(str(path), "zstd") as stream:
            stream.write(lines(rows))
    else:
        path.write_bytes(gzip.compress(lines(rows)) if path.suffix == ".gz" else lines(rows))
    return path


def read(given: str | list[str], folder: Path) -> list[Any]:
    rows = list(read_files(files_of(given, folder / "downloads")))
    assert [row.row for row in rows] == list(range(len(rows)))
    return [row.content for row in rows]


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst", ".json.zst", ".parquet", ".arrow"])
def test_a_file_a_list_a_pattern_and_a_folder_give_the_same_rows(suffix: str, tmp_path: Path) -> None:
    one = write(tmp_path / f"one{suffix}", ROWS)
    shards = [write(tmp_path / "shards" / f"part-{n}{suffix}", ROWS[2 * n : 2 * n + 2]) for n in range(4)]
    (tmp_path / "shards" / "README.md").write_text("about")
    (tmp_path / "shards" / f".hidden{suffix}").write_text("broken")
    for given in (str(one), list(map(str, shards)), f"{tmp_path}/shards/part*{suffix}", str(tmp_path / "shards")):
        assert read(given, tmp_path) == ROWS


def test_patterns_of_the_current_folder_and_names_that_look_like_patterns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a" / "b" / "rows[1].jsonl", ROWS)
    assert read("**/*.jsonl", tmp_path) == ROWS
    assert read("a/b/rows[1].jsonl", tmp_path) == ROWS


def test_a_folder_of_save_to_disk_and_one_of_its_splits(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict, disable_progress_bars

    disable_progress_bars()
    dataset = Dataset.from_list(ROWS)
    dataset.save_to_disk(tmp_path / "saved", num_shards=3)
    assert read(str(tmp_path / "saved"), tmp_path) == ROWS
    DatasetDict({"train": dataset, "test": dataset}).save_to_disk(tmp_path / "splits")
    assert read(str(tmp_path / "splits" / "train"), tmp_path) == ROWS
    with pytest.raises(DataError, match="holds several splits; name the folder of one: test, train"):
        read(str(tmp_path / "splits"), tmp_path)


def test_arrow_files_of_the_file_format(tmp_path: Path) -> None:
    pyarrow.feather.write_feather(pa.Table.from_pylist(ROWS), tmp_path / "rows.arrow", compression="uncompressed")
    assert read(str(tmp_path / "rows.arrow"), tmp_path) == ROWS


@pytest.mark.parametrize("content", [lines(ROWS), json.dumps(ROWS).encode()])
def test_standard_input_is_read_once_and_kept(content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    files._standard_input.cache_clear()
    assert read("-", tmp_path) == ROWS
    assert read("-", tmp_path) == ROWS
    files._standard_input.cache_clear()


def half(path: Path) -> str:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return str(path)


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no match": (lambda folder: f"{folder}/*.jsonl", "matches this pattern"),
    "missing": (lambda folder: str(folder / "a.jsonl"), "does not exist"),
    "twice": (lambda folder: [str(write(folder / "a.jsonl", ROWS))] * 2, "twice; name each file once"),
    "no shard": (lambda folder: str(folder), "no file of a known type"),
    "two types": (
        lambda folder: str(write(folder / "a.jsonl", ROWS) and write(folder / "b.parquet", ROWS).parent),
        r"files of the types jsonl, parquet; give a pattern.*\*\.jsonl",
    ),
    "half a zst": (lambda folder: half(write(folder / "a.jsonl.zst", ROWS)), "broken or not zstd .*half-written"),
    "half an arrow": (lambda folder: half(write(folder / "a.arrow", ROWS)), "not a complete arrow file.*half-written"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_path_that_cannot_be_read_is_refused_with_the_remedy(kind: str, tmp_path: Path) -> None:
    given, message = BROKEN[kind]
    with pytest.raises(DataError, match=message):
        read(given(tmp_path), tmp_path)


def test_empty_standard_input_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\n")))
    files._standard_input.cache_clear()
    with pytest.raises(DataError, match="standard input holds no row"):
        read("-", tmp_path)
    files._standard_input.cache_clear()


def test_several_shards_are_one_dataset_of_a_run(gradsift: Any) -> None:
    for number in range(2):
        write(gradsift.folder / "shards" / f"{number}.jsonl", ROWS[4 * number : 4 * number + 4])
    options = ("tracker=none", "scorer=random", "stop_after=selection", "proxy=gpt2", "alpha=1.0", "report=false")
    for paths_ in ("[shards/0.jsonl,shards/1.jsonl]", "shards/*.jsonl", "shards"):
        assert gradsift("data=json", f"data.path='{paths_}'" if "*" in paths_ else f"data.path={paths_}", *options) == 0
    selections = list(gradsift.folder.glob("outputs/*/*/selection.jsonl"))
    assert [len(each.read_text(encoding="utf-8").splitlines()) for each in selections] == [7, 7, 7]
    assert len(list(gradsift.store.glob("load/json-*"))) == 1  # the same files, the same artifact
    assert gradsift("data=json", "data.path=[]", *options) == 2
