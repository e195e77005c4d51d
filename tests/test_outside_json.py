"""Laws of JSON from outside: whatever Python cannot read is one kind of error, and every reader names the file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gradsift import outside_json
from gradsift.config import BenchmarkSetConfig, ComputeConfig, FilesTargetSetConfig
from gradsift.data.files import read_rows
from gradsift.data.target_set import load_target_set
from gradsift.errors import DataError, GradsiftError
from gradsift.evaluation.benchmarks import load_benchmark
from gradsift.evaluation.generation import read_model_outputs
from gradsift.evaluation.judges.annotators import read_annotator
from gradsift.evaluation.judgments import read_judgments
from gradsift.evaluation.records import read_labels, read_records
from gradsift.runtime import Display, Runtime

DEEP = "[" * 100_000 + "]" * 100_000
HOSTILE = {"nested": DEEP, "objects": '{"a":' * 5000 + "1" + "}" * 5000, "digits": "1" * 5000}


def target_rows(path: Path) -> Any:
    from gradsift.artifacts import Store

    runtime = Runtime(Store(path.parent / "store"), ComputeConfig(), Display(), seed=0)
    return load_target_set(runtime, FilesTargetSetConfig(name="json", path=str(path)), None)  # type: ignore[arg-type]


def benchmark_rows(path: Path) -> Any:
    return load_benchmark("x", BenchmarkSetConfig(path=str(path), instruction="a"), path.parent)


READERS: dict[str, Callable[[Path], Any]] = {
    "data": lambda path: list(read_rows(path)),
    "target set": target_rows,
    "benchmark": benchmark_rows,
    "model outputs": read_model_outputs,
    "records": read_records,
    "judgments": read_judgments,
    "labels": read_labels,
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_json_that_python_cannot_read_is_a_decode_error(text: str) -> None:
    for given in (text, text.encode()):
        with pytest.raises(json.JSONDecodeError):
            outside_json.loads(given)
    assert outside_json.loads('{"a": [1, null]}') == {"a": [1, None]}
    with pytest.raises(UnicodeDecodeError):
        outside_json.loads(b'"\xff"')


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize("suffix", ["json", "jsonl"])
@pytest.mark.parametrize("reader", READERS)
def test_every_reader_names_the_file(reader: str, suffix: str, text: str, tmp_path: Path) -> None:
    row = f'{{"instruction": "a", "output": "b", "x": {text}}}'
    path = tmp_path / f"hostile.{suffix}"
    path.write_text(f"[{row}]" if suffix == "json" else f"{row}\n{row}\n")
    with pytest.raises(DataError, match=r"hostile\.json"):
        READERS[reader](path)


def test_an_annotators_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / "configs.yaml"
    path.write_text(f"deep: {DEEP[:5000]}{DEEP[-5000:]}\n")
    with pytest.raises(GradsiftError, match=r"configs\.yaml cannot be read as YAML"):
        read_annotator(str(path))
