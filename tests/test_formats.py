"""Laws of reading data: errors of the file, rejected rows, and the examples of every format."""

from __future__ import annotations

import datetime
import gzip
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest

from gradsift.config import FieldsConfig, JsonDataConfig
from gradsift.data.examples import Example, Rejected, Turn
from gradsift.data.files import file_kind, read_rows
from gradsift.data.formats import parse_rows
from gradsift.data.hub import load_hub
from gradsift.errors import ConfigError, DataError

FIELDS = FieldsConfig()
ROWS = [
    {"instruction": "Name a colour.", "input": "", "output": "red 🟥"},
    {"instruction": "قل مرحبا", "input": "a\nb", "output": 'say "שלום", twice'},
]
needs_data = pytest.mark.skipif("GRADSIFT_DATA" not in os.environ, reason="GRADSIFT_DATA is unset: no real data here")


def write(path: Path, content: str | bytes) -> Path:
    data = content.encode("utf-8") if isinstance(content, str) else content
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def lines(rows: list[Any]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def contents(path: Path) -> list[Any]:
    return [row.content for row in read_rows(path)]


def parse(*rows: Any, format: str = "auto") -> tuple[list[Example], list[Rejected]]:
    return parse_rows(enumerate(rows), format, FIELDS)


def reason(row: Any, format: str = "alpaca") -> str:
    """Return the reason why a row is rejected when another one is not."""
    good = {
        "alpaca": ROWS[0],
        "messages": {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        "sharegpt": {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        "prompt_completion": {"prompt": "a", "completion": "b"},
    }[format]
    examples, rejected = parse(row, good, format=format)
    assert [example.row_index for example in examples] == [1]
    assert [row.row for row in rejected] == [0]
    return rejected[0].reason


# ------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("name", ["a.json", "a.json.gz", "A.JSON"])
@pytest.mark.parametrize("indent", [None, 2])
def test_json_array(tmp_path: Path, name: str, indent: int | None) -> None:
    assert contents(write(tmp_path / name, json.dumps(ROWS, indent=indent))) == ROWS


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.ndjson", "a.json", "a.json.gz"])
def test_json_lines_whatever_the_name(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, "\n" + lines(ROWS[:1]) + "\n  \n" + lines(ROWS[1:]).rstrip())
    assert contents(path) == ROWS
    assert [row.row for row in read_rows(path)] == [0, 1]
    assert [row.line for row in read_rows(path)] == [2, 5]


def test_single_line_and_wrapped_json(tmp_path: Path) -> None:
    talk = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    assert contents(write(tmp_path / "a.json", lines(ROWS[:1]))) == ROWS[:1]
    assert contents(write(tmp_path / "a.json", json.dumps(talk))) == [talk]
    assert contents(write(tmp_path / "a.json", json.dumps({"data": ROWS}))) == ROWS
    assert contents(write(tmp_path / "a.json", json.dumps({"data": ROWS}, indent=1))) == ROWS
    with pytest.raises(DataError, match="one object with no list of rows: its keys are version, numbers"):
        contents(write(tmp_path / "a.json", json.dumps({"version": 1, "numbers": [1]}, indent=1)))
    with pytest.raises(DataError, match="holds a number; it must hold an array"):
        contents(write(tmp_path / "a.json", "12"))


def test_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    for name, text in (("a.json", json.dumps(ROWS)), ("a.jsonl", lines(ROWS))):
        assert contents(write(tmp_path / name, "\ufeff" + text)) == ROWS
    assert contents(write(tmp_path / "a.csv", "\ufeffinstruction,output\na,b\n")) == [
        {"instruction": "a", "output": "b"}
    ]


def test_csv_keeps_quotes_line_breaks_and_long_cells(tmp_path: Path) -> None:
    long = "x" * 200_000
    path = write(tmp_path / "a.csv", f'instruction,input,output\r\n"a ""b""\n,c",,{long}\r\n\r\nd,e,f\r\n')
    assert contents(path) == [
        {"instruction": 'a "b"\n,c', "input": "", "output": long},
        {"instruction": "d", "input": "e", "output": "f"},
    ]
    assert [row.line for row in read_rows(path)] == [2, 5]


def test_csv_of_a_data_frame_may_have_a_column_without_a_name(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", ",instruction,output\n0,a,b\n")
    ((example,), _) = parse_rows(read_rows(path), "auto", FIELDS)
    assert example.original == {"": "0", "instruction": "a", "output": "b"}


def test_parquet_keeps_columns_of_any_type(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {
        "instruction": ["a", "b", "c"],
        "input": [None, "x", ""],
        "output": ["1", "2", None],
        "day": [datetime.date(2024, 1, 2), None, None],
        "raw": [b"\xff", None, b""],
        "score": [math.nan, math.inf, 1.0],
        "tags": [["x", None], [], None],
    }
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    examples, rejected = parse_rows(read_rows(tmp_path / "a.parquet"), "auto", FIELDS)
    assert [(e.instruction, e.input, e.output) for e in examples] == [("a", "", "1"), ("b", "x", "2")]
    assert rejected == [Rejected(2, "field 'output' is null, not text", None)]
    extra = {"day": "2024-01-02", "raw": "/w==", "score": None, "tags": ["x", None]}
    assert examples[0].original == {"instruction": "a", "input": None, "output": "1"} | extra


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b"", "is empty"),
        ("a.json", b" \n", "is empty"),
        ("a.json", b"[]", "is empty"),
        ("a.jsonl", b"\n\n", "is empty"),
        ("a.json.gz", b"", "is empty"),
        ("a.csv", b"instruction,output\n", "is empty"),
        ("a.parquet", b"", "is empty"),
        ("a.txt", b"x", "no known type.*jsonl.*tsv.*parquet"),
        ("a.json", b'[{"instruction": "a"},\n {"instruction": b}]', r"line 2, column 18: broken JSON"),
        ("a.json", b'[{"instruction": "a"},\n {"instr', "line 2.*half-written"),
        ("a.json", b'{"instruction": "a"}\n{"instr', "line 2.*half-written"),
        ("a.jsonl", b'{"a": 1}\n\n{"a": }\n{"a": 2}\n', r"line 3, column 7: broken JSON"),
        ("a.jsonl", b'{"a": 1}\n{"a": 1', "line 2.*half-written"),
        ("a.jsonl", b'{"a": "x\0y"}\n', "line 1.*control character"),
        ("a.jsonl", b'[{"a": 1}]', r"array.*\.json"),
        ("a.jsonl", b'{"a": 1}\n{"a": "\xff"}\n', "line 2: byte 0xff is not UTF-8"),
        ("a.json", b'[\n"\xe9"]', "line 2: byte 0xe9 is not UTF-8"),
        ("a.json", "[]".encode("utf-16"), "is empty"),
        ("a.json", "[]".encode("utf-16-le"), "begins with NUL bytes.*save the file in UTF-8"),
        ("a.csv", "a,b".encode("utf-16")[:-1], "byte 6 is not UTF-16.*save the file in UTF-8"),
        ("a.json", b'[{"a": 1},\n // no\n {"a": 2}]', "line 2, column 2: .*JSON has no comments: delete them"),
        ("a.jsonl", b'# no\n{"a": 2}', "line 1, column 1: .*JSON has no comments: delete them"),
        ("a.json", b'[{"a": 1,}]', "line 1, column 10: .*delete the comma before it"),
        ("a.json", b'[{"a": 1},]', "line 1, column 11: .*delete the comma before it"),
        ("a.jsonl", b'{"a": 1},\n{"a": 2}', "line 1, column 9: .*delete the commas between the objects"),
        ("a.jsonl", b'{"a": 1}]', "line 1, column 9: .*correct the JSON there"),
        ("a.jsonl", b'{\n"a": 1\n}\n', r"line 1.*let its name end in \.json if its objects span lines"),
        ("a.jsonl", b'{"a": 1}\n{"a": 2, "a": 3}', "line 2: the key 'a' stands twice in one object"),
        ("a.json", b'{"a": 1}\n{"a": 2, "a": 3}', "line 2: the key 'a' stands twice in one object"),
        ("a.json", b'[{"a": 1},\n {"a": 2, "a": 3}]', r"a\.json: the key 'a' stands twice in one object"),
        ("a.json", b'{"train": [{"q": 1}], "test": [{"q": 2}]}', r"several lists of objects \(train, test\)"),
        ("a.json", b'[{"q": 1}] {"q": 2}', "holds 2 values; it must hold an array"),
        ("a.jsonl", b'{"train": [{"q": 1}], "test": [{"q": 2}]}', r"several lists of objects \(train, test\)"),
        ("a.json", b'{"data": []}', "is empty: it holds no row"),
        ("a.json", gzip.compress(b"[]", mtime=0), r"name it a\.json\.gz"),
        ("a.json", b"[" * 200_000, "broken JSON .nested too deep"),
        ("a.json", b"[" + b"1" * 5000 + b"]", r"broken JSON \(Exceeds the limit"),
        ("a.csv", b'a,b\n1,2\n"3', "line 3.*half-written"),
        ("a.csv", b"a,b\n1,2\n3\n", "line 3: 1 cells for 2 columns"),
        ("a.csv", b"a,a\n1,2\n", "two columns have the same name"),
        ("a.parquet", b"PAR1 nonsense", "not a complete parquet file"),
    ],
)
def test_broken_files_are_named_with_place_and_remedy(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content if name != "a.json.gz" else gzip.compress(content))
    with pytest.raises(DataError, match=message) as caught:
        contents(path)
    assert name in str(caught.value)


def test_missing_files_and_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.path=.*nowhere\.json does not exist"):
        contents(tmp_path / "nowhere.json")
    with pytest.raises(DataError, match="is a folder"):
        contents(tmp_path)


def test_pipes_and_devices_are_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "device.jsonl").symlink_to("/dev/zero")
    for name in ("pipe.jsonl", "device.jsonl"):
        with pytest.raises(DataError, match=f"{name} is a pipe, a socket or a device; write the rows to a file"):
            file_kind(tmp_path / name)
        with pytest.raises(DataError, match="is a pipe"):
            next(read_rows(tmp_path / name))
    (tmp_path / "link.jsonl").symlink_to(write(tmp_path / "a.jsonl", lines(ROWS)))
    assert contents(tmp_path / "link.jsonl") == ROWS


@pytest.mark.parametrize("keep", [10, 60, -9])
def test_half_a_gzip_is_an_error(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(lines(ROWS * 50).encode())[:keep])
    with pytest.raises(DataError, match=r"gzip.*half-written"):
        contents(path)
    path.write_text(lines(ROWS), encoding="utf-8")
    with pytest.raises(DataError, match=r"is not gzip .*remove \.gz from its name"):
        contents(path)


def test_zeros_and_further_members_after_gzip_are_read_as_gunzip_reads_them(tmp_path: Path) -> None:
    path, first, second = tmp_path / "a.jsonl.gz", *(gzip.compress(lines([row]).encode()) for row in ROWS)
    path.write_bytes(first + second + bytes(512))
    assert contents(path) == ROWS


def test_half_a_parquet_file_is_an_error(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"instruction": ["a"] * 100}), path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match="half-written"):
        contents(path)


