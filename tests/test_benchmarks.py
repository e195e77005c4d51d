"""Benchmark files: field names from the config, and errors that name file, row, field and remedy."""

from __future__ import annotations

import itertools
import json
import os
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir

from gradsift.composition import conf_folder, register_schemas
from gradsift.config import BenchmarkSetConfig, load_config
from gradsift.data import download
from gradsift.data.download import fetch_url
from gradsift.errors import ConfigError, DataError
from gradsift.evaluation.benchmarks import Item, load_benchmark
from gradsift.evaluation.matching import MATCHERS


def load(name: str, spec: BenchmarkSetConfig, **options: Any) -> list[Item]:
    return load_benchmark(name, spec, **{"downloads": Path("never-made"), **options})


def write_jsonl(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def test_dotted_fields_reach_into_lists_and_objects(tmp_path: Path) -> None:
    row = {"id": "t0", "instruction": "Add.", "instances": [{"input": "2 and 3", "output": "5"}]}
    file = write_jsonl(tmp_path / "set.jsonl", row)
    spec = BenchmarkSetConfig(path=str(file), id="id", input="instances.0.input", reference="instances.0.output")
    assert load("mine", spec) == [Item("mine", "t0", "Add.", "2 and 3", "5")]


def test_a_key_may_hold_dots_blanks_and_other_scripts(tmp_path: Path) -> None:
    row = {
        "task.question": "Add.",
        "task": {"question": "wrong"},
        "the input": "2 and 3",
        "\u05ea\u05e9\u05d5\u05d1\u05d4": "5",
    }
    file = write_jsonl(tmp_path / "set.jsonl", row)
    spec = BenchmarkSetConfig(
        path=str(file), instruction="task.question", input="the input", reference="\u05ea\u05e9\u05d5\u05d1\u05d4"
    )
    assert load("mine", spec) == [Item("mine", "1", "Add.", "2 and 3", "5")]


def test_json_list_and_jsonl_give_the_same_items(tmp_path: Path) -> None:
    rows = [{"text": "a", "question_id": 1}, {"text": "b", "question_id": 2}]
    lines = write_jsonl(tmp_path / "set.jsonl", *rows)
    (tmp_path / "set.json").write_text("\ufeff" + json.dumps(rows, indent=2), encoding="utf-8")
    specs = [
        BenchmarkSetConfig(path=str(p), id="question_id", instruction="text") for p in (lines, tmp_path / "set.json")
    ]
    first, second = (load("s", spec) for spec in specs)
    assert first == second == [Item("s", "1", "a", "", None), Item("s", "2", "b", "", None)]


def test_the_row_number_is_the_id_if_no_field_is_named_and_limit_takes_the_first_rows(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "set.jsonl", *({"instruction": f"q{n}"} for n in range(5)))
    items = load("s", BenchmarkSetConfig(path=str(file)), limit=2)
    assert [(i.item_id, i.instruction) for i in items] == [("1", "q0"), ("2", "q1")]


def test_a_line_separator_inside_a_string_does_not_end_the_row(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "set.jsonl", {"instruction": "one\u2028two \U0001f600 \u05d0"})
    assert load("s", BenchmarkSetConfig(path=str(file)))[0].instruction == "one\u2028two \U0001f600 \u05d0"


@pytest.mark.parametrize(
    ("content", "options", "words"),
    [
        ('{"prompt": "x"}', {}, ["row 1", "'instruction'", "prompt", "benchmark.catalog.s.instruction"]),
        ('{"instruction": 5}', {}, ["row 1", "of type int", "benchmark.catalog.s.instruction"]),
        ('{"instruction": "  "}', {}, ["row 1", "blank"]),
        ('{"instruction": "x", "i": []}', {"input": "i.0.input"}, ["'i.0.input'", "benchmark.catalog.s.input"]),
        ('{"instruction": "x", "a": null}', {"reference": "a"}, ["NoneType", "benchmark.catalog.s.reference"]),
        ('{"instruction": "x", "n": 1}\n{"instruction": "y", "n": 1}', {"id": "n"}, ["rows 1 and 2", "'1'", ".id"]),
        ('{"instruction": "x"}\n{"instruc', {}, ["line 2", "invalid JSON", "benchmark.catalog.s.path"]),
        ('[{"instruction": "x"},\n{"instruc', {}, ["line 2", "invalid JSON"]),
        (
            '{"version": 1,\n "data": [{"instruction": "x"}]}',
            {},
            ["(fields of the row: version, data)", "benchmark.catalog.s.rows"],
        ),
        ("", {}, ["no rows"]),
        ("[]", {}, ["no rows"]),
        ('["just text"]', {}, ["row 1", "type str"]),
    ],
)
def test_the_error_of_a_bad_file_names_place_and_remedy(
    tmp_path: Path, content: str, options: dict[str, str], words: list[str]
) -> None:
    file = tmp_path / "set.jsonl"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(DataError) as error:
        load("s", BenchmarkSetConfig(path=str(file), **options))  # type: ignore[arg-type]
    for word in [str(file), *words]:
        assert word in str(error.value)


def test_rows_may_be_under_a_key(tmp_path: Path) -> None:
    file = tmp_path / "set.json"
    file.write_text(json.dumps({"canary": "x", "examples": [{"input": "2 + 2", "target": "4"}]}, indent=2))
    spec = BenchmarkSetConfig(path=str(file), rows="examples", instruction="input", reference="target")
    assert load("s", spec) == [Item("s", "1", "2 + 2", "", "4")]
    spec.rows = "rows"
    with pytest.raises(
        DataError, match=r"under the key 'rows' \(keys: canary, examples\); check benchmark\.catalog\.s\.rows"
    ):
        load("s", spec)


def test_the_reference_is_the_text_after_the_last_mark(tmp_path: Path) -> None:
    spec = BenchmarkSetConfig(instruction="q", reference="a", reference_after="####", match="number")
    spec.path = str(write_jsonl(tmp_path / "good.jsonl", {"q": "?", "a": "1 #### 2\n#### 1,080"}))
    assert load("s", spec)[0].reference == "1,080"
    for answer, words in (("1080", "nothing after '####'"), ("x ####", "nothing after"), ("#### ten", "no number")):
        spec.path = str(write_jsonl(tmp_path / "bad.jsonl", {"q": "?", "a": answer}))
        with pytest.raises(DataError, match=f"row 1: field 'a'.*{words}"):
            load("s", spec)


def test_a_local_folder_replaces_the_urls(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "set.jsonl", {"instruction": "by its address"})
    write_jsonl(tmp_path / "other.jsonl", {"instruction": "by its name"})
    spec = BenchmarkSetConfig(url="https://example.invalid/data/set.jsonl")
    assert load("s", spec, folder=tmp_path)[0].instruction == "by its address"
    spec.file = "other.jsonl"
    assert load("s", spec, folder=tmp_path)[0].instruction == "by its name"
    spec.file = "sub/set.jsonl"
    with pytest.raises(
        DataError, match=r"sub/set\.jsonl does not exist; store https://example\.invalid/data/set\.jsonl"
    ):
        load("s", spec, folder=tmp_path)
    spec.path = str(tmp_path / "other.jsonl")  # the path of a benchmark comes before the folder
    assert load("s", spec, folder=tmp_path)[0].instruction == "by its name"


def test_the_error_of_a_missing_file_names_the_option(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"benchmark\.catalog\.s\.path=FILE"):
        load("s", BenchmarkSetConfig(path=str(tmp_path / "nothing.json")))
    with pytest.raises(ConfigError, match=r"neither path nor url.*benchmark\.catalog\.s\.path=FILE"):
        load("s", BenchmarkSetConfig())
    (tmp_path / "latin.json").write_bytes(b'[{"instruction": "caf\xe9"}]')
    with pytest.raises(DataError, match="not UTF-8"):
        load("s", BenchmarkSetConfig(path=str(tmp_path / "latin.json")))


# ------------------------------------------------------------------------------------------ download


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, list[str]]]:
    """A server on loopback; yields its address and the list of requested paths."""
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
        threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_address[1]}", asked
        httpd.shutdown()


