"""Ids, files and samples of examples."""

from __future__ import annotations

import datetime
import decimal
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradsift.data.examples import (
    Example,
    Rejected,
    Turn,
    content_hash,
    draw,
    json_value,
    make_example,
    read_examples,
    write_examples,
    write_rejected,
)
from gradsift.errors import ConfigError, DataError

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
TURNS = st.lists(st.builds(Turn, st.sampled_from(["system", "user", "assistant"]), TEXT), max_size=3)
ORIGINAL = st.dictionaries(st.text(max_size=4), JSON, max_size=3)


def rows_with(original: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[list[Any]]:
    return st.lists(st.tuples(TURNS, TEXT, TEXT, TEXT, original), max_size=4)


def dataset(rows: list[tuple[list[Turn], str, str, str, dict[str, Any]]]) -> list[Example]:
    occurrences: Counter[str] = Counter()
    return [make_example(i, *row, occurrences=occurrences) for i, row in enumerate(rows)]


def prompts(count: int, repeats: int = 1) -> list[Example]:
    return dataset([([], f"prompt {i // repeats}", "", f"answer {i}", {}) for i in range(count)])


@settings(deadline=None)
@given(rows_with(st.just({})))
def test_example_ids_are_unique(rows: list[Any]) -> None:
    ids = [example.example_id for example in dataset(rows * 3)]
    assert len(set(ids)) == len(ids)


def test_exact_duplicates_share_the_content_hash_and_count_their_occurrence() -> None:
    first, other, second = dataset([([], "a", "", "b", {}), ([], "a", "", "c", {}), ([], "a", "", "b", {"x": 1})])
    assert first.content_hash == second.content_hash != other.content_hash
    assert (first.example_id, second.example_id) == (f"{first.content_hash}-0", f"{first.content_hash}-1")
    assert len(first.content_hash) == 16


def test_content_hash_keeps_borders_between_fields() -> None:
    user, assistant = Turn("user", "a"), Turn("assistant", "b")
    variants = [
        ([], "ab", "c", "d"),
        ([], "a", "bc", "d"),
        ([], "a", "b", "cd"),
        ([], 'a", "b', "c", "d"),
        ([user, assistant], "ab", "c", "d"),
        ([Turn("user", "ab"), Turn("assistant", "")], "ab", "c", "d"),
        ([Turn("usera", ""), assistant], "ab", "c", "d"),
    ]
    assert len({content_hash(*variant) for variant in variants}) == len(variants)


@settings(deadline=None)  # the first case imports pyarrow
@given(rows_with(ORIGINAL))
def test_write_then_read_gives_equal_examples(tmp_path_factory: pytest.TempPathFactory, rows: list[Any]) -> None:
    path = tmp_path_factory.mktemp("examples") / "examples.parquet"
    examples = dataset(rows)
    write_examples(path, examples)
    assert read_examples(path) == examples


def test_files_keep_emoji_right_to_left_text_and_ragged_originals(tmp_path: Path) -> None:
    odd = {"deep": [{"a": [1, None, {"ß": "\ud83d"}]}], "big": 10**40, "مرحبا": "\u202eabc\x00"}
    examples = dataset(
        [([Turn("user", "שלום"), Turn("assistant", "👩‍🚀")], "مرحبا", "\r\n\t", "🏳️‍🌈", odd), ([], "a", "", "b", {})]
    )
    write_examples(tmp_path / "e.parquet", examples)
    assert read_examples(tmp_path / "e.parquet") == examples


def test_json_value_covers_what_parquet_holds() -> None:
    moment = datetime.datetime(2024, 5, 1, 12, 30, tzinfo=datetime.UTC)
    assert json_value([math.nan, math.inf, -math.inf, 1.5]) == [None, "Infinity", "-Infinity", 1.5]
    assert json_value({"when": moment, "day": moment.date()}) == {
        "when": "2024-05-01T12:30:00+00:00",
        "day": "2024-05-01",
    }
    assert json_value((b"\xff\x00", decimal.Decimal("1.10"), True)) == ["/wA=", "1.10", True]
    with pytest.raises(TypeError, match="object"):
        json_value({"image": object()})


def test_broken_example_files_are_named(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "e.parquet"
    with pytest.raises(DataError, match=r"e\.parquet"):
        read_examples(path)
    write_examples(path, prompts(50))
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(DataError, match=r"e\.parquet"):
        read_examples(path)
    pq.write_table(pa.table({"a": [1]}), path)
    with pytest.raises(DataError, match="no file of examples"):
        read_examples(path)


ROW = {
    "a": (1, "\ud83d"),
    "day": datetime.date(2024, 1, 2),
    "raw": b"\xff",
    "deep": json.loads("[" * 900 + "]" * 900),
    "image": object(),
}


def test_rejected_rows_are_written_as_json_lines(tmp_path: Path) -> None:
    write_rejected(tmp_path / "r.jsonl", [Rejected(3, "field 'ü' is empty", 7), Rejected(4, "x", None, ROW)])
    lines = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    kept = {"a": [1, "\ud83d"], "day": "2024-01-02", "raw": "/w==", "deep": "(not kept: nested too deep)"}
    kept["image"] = "(not kept: a object, which JSON cannot hold)"
    assert lines == [
        {"row": 3, "reason": "field 'ü' is empty", "line": 7, "content": None},
        {"row": 4, "reason": "x", "line": None, "content": kept},
    ]


@settings(deadline=None)  # the first case imports numpy
@given(st.integers(1, 60), st.integers(0, 20), st.integers(1, 5), st.integers(0, 5))
def test_held_out_examples_never_share_a_prompt_with_the_pool(
    limit: int, holdout: int, repeats: int, seed: int
) -> None:
    examples = prompts(60, repeats)
    pool, held = draw(examples, limit, holdout, seed)
    assert len(held) == holdout
    assert len(pool) <= limit
    assert not {e.instruction for e in pool} & {e.instruction for e in held}
    for part in (pool, held):
        assert [e.row_index for e in part] == sorted({e.row_index for e in part})


def test_no_example_is_lost_where_prompts_differ() -> None:
    pool, held = draw(prompts(50), None, 20, seed=0)
    assert sorted(e.row_index for e in pool + held) == list(range(50))
    assert draw(prompts(50), None, 0, seed=0) == (prompts(50), [])


def test_held_out_examples_do_not_depend_on_the_limit_and_samples_are_nested() -> None:
    examples = prompts(100)
    small, held = draw(examples, 10, 7, seed=3)
    large, also_held = draw(examples, 40, 7, seed=3)
    assert held == also_held
    assert {e.row_index for e in small} < {e.row_index for e in large}
    assert draw(examples, 10, 7, seed=3) == (small, held)
    assert draw(examples, 10, 7, seed=4) != (small, held)


@pytest.mark.parametrize("holdout", [10, 11, 500])
def test_holdout_that_leaves_nothing_is_refused(holdout: int) -> None:
    with pytest.raises(ConfigError, match=rf"data\.holdout={holdout}.*smaller"):
        draw(prompts(10), None, holdout, seed=0)


def test_holdout_of_a_single_prompt_cannot_leave_a_pool() -> None:
    with pytest.raises(ConfigError, match="equal prompts"):
        draw(prompts(10, repeats=10), None, 3, seed=0)