# ------------------------------------------------------------------------------------------ shapes


def test_every_original_column_is_kept() -> None:
    rows = [{**ROWS[0], "source": {"id": [1, None]}}, {**ROWS[1], "other": "x"}]
    examples, _ = parse(*rows)
    assert [example.original for example in examples] == rows


def test_alpaca_input_may_be_missing_null_or_blank() -> None:
    row = {"instruction": "a", "output": "b"}
    examples, rejected = parse(row, row | {"input": None}, row | {"input": " \n"}, row | {"input": math.nan})
    assert [example.input for example in examples] == [""] * 4
    assert rejected == []
    assert [example.example_id[-2:] for example in examples] == ["-0", "-1", "-2", "-3"]


def test_texts_are_kept_as_they_are() -> None:
    ((example,), _) = parse({"instruction": " a\r\n", "input": "\tb", "output": " c "})
    assert (example.instruction, example.input, example.output) == (" a\r\n", "\tb", " c ")


def test_fields_can_have_other_names() -> None:
    fields = FieldsConfig(instruction="question", output="answer")
    examples, _ = parse_rows(enumerate([{"question": "a", "answer": "b"}]), "auto", fields)
    assert (examples[0].instruction, examples[0].output) == ("a", "b")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"instruction": "a"}, "field 'output' is missing"),
        ({"output": "a"}, "field 'instruction' is missing"),
        (ROWS[0] | {"output": ""}, "field 'output' is empty"),
        (ROWS[0] | {"output": " \n\t\u00a0"}, "field 'output' is empty"),
        (ROWS[0] | {"output": 3}, "field 'output' is a number, not text"),
        (ROWS[0] | {"output": None}, "field 'output' is null, not text"),
        (ROWS[0] | {"input": ["a"]}, "field 'input' is a list, not text"),
        (ROWS[0] | {"instruction": " ", "input": " "}, "'instruction' and 'input' are both empty"),
        (ROWS[0] | {"output": "a\0b"}, "holds a NUL"),
        (ROWS[0] | {"instruction": "a\ud83d"}, "half a surrogate pair"),
        (ROWS[0] | {"image": object()}, "column 'image' holds a object"),
        (ROWS[0] | {"deep": json.loads("[" * 700 + "]" * 700)}, "column 'deep' is nested too deep"),
        ("text", "the row is a text, not an object"),
        (None, "the row is null, not an object"),
    ],
)
def test_unusable_alpaca_rows_are_rejected_with_a_reason(row: Any, expected: str) -> None:
    assert expected in reason(row)