def test_a_url_is_fetched_once(tmp_path: Path, server: tuple[str, list[str]]) -> None:
    address, asked = server
    spec = BenchmarkSetConfig(url=f"{address}/set.json?raw=true")
    for _ in range(2):
        items = load("s", spec, downloads=tmp_path / "cache")
        assert items[0].instruction == "fetched"
    assert len(asked) == 1
    assert [p.suffix for p in (tmp_path / "cache").iterdir()] == [".json"]


@pytest.mark.parametrize("page", ["gone.json", "short.json", "redirect.json"])
def test_a_failed_download_leaves_no_file_and_names_the_option(
    tmp_path: Path, server: tuple[str, list[str]], page: str
) -> None:
    spec = BenchmarkSetConfig(url=f"{server[0]}/{page}")
    with pytest.raises(DataError) as error:
        load("s", spec, downloads=tmp_path)
    assert str(tmp_path) in str(error.value)
    assert "benchmark.catalog.s.path=FILE" in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_too_large_is_refused(
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

TASKS = (
    "boolean_expressions",
    "date_understanding",
    "logical_deduction_three_objects",
    "navigate",
    "object_counting",
    "word_sorting",
)
SIZES = {
    "vicuna": 80,
    "wizardlm": 218,
    "koala": 180,
    "lima": 300,
    "self_instruct": 252,
    "gsm8k": 1319,
    **{f"bbh_{task}": 250 for task in TASKS},
}
real = pytest.mark.skipif("GRADSIFT_DATA" not in os.environ, reason="GRADSIFT_DATA is not set")


@pytest.fixture(scope="module")
def catalog() -> dict[str, BenchmarkSetConfig]:
    """The catalogue of gradsift."""
    register_schemas()
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        return load_config(compose("config", overrides=["stop_after=selection"])).benchmark.catalog


@real
@pytest.mark.parametrize("name", SIZES)
def test_the_catalogues_benchmarks_load_from_a_local_folder(name: str, catalog: Any) -> None:
    items = load(name, catalog[name], folder=Path(os.environ["GRADSIFT_DATA"]) / "benchmarks")
    assert len(items) == len({item.item_id for item in items}) == SIZES[name]


@real
def test_alpaca_evals_file_has_805_instructions(catalog: Any) -> None:
    spec = replace(catalog["alpaca_eval"], path=f"{os.environ['GRADSIFT_DATA']}/alpaca_eval/text_davinci_003.json")
    assert len(load("alpaca_eval", spec)) == 805


def test_an_instruction_of_arena_hard_is_the_content_of_its_turn(catalog: Any, tmp_path: Path) -> None:
    row = {"question_id": "96d2", "category": "arena-hard-v0.1", "cluster": "c", "turns": [{"content": "Go."}]}
    file = write_jsonl(tmp_path / "question.jsonl", row)
    assert load("arena_hard", replace(catalog["arena_hard"], path=str(file))) == [
        Item("arena_hard", "96d2", "Go.", "", None)
    ]


def test_mt_benchs_second_turns_come_after_the_first_turns(catalog: Any, tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "question.jsonl", {"question_id": 81, "category": "writing", "turns": ["Go.", "On."]})
    assert load("mt_bench", replace(catalog["mt_bench"], path=str(file))) == [
        Item("mt_bench", "81", "Go.", "", None),
        Item("mt_bench_turn_2", "81", "On.", "", None, after="mt_bench"),
    ]


@real
@pytest.mark.parametrize("name", ["gsm8k", *(f"bbh_{task}" for task in TASKS)])
def test_every_real_reference_matches_itself_and_few_others(name: str, catalog: Any) -> None:
    items = load(name, catalog[name], folder=Path(os.environ["GRADSIFT_DATA"]) / "benchmarks")
    matches = MATCHERS[catalog[name].match]
    texts = [str(item.reference) for item in items]
    assert all(matches(f"Let us see.\nSo the answer is {text}.", text) for text in texts)
    pairs = list(itertools.pairwise(texts))
    equal = [one.replace(",", "") == other.replace(",", "") for one, other in pairs]
    assert [matches(one, other) for one, other in pairs] == equal
