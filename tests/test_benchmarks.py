"""Benchmark files: any field names by config, and an error that says file, row, field and remedy."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from gradsift.config import BenchmarkSetConfig
from gradsift.data import download
from gradsift.data.download import fetch_url
from gradsift.errors import ConfigError, DataError
from gradsift.evaluation.benchmarks import Item, load_benchmark


def write_jsonl(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def test_dotted_fields_reach_into_lists_and_objects(tmp_path: Path) -> None:
    row = {"id": "t0", "instruction": "Add.", "instances": [{"input": "2 and 3", "output": "5"}]}
    file = write_jsonl(tmp_path / "set.jsonl", row)
    spec = BenchmarkSetConfig(path=str(file), id="id", input="instances.0.input", reference="instances.0.output")
    assert load_benchmark("mine", spec) == [Item("mine", "t0", "Add.", "2 and 3", "5")]


def test_json_list_and_jsonl_give_the_same_items(tmp_path: Path) -> None:
    rows = [{"text": "a", "question_id": 1}, {"text": "b", "question_id": 2}]
    lines = write_jsonl(tmp_path / "set.jsonl", *rows)
    (tmp_path / "set.json").write_text("\ufeff" + json.dumps(rows, indent=2), encoding="utf-8")
    specs = [
        BenchmarkSetConfig(path=str(p), id="question_id", instruction="text") for p in (lines, tmp_path / "set.json")
    ]
    first, second = (load_benchmark("s", spec) for spec in specs)
    assert first == second == [Item("s", "1", "a", "", None), Item("s", "2", "b", "", None)]


def test_row_number_is_the_id_where_none_is_named_and_limit_takes_the_first(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "set.jsonl", *({"instruction": f"q{n}"} for n in range(5)))
    items = load_benchmark("s", BenchmarkSetConfig(path=str(file)), limit=2)
    assert [(i.item_id, i.instruction) for i in items] == [("1", "q0"), ("2", "q1")]


def test_a_line_separator_inside_a_string_does_not_end_the_row(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "set.jsonl", {"instruction": "one\u2028two \U0001f600 \u05d0"})
    assert load_benchmark("s", BenchmarkSetConfig(path=str(file)))[0].instruction == "one\u2028two \U0001f600 \u05d0"


@pytest.mark.parametrize(
    ("content", "options", "words"),
    [
        ('{"prompt": "x"}', {}, ["row 1", "'instruction'", "prompt", "benchmark.catalog.s.instruction"]),
        ('{"instruction": 5}', {}, ["row 1", "holds int", "benchmark.catalog.s.instruction"]),
        ('{"instruction": "  "}', {}, ["row 1", "blank"]),
        ('{"instruction": "x", "i": []}', {"input": "i.0.input"}, ["'i.0.input'", "benchmark.catalog.s.input"]),
        ('{"instruction": "x", "a": null}', {"reference": "a"}, ["NoneType", "benchmark.catalog.s.reference"]),
        ('{"instruction": "x", "n": 1}\n{"instruction": "y", "n": 1}', {"id": "n"}, ["rows 1 and 2", "'1'", ".id"]),
        ('{"instruction": "x"}\n{"instruc', {}, ["line 2", "broken JSON", "benchmark.catalog.s.path"]),
        ('[{"instruction": "x"},\n{"instruc', {}, ["line 2", "broken JSON"]),
        ("", {}, ["no rows"]),
        ("[]", {}, ["no rows"]),
        ('["just text"]', {}, ["row 1", "type str"]),
    ],
)
def test_a_bad_file_names_place_and_remedy(
    tmp_path: Path, content: str, options: dict[str, str], words: list[str]
) -> None:
    file = tmp_path / "set.jsonl"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(DataError) as error:
        load_benchmark("s", BenchmarkSetConfig(path=str(file), **options))  # type: ignore[arg-type]
    for word in [str(file), *words]:
        assert word in str(error.value)


def test_missing_files_and_places_name_the_option(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"benchmark\.catalog\.s\.path=FILE"):
        load_benchmark("s", BenchmarkSetConfig(path=str(tmp_path / "nothing.json")))
    with pytest.raises(ConfigError, match=r"neither path nor url.*benchmark\.catalog\.s\.path=FILE"):
        load_benchmark("s", BenchmarkSetConfig())
    with pytest.raises(DataError, match=r"downloads are off.*benchmark\.catalog\.s\.path=FILE"):
        load_benchmark("s", BenchmarkSetConfig(url="https://example.invalid/x.json"))
    (tmp_path / "latin.json").write_bytes(b'[{"instruction": "caf\xe9"}]')
    with pytest.raises(DataError, match="not UTF-8"):
        load_benchmark("s", BenchmarkSetConfig(path=str(tmp_path / "latin.json")))


# ------------------------------------------------------------------------------------------ download


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, list[str]]]:
    """A server on loopback; gives its address and the paths that were asked for."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            if self.path == "/gone.json":
                self.send_error(404)
                return
            if self.path == "/redirect.json":
                self.send_response(302)
                self.send_header("Location", "http://example.invalid/set.json")
                self.end_headers()
                return
            body = b'[{"instruction": "fetched"}]'
            self.send_response(200)
            self.send_header("Content-Length", str(len(body) + (9 if self.path == "/short.json" else 0)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_address[1]}", asked
        httpd.shutdown()


def test_a_url_is_fetched_once(tmp_path: Path, server: tuple[str, list[str]]) -> None:
    address, asked = server
    spec = BenchmarkSetConfig(url=f"{address}/set.json?raw=true")
    for _ in range(2):
        items = load_benchmark("s", spec, fetch=lambda url: fetch_url(url, tmp_path / "cache"))
        assert items[0].instruction == "fetched"
    assert len(asked) == 1
    assert [p.suffix for p in (tmp_path / "cache").iterdir()] == [".json"]


@pytest.mark.parametrize("page", ["gone.json", "short.json", "redirect.json"])
def test_a_failed_download_leaves_nothing_and_says_where_the_file_goes(
    tmp_path: Path, server: tuple[str, list[str]], page: str
) -> None:
    spec = BenchmarkSetConfig(url=f"{server[0]}/{page}")
    with pytest.raises(DataError) as error:
        load_benchmark("s", spec, fetch=lambda url: fetch_url(url, tmp_path))
    assert str(tmp_path) in str(error.value)
    assert "benchmark.catalog.s.path=FILE" in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_too_large_a_file_is_refused(
    tmp_path: Path, server: tuple[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "DOWNLOAD_LIMIT", 10)
    with pytest.raises(DataError, match="more than"):
        fetch_url(f"{server[0]}/set.json", tmp_path)


@pytest.mark.parametrize("url", ["http://example.invalid/a.json", "file:///etc/hostname", "ftp://example.invalid/a"])
def test_only_https_is_fetched(tmp_path: Path, url: str) -> None:
    with pytest.raises(DataError, match="only https"):
        fetch_url(url, tmp_path)


# ----------------------------------------------------------------------------------------- real sets

REAL = {
    "vicuna": (80, BenchmarkSetConfig(id="question_id", instruction="text")),
    "wizardlm": (218, BenchmarkSetConfig(id="idx", instruction="Instruction")),
    "koala": (180, BenchmarkSetConfig(id="id", instruction="prompt")),
    "lima": (300, BenchmarkSetConfig(instruction="conversations")),
    "sinstruct": (
        252,
        BenchmarkSetConfig(id="id", input="instances.0.input", reference="instances.0.output"),
    ),
}


@pytest.mark.skipif("GRADSIFT_DATA" not in os.environ, reason="GRADSIFT_DATA is not set")
@pytest.mark.parametrize("name", REAL)
def test_the_papers_test_sets_load_by_config_alone(name: str) -> None:
    size, spec = REAL[name]
    spec.path = str(Path(os.environ["GRADSIFT_DATA"]) / "benchmarks" / f"{name}_test_set.jsonl")
    items = load_benchmark(name, spec)
    assert len(items) == len({item.item_id for item in items}) == size