def test_rejected_rows_leave_gaps_and_know_their_line(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", "\n" + lines([ROWS[0], {"instruction": "x"}, ROWS[1]]))
    examples, rejected = parse_rows(read_rows(path), "auto", FIELDS)
    assert [example.row_index for example in examples] == [0, 2]
    assert rejected == [Rejected(1, "field 'output' is missing", 3)]


def turns(*pairs: tuple[Any, Any]) -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role, content in pairs]


TALK = turns(("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))


def test_conversations_of_every_shape_are_alike() -> None:
    sharegpt = {"system": "system", "user": "human", "assistant": "gpt"}
    rows = [
        {"messages": TALK},
        {"conversations": [{"from": sharegpt[t["role"]], "value": t["content"]} for t in TALK]},
        {"prompt": TALK[:-1], "completion": TALK[-1:]},
        {"messages": [*TALK, *turns(("user", "left out"))]},
    ]
    for row in rows:
        ((example,), rejected) = parse(row)
        assert rejected == []
        assert example.history == (Turn("system", "s"), Turn("user", "a"), Turn("assistant", "b"))
        assert (example.instruction, example.input, example.output) == ("c", "", "d")
        assert example.original == row


def test_prompt_and_completion_as_text() -> None:
    ((example,), _) = parse({"prompt": "a", "completion": " b"})
    assert (example.history, example.instruction, example.input, example.output) == ((), "a", "", " b")


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ("a", "is a text, not a list of turns"),
        ([], "there is no assistant turn"),
        (turns(("user", "a")), "there is no assistant turn"),
        (turns(("tool", "a"), ("assistant", "b")), "turn 1 has the role 'tool'; tool turns cannot be used"),
        (
            turns(("narrator", "a"), ("assistant", "b")),
            "turn 1 has the role 'narrator'; known: system, developer, user",
        ),
        (turns((None, "a")), "'role' of turn 1 is null"),
        (turns(("user", "a"), ("assistant", " ")), "'content' of turn 2 is empty"),
        (turns(("user", "a"), ("assistant", None)), "'content' of turn 2 is null"),
        (turns(("user", [{"type": "text"}]), ("assistant", "b")), "'text' in part 1 of 'content' of turn 1 is missing"),
        (turns(("user", {"text": "a"}), ("assistant", "b")), "'content' of turn 1 is an object"),
        (turns(("assistant", "b")), "assistant turn instead of user turn"),
        (turns(("user", "a"), ("user", "b"), ("assistant", "c")), "user turn instead of assistant turn"),
        (turns(("user", "a"), ("assistant", "b"), ("system", "c"), ("assistant", "d")), "system turn instead of user"),
        (["a"], "there is no assistant turn"),
        (["a", {"role": "assistant", "content": "b"}], "turn 1 is a text, not an object"),
        ([{"role": "user"}], "'content' of turn 1 is missing"),
    ],
)
def test_unusable_conversations_are_rejected_with_a_reason(messages: Any, expected: str) -> None:
    assert expected in reason({"messages": messages}, "messages")


