"""Laws of injected corruption: exact shares, nothing lost, nothing else changed, and each kind does what it says."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_load import runtime

from gradsift.artifacts import Artifact, fingerprint_of
from gradsift.config import COPIES, CORRUPTIONS, CorruptionConfig, JsonDataConfig, VerifiableDataConfig
from gradsift.data.corruption import (
    Corrupted,
    changes_of_text,
    contradicted,
    corrupt,
    edited,
    garbled,
    stand_ins,
    truncated,
)
from gradsift.data.examples import Example, make_example
from gradsift.data.load import SPOILT, corruption_of, heldout_of, labels_of, load, pool_of
from gradsift.data.load import VERSION as LOAD_VERSION
from gradsift.data.verifiable import VOCABULARY, answers_match, task_of
from gradsift.errors import ConfigError

IN_PLACE = tuple(kind for kind in CORRUPTIONS if kind not in COPIES)


def rows_of(count: int) -> list[dict[str, str]]:
    """Free text in which some answers have a single word, and some neither number nor verb."""
    answers = ("It is number {}, they say.", "red", "Red and green\nand blue {}", "many small houses stand there")
    return [
        {"instruction": f"Tell me of the thing {i}, please", "input": "", "output": answers[i % 4].format(i)}
        for i in range(count)
    ]


def examples_of(count: int) -> list[Example]:
    seen: Counter[str] = Counter()
    return [
        make_example(i, (), row["instruction"], row["input"], row["output"], row, seen)
        for i, row in enumerate(rows_of(count))
    ]


def corrupted(examples: list[Example], **changes: Any) -> Corrupted:
    sound = changes.pop("sound", range(len(examples)))
    kinds = list(changes.pop("kinds", CORRUPTIONS))
    config = CorruptionConfig(**({"share": 0.3, "kinds": kinds} | changes))
    return corrupt(examples, changes_of_text(examples), config, 1000, sound)


# --------------------------------------------------------------------------------------------- laws


@settings(max_examples=30, deadline=None)
@given(
    count=st.integers(8, 80),
    share=st.floats(0.1, 0.6),
    kinds=st.lists(st.sampled_from(CORRUPTIONS), min_size=1, unique=True),
    seed=st.integers(0, 3),
)
def test_shares_are_exact_and_other_examples_are_unchanged(
    count: int, share: float, kinds: list[str], seed: int
) -> None:
    examples = examples_of(count)
    total = round(share * count)
    try:
        result = corrupted(examples, share=share, kinds=kinds, seed=seed)
    except ConfigError:
        assert total < len(kinds), "three quarters of the rows take every kind"
        return
    counts = Counter(kind for kind in result.kind if kind)
    assert set(counts) == set(kinds)
    assert sum(counts.values()) == total
    assert max(counts.values()) - min(counts.values()) <= 1
    copies = sum(counts[kind] for kind in COPIES)
    assert len(result.examples) == len(result.kind) == len(result.origin) == count + copies
    for before, after, kind in zip(examples, result.examples, result.kind, strict=False):
        assert kind not in COPIES
        assert (after is before) == (kind is None)
        assert (after.row_index, after.original, after.instruction) == (
            before.row_index,
            before.original,
            before.instruction,
        )
        if kind is not None:
            assert after.output != before.output
            assert after.output.strip()
    assert len({example.example_id for example in result.examples}) == len(result.examples)
    assert [example.row_index for example in result.examples[count:]] == list(range(1000, 1000 + copies))


def test_equal_seeds_give_equal_corruption_and_others_another() -> None:
    examples = examples_of(60)
    assert corrupted(examples) == corrupted(examples)
    assert corrupted(examples).kind != corrupted(examples, seed=1).kind


def test_copies_repeat_a_clean_row_and_are_numbered_as_repeats() -> None:
    examples = examples_of(60)
    result = corrupted(examples, kinds=COPIES)
    sources = [origin for origin in result.origin if origin is not None]
    assert len(set(sources)) == len(sources) == 18
    for example, kind, origin in zip(result.examples, result.kind, result.origin, strict=True):
        assert (origin is None) == (kind is None)
        if origin is None:
            continue
        source = result.examples[origin]
        assert source is examples[origin]
        assert (example.input, example.output, example.original) == (source.input, source.output, source.original)
        if kind == "exact_duplicate":
            assert example.content_hash == source.content_hash
            assert example.example_id == f"{source.content_hash}-1"
        else:
            assert example.instruction != source.instruction
            assert example.example_id.endswith("-0")


def test_only_sound_rows_are_corrupted_or_copied() -> None:
    examples = examples_of(60)
    result = corrupted(examples, sound=range(30, 60))
    assert not any(result.kind[:30])
    assert all(origin is None or origin >= 30 for origin in result.origin)


def test_mismatched_answers_are_other_rows_answers() -> None:
    examples = examples_of(40)
    answers = {example.output for example in examples}
    result = corrupted(examples, kinds=["mismatched_answer"])
    for before, after, kind in zip(examples, result.examples, result.kind, strict=True):
        assert after.output in answers
        assert (after.output != before.output) == (kind is not None)


def test_answers_without_number_or_verb_are_replaced_and_counted() -> None:
    examples = examples_of(40)
    result = corrupted(examples, kinds=["wrong_answer"], share=0.9)
    bare = [e.output in ("red", "many small houses stand there") for e in examples]
    expected = sum(is_bare and kind is not None for is_bare, kind in zip(bare, result.kind, strict=True))
    assert stand_ins(examples, result.kind) == expected > 0


# ---------------------------------------------------------------------------------------- the kinds


@pytest.mark.parametrize(
    ("answer", "wrong"),
    [
        ("It is warm. They were not there!", "It is not warm. They were there!"),
        ("You cannot swim", "You can swim"),
        ("You can't swim", "You can swim"),
        ("Yes, it is.", "No, it is not."),
        ("FALSE", "TRUE"),
        ("1. red\n2. It can fly", "1. red\n2. It can not fly"),
    ],
)
def test_contradictions(answer: str, wrong: str) -> None:
    assert contradicted(answer, random.Random(0)) == wrong


@pytest.mark.parametrize("answer", ["red", "many small houses", "1. red\n2. green", "¿Qué? 好"])
def test_what_has_neither_number_nor_verb_is_not_contradicted(answer: str) -> None:
    assert contradicted(answer, random.Random(0)) is None


def test_every_number_becomes_another_of_its_length() -> None:
    for seed in range(20):
        wrong = contradicted("7 of 31, in 1999", random.Random(seed))
        assert wrong is not None
        few, many, year = (part.rstrip(",") for part in wrong.split() if part[0].isdigit())
        assert (len(few), len(many), len(year)) == (1, 2, 4)
        assert few != "7" and many != "31" and year != "1999"


def test_a_number_longer_than_python_reads_is_another_one_too() -> None:
    pi = "3." + "1415926535" * 900
    wrong = contradicted(pi, random.Random(0))
    assert wrong is not None and wrong != pi
    assert len(wrong) == len(pi) and wrong.replace(".", "").isdigit()


def test_truncation_keeps_a_beginning_of_whole_words() -> None:
    seen = {truncated("one two\n three", random.Random(seed)) for seed in range(20)}
    assert seen == {"one", "one two"}
    assert truncated("one", random.Random(0)) is None


def test_garbling_keeps_the_letters_and_changes_their_order() -> None:
    text = garbled("some longer words", random.Random(0))
    assert text is not None and text != "some longer words"
    assert sorted(text) == sorted("some longer words")
    assert sorted(map(len, text.split())) == [4, 5, 6]
    assert garbled("aaa", random.Random(0)) is None


@pytest.mark.parametrize("instruction", ["Go", "a a", "Name a\ncolour, please", " ".join(map(str, range(45)))])
def test_an_edited_instruction_differs_in_few_words(instruction: str) -> None:
    words = Counter(instruction.split())
    for seed in range(30):
        text = edited(instruction, random.Random(seed))
        assert text is not None and text != instruction
        changed = Counter(text.split())
        assert sum(((words - changed) + (changed - words)).values()) <= max(1, sum(words.values()) // 10)
    assert edited("  ", random.Random(0)) is None


# ---------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("count", "changes", "message"),
    [
        (10, {}, "data.corruption.share=0.3 of 10 rows is 3, too few for 6 kinds"),
        (40, {"share": 0.95, "kinds": ["truncated"]}, "38 rows of kind truncated, but only 30 of the 40 rows"),
        (40, {"sound": range(4)}, "lower the share or leave"),
    ],
)
def test_too_few_rows_are_refused_by_name(count: int, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        corrupted(examples_of(count), **changes)


def test_a_dataset_of_one_answer_has_none_to_mismatch() -> None:
    examples = examples_of(40)[1::4]  # all of them "red"
    with pytest.raises(ConfigError, match="kind mismatched_answer, but only 0"):
        corrupted(examples, kinds=["mismatched_answer"])


# -------------------------------------------------------------------------------------- load stage


def loaded(tmp_path: Path, **changes: Any) -> Artifact:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([*rows_of(60), {"instruction": "rejected", "output": ""}]))
    return load(runtime(tmp_path / "store"), JsonDataConfig(name="json", path=str(path), **changes))


def world(tmp_path: Path, **changes: Any) -> Artifact:
    options = {"size": 300, "spoilt": 0.2, "benchmark_items": 40} | changes
    return load(runtime(tmp_path), VerifiableDataConfig(name="verifiable", **options))


def test_labels_stand_beside_the_corrupted_rows_and_held_out_rows_stay_clean(tmp_path: Path) -> None:
    clean = loaded(tmp_path, limit=40, holdout=10)
    artifact = loaded(tmp_path, limit=40, holdout=10, corruption=CorruptionConfig(share=0.3))
    pool, labels = pool_of(artifact), labels_of(artifact)
    assert labels is not None and labels.family is None
    assert artifact.info["rows"] == len(pool) == len(labels.quality) == 44
    assert artifact.info["corrupted"] == dict.fromkeys(CORRUPTIONS, 2) | {
        "stand_ins": artifact.info["corrupted"]["stand_ins"]
    }
    assert labels.quality == [kind or "clean" for kind in labels.corruption or []]
    assert corruption_of(artifact) == {i: kind for i, kind in enumerate(labels.quality) if kind != "clean"}
    assert heldout_of(artifact) == heldout_of(clean)
    for before, after, quality in zip(pool_of(clean), pool, labels.quality, strict=False):
        assert (before == after) == (quality == "clean")
    assert [example.row_index for example in pool[40:]] == [61, 62, 63, 64]  # row 60 was rejected
    assert corruption_of(clean) == {}


def test_options_that_are_off_are_not_in_the_fingerprint_of_the_data(tmp_path: Path) -> None:
    """Data without corruption and delay has the same identity as before these options existed."""
    settings = {
        "name": "verifiable",
        "limit": None,
        "holdout": 0,
        "seed": 0,
        "size": 300,
        "spoilt": 0.2,
        "duplicates": 0.06,
        "benchmark_items": 40,
    }
    assert world(tmp_path).fingerprint == fingerprint_of("load", LOAD_VERSION, settings, [])
    assert world(tmp_path, corruption=CorruptionConfig(seed=3)).fingerprint == world(tmp_path).fingerprint


@pytest.mark.parametrize(
    "change", [{"share": 0.2}, {"share": 0.3}, {"share": 0.3, "seed": 1}, {"share": 0.3, "kinds": ["garbled"]}]
)
def test_corruption_is_in_the_fingerprint(change: dict[str, Any], tmp_path: Path) -> None:
    found = {loaded(tmp_path).fingerprint, loaded(tmp_path, corruption=CorruptionConfig(share=0.25)).fingerprint}
    assert loaded(tmp_path, corruption=CorruptionConfig(**change)).fingerprint not in found


def test_the_worlds_corruption_keeps_to_its_words_and_its_own_labels(tmp_path: Path) -> None:
    before, artifact = world(tmp_path), world(tmp_path, corruption=CorruptionConfig(share=0.4))
    pool, labels, was = pool_of(artifact), labels_of(artifact), labels_of(before)
    assert labels is not None and was is not None and labels.family is not None and was.family is not None
    assert artifact.info["corrupted"] == dict.fromkeys(CORRUPTIONS, 20)
    known = set(VOCABULARY)
    for position, example in enumerate(pool):
        assert known.issuperset(f"{example.instruction} {example.input} {example.output}".split())
        right = task_of(example.instruction, example.input).answer
        assert task_of(example.instruction, example.input).question[0] == labels.family[position]
        assert answers_match(example.output, right) is (labels.quality[position] not in SPOILT)
    for position, (quality, family) in enumerate(zip(was.quality, was.family, strict=True)):
        assert labels.family[position] == family
        if quality != "clean":
            assert labels.quality[position] == quality
            assert labels.corruption is not None and labels.corruption[position] is None
    prompts = {(example.instruction, example.input) for example in pool[:300]}
    for example, quality in zip(pool[300:], labels.quality[300:], strict=True):
        assert ((example.instruction, example.input) in prompts) is (quality == "exact_duplicate")