def test_other_unusable_shapes_are_rejected_with_a_reason() -> None:
    assert "'conversations' is missing" in reason({}, "sharegpt")
    assert "has the role 'elf'" in reason({"conversations": [{"from": "elf", "value": "x"}]}, "sharegpt")
    assert "both be text" in reason({"prompt": TALK, "completion": "x"}, "prompt_completion")
    assert "'completion' is missing" in reason({"prompt": "x"}, "prompt_completion")


def test_a_pair_without_its_chosen_response_is_rejected_where_the_format_is_given() -> None:
    examples, rejected = parse({"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": "a"}, format="alpaca")
    assert [example.output for example in examples] == ["b"]
    assert [row.reason for row in rejected] == ["field 'chosen' is missing"]


def test_auto_takes_the_first_row_that_has_the_columns_of_a_format() -> None:
    examples, rejected = parse("junk", {"instruction": "a"}, ROWS[0], {"messages": TALK})
    assert [example.row_index for example in examples] == [2]
    assert [row.row for row in rejected] == [0, 1, 3]


def test_unknown_columns_are_listed_with_the_options_to_set(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"are q, a; .*data\.format.*data\.fields\.instruction=NAME data\.fields\.output"
    ):
        parse({"q": "x", "a": "y"})
    with pytest.raises(DataError, match=r"none of its 1 rows.*'output' is missing.*instruction, q, a; .*data\.fields"):
        parse({"instruction": "z", "q": "x", "a": "y"}, format="alpaca")
    for fields in (FieldsConfig(output="reply"), FieldsConfig(instruction="q")):
        with pytest.raises(DataError, match="its columns are instruction, input, output; a format needs"):
            parse_rows(read_rows(write(tmp_path / "a.json", json.dumps(ROWS))), "auto", fields)
    with pytest.raises(DataError, match="rows are not objects"):
        parse("a", 1)
    with pytest.raises(DataError, match="is empty"):
        parse()
    with pytest.raises(ConfigError, match=r"data\.format='xml'"):
        JsonDataConfig(name="json", path="a.json", format="xml")


# --------------------------------------------------------------------------------------------- hub


def hub_failure(monkeypatch: pytest.MonkeyPatch, error: Exception) -> str:
    import datasets

    def fail(*args: Any, **kwargs: Any) -> None:
        assert "trust_remote_code" not in kwargs
        raise error

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(DataError) as caught:
        load_hub("owner/name", "abc", "train")
    return str(caught.value)


def test_hub_failures_say_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub.errors import OfflineModeIsEnabled

    gated = DatasetNotFoundError("Dataset 'owner/name' is a gated dataset on the Hub.")
    assert "hf auth login" in hub_failure(monkeypatch, gated)
    assert "at data.revision=abc is no dataset" in hub_failure(monkeypatch, DatasetNotFoundError("doesn't exist"))
    for error in (OfflineModeIsEnabled("offline"), ConnectionError("no route")):
        assert "cannot be reached" in hub_failure(monkeypatch, error)
    assert "Unknown split" in hub_failure(monkeypatch, ValueError('Unknown split "train".'))
    assert "a script" in hub_failure(monkeypatch, RuntimeError("Dataset scripts are no longer supported"))


def test_hub_rows_are_numbered(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: datasets.Dataset.from_list(ROWS))
    assert [(row.row, row.content) for row in load_hub("owner/name", None, "train")] == list(enumerate(ROWS))


def test_offline_mode_answers_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import datasets
    import huggingface_hub.constants

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(DataError, match=r"data\.id=owner/name.*data=json"):
        load_hub("owner/name", None, "train")


def test_a_local_name_is_not_taken_for_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="data=json"):
        load_hub("owner/name", None, "train")


# --------------------------------------------------------------------------------------- real data


@needs_data
@pytest.mark.parametrize(
    ("name", "accepted", "rejected_rows"),
    [
        ("alpaca_5000.json", 4998, [2335, 4658]),
        ("alpaca_cleaned_51k.json.gz", 51941, []),
        ("alpaca_gpt4_999.json", 999, []),
    ],
)
def test_real_alpaca_files(name: str, accepted: int, rejected_rows: list[int]) -> None:
    path = Path(os.environ["GRADSIFT_DATA"]) / "instruct" / name
    examples, rejected = parse_rows(read_rows(path), "auto", FIELDS, name)
    assert len(examples) == accepted
    assert [row.row for row in rejected] == rejected_rows
    assert {row.reason for row in rejected} <= {"field 'output' is empty"}
    assert len({example.example_id for example in examples}) == accepted
    if name == "alpaca_gpt4_999.json":
        assert accepted - len({example.content_hash for example in examples}) == 14


@needs_data
def test_real_file_of_another_schema_gets_its_columns_listed() -> None:
    path = Path(os.environ["GRADSIFT_DATA"]) / "instruct" / "self_instruct_seed_tasks.jsonl"
    with pytest.raises(DataError, match=r"id, name, instruction, instances, is_classification.*data\.fields"):
        parse_rows(read_rows(path), "auto", FIELDS, path.name)


@needs_data
def test_real_test_set_in_sharegpt_shape_has_no_answers() -> None:
    path = Path(os.environ["GRADSIFT_DATA"]) / "benchmarks" / "lima_test_set.jsonl"
    with pytest.raises(DataError, match="none of its 300 rows"):
        parse_rows(read_rows(path), "sharegpt", FIELDS, path.name)
