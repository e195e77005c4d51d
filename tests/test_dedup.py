"""Laws of duplicates: near ones equal those of comparing all pairs, the first row is kept, every drop is listed."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_load import runtime

from gradsift.artifacts import Artifact, fingerprint_of
from gradsift.config import COPIES, FieldsConfig, JsonDataConfig, VerifiableDataConfig
from gradsift.data.dedup import bands_of, deduplicated, jaccard, near_duplicates, shingles
from gradsift.data.examples import Example, Turn
from gradsift.data.files import file_kind, hash_of, read_rows
from gradsift.data.formats import parse_rows
from gradsift.data.load import ROWS_VERSION, heldout_of, labels_of, load, pool_of
from gradsift.data.verifiable import generate, task_of
from gradsift.errors import ConfigError

WORDS = re.findall(r"\w+", "the a red bird sings of seven small rivers and never asks why they run so fast")


def examples_of(texts: Sequence[tuple[str, str, str]], first_row: int = 0) -> list[Example]:
    rows = [
        (first_row + i, dict(zip(("instruction", "input", "output"), text, strict=True)))
        for i, text in enumerate(texts)
    ]
    return parse_rows(rows, "alpaca", FieldsConfig())[0]


def crowd(seed: int, families: int = 25, copies: int = 6) -> list[Example]:
    """Return texts and copies with some changed words, in random order."""
    rng = np.random.default_rng(seed)
    vocabulary = [word + suffix for word in WORDS for suffix in ("", "s", "ed", "ly", "er")]
    texts = []
    for _ in range(families):
        words = rng.choice(vocabulary, rng.integers(2, 60)).tolist()
        for _ in range(copies):
            copy = list(words)
            for place in rng.integers(0, len(copy), rng.integers(0, 4)):
                copy[place] = str(rng.choice(vocabulary))
            half = len(copy) // 2
            texts.append((" ".join(copy[:half]) or "say", "", " ".join(copy[half:])))
    return examples_of([texts[i] for i in rng.permutation(len(texts))])


def slow_drops(examples: Sequence[Example], threshold: float) -> dict[int, int]:
    """Return {dropped row: most similar kept row}, comparing every example with all kept ones before it."""

    def grams(example: Example) -> set[str]:
        words = re.split(r"\s+", f"{example.instruction} {example.input} {example.output}".strip())
        return {" ".join(words[i : i + 3]) for i in range(max(1, len(words) - 2))}

    all_grams = [grams(example) for example in examples]
    stays: list[int] = []
    drops: dict[int, int] = {}
    for position, own in enumerate(all_grams):
        likeness = [len(own & all_grams[o]) / len(own | all_grams[o]) for o in stays]
        if likeness and max(likeness) >= threshold:
            drops[position] = stays[likeness.index(max(likeness))]
        else:
            stays.append(position)
    return drops


# ------------------------------------------------------------------------------------------- which rows


@pytest.mark.parametrize("threshold", [0.5, 0.8, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_near_duplicates_are_those_of_all_pairs(seed: int, threshold: float) -> None:
    examples = crowd(seed)
    expected = slow_drops(examples, threshold)
    duplicates = near_duplicates(examples, range(len(examples)), threshold)
    assert {position: original for position, (original, _) in duplicates.items()} == expected
    assert 10 < len(expected) < len(examples) - 10  # there is something to find, and something to leave


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32 - 1), st.sampled_from([0.5, 0.65, 0.8, 0.95]))
def test_nothing_is_dropped_that_is_not_as_similar_as_the_threshold(seed: int, threshold: float) -> None:
    examples = crowd(seed, families=6, copies=4)
    duplicates = near_duplicates(examples, range(len(examples)), threshold)
    for position, (original, similarity) in duplicates.items():
        assert original < position
        assert original not in duplicates  # the row that is named is kept
        assert similarity == jaccard(shingles(examples[position]), shingles(examples[original])) >= threshold


@pytest.mark.parametrize("threshold", [0.5, 0.6, 0.7, 0.8, 0.9, 0.99])
def test_the_bands_overlook_a_pair_at_the_threshold_once_in_a_thousand(threshold: float) -> None:
    bands, rows = bands_of(threshold)
    assert bands * rows <= 128
    rng = np.random.default_rng(0)
    agree = (rng.random((20_000, bands, rows)) < threshold).all(2).any(1)
    assert agree.mean() > 0.998
    assert (1 - threshold ** (rows + 1)) ** (128 // (rows + 1)) > 1e-3  # longer bands would overlook more


def test_of_a_chain_more_than_the_first_row_stays() -> None:
    words = [f"w{i}" for i in range(30)]
    texts = [("say", "", " ".join([*words[:30], *(f"x{j}{i}" for i in range(5 * j))])) for j in range(3)]
    first, second, third = (shingles(example) for example in examples_of(texts))
    assert jaccard(first, second) >= 0.8 > jaccard(first, third)
    kept, rejected = deduplicated(examples_of(texts, first_row=10), "near", 0.8)
    assert [example.row_index for example in kept] == [10, 12]
    assert [(row.row, row.reason) for row in rejected] == [(11, f"near duplicate of row 10 (Jaccard {29 / 34:.2f})")]


def test_exact_drops_equal_texts_alone_and_near_both() -> None:
    long = " ".join(WORDS)
    texts = [
        ("say", "", long),
        ("say", "", long),
        ("say", "", long + " today"),
        ("say", "it twice", "no"),
        ("say", "", long),
    ]
    kept, rejected = deduplicated(examples_of(texts), "exact", 0.8)
    assert [example.row_index for example in kept] == [0, 2, 3]
    assert [(row.row, row.reason) for row in rejected] == [(1, "duplicate of row 0"), (4, "duplicate of row 0")]
    kept, rejected = deduplicated(examples_of(texts), "near", 0.8)
    assert [row.row for row in rejected] == [1, 2, 4]
    assert "near duplicate of row 0 (Jaccard 0.9" in rejected[1].reason
    assert rejected[2].reason == "duplicate of row 0"


@pytest.mark.parametrize(
    ("one", "other"),
    [("3 + 4", "3 - 4"), ("Red", "red"), ("一二三四五六七", "一二三四五六八"), ("a b", "b a"), ("x", "y")],
)
def test_signs_case_order_and_scripts_without_spaces_count(one: str, other: str) -> None:
    first, second = examples_of([("work it out", "", one), ("work it out", "", other)])
    assert jaccard(shingles(first), shingles(second)) < 0.8


def test_white_space_does_not_count_and_a_history_does() -> None:
    first, second = examples_of([("say it", "", "a  b\nc"), ("say it", "", "a b c")])
    assert jaccard(shingles(first), shingles(second)) == 1
    talk = Example(0, "0-0", "0", (Turn("user", "hello"),), "say it", "", "a b c", {})
    assert jaccard(shingles(talk), shingles(second)) < 1


def test_no_row_and_equal_rows() -> None:
    assert deduplicated([], "near", 0.8) == ([], [])
    for dedup in ("exact", "near"):
        kept, rejected = deduplicated(examples_of([("a", "", "b")] * 4), dedup, 0.8)
        assert ([example.row_index for example in kept], len(rejected)) == ([0], 3)


@pytest.mark.skipif("GRADSIFT_DATA" not in os.environ, reason="GRADSIFT_DATA is unset: no real data here")
def test_real_rows_lose_their_exact_duplicates_and_those_of_all_pairs() -> None:
    path = Path(os.environ["GRADSIFT_DATA"]) / "instruct" / "alpaca_gpt4_999.json"
    examples, _ = parse_rows(read_rows(path), "auto", FieldsConfig())
    assert len(deduplicated(examples, "exact", 0.8)[1]) == 14
    some = examples[:300]
    own = [shingles(example) for example in some]
    stays: list[int] = []
    for position in range(len(some)):
        if all(jaccard(own[position], own[other]) < 0.5 for other in stays):
            stays.append(position)
    kept, _ = deduplicated(some, "near", 0.5)
    assert [example.row_index for example in kept] == [some[position].row_index for position in stays]


# ------------------------------------------------------------------------------------------ the load stage


def loaded(folder: Path, rows: list[dict[str, str]] | None = None, **changes: Any) -> Artifact:
    path = folder / "rows.json"
    if rows is not None:
        path.write_text(json.dumps(rows))
    return load(runtime(folder / "store"), JsonDataConfig(name="json", path=str(path), **changes))


def rejected_of(artifact: Artifact) -> list[tuple[int, str]]:
    lines = artifact.file("rejected.jsonl").read_text().splitlines()
    return [(row["row"], row["reason"]) for row in map(json.loads, lines)]


LONG = " ".join(WORDS)
ROWS = [
    {"instruction": "say", "output": LONG},
    {"instruction": "nothing", "output": " "},
    {"instruction": "say", "output": LONG + " today"},
    {"instruction": "say", "output": LONG, "source": "again"},
    *({"instruction": f"tell me of {i}", "output": f"{i} {i} {i}"} for i in range(6)),
]


def test_dropped_rows_stand_among_the_rejected_in_the_order_of_the_file(tmp_path: Path) -> None:
    artifact = loaded(tmp_path, ROWS, dedup="near")
    (empty, near, equal) = rejected_of(artifact)
    assert (empty[0], near[0], equal) == (1, 2, (3, "duplicate of row 0"))
    assert near[1].startswith("near duplicate of row 0 (Jaccard 0.9")
    assert [example.row_index for example in pool_of(artifact)] == [0, *range(4, 10)]
    assert [artifact.info[name] for name in ("rows", "accepted", "rejected")] == [7, 7, 3]


def test_duplicates_go_before_limit_and_holdout_are_drawn(tmp_path: Path) -> None:
    artifact = loaded(tmp_path, ROWS, dedup="near", limit=3, holdout=4)
    pool, held = pool_of(artifact), heldout_of(artifact)
    assert (len(pool), len(held)) == (3, 4)  # of 7: had they been drawn first, some would be missing
    assert {example.row_index for example in [*pool, *held]} == {0, *range(4, 10)}


def test_a_holdout_that_duplicates_leave_nothing_for_is_refused(tmp_path: Path) -> None:
    rows = [{"instruction": "say", "output": "yes"}] * 5
    assert len(pool_of(loaded(tmp_path, rows, dedup="exact"))) == 1
    with pytest.raises(ConfigError, match=r"data.dedup=exact drops 4 of the 5 rows, and data.holdout=2 leaves none"):
        loaded(tmp_path, dedup="exact", holdout=2)


def test_without_dedup_the_artifact_is_the_one_from_before_there_was_any(tmp_path: Path) -> None:
    artifact = loaded(tmp_path, ROWS)
    settings = asdict(JsonDataConfig(name="json"))
    del settings["dedup"], settings["dedup_threshold"], settings["corruption"], settings["scores"]
    settings |= {"path": None, "kind": file_kind(tmp_path / "rows.json"), "sha256": hash_of(tmp_path / "rows.json")}
    assert artifact.fingerprint == fingerprint_of("load", ROWS_VERSION, settings, [])
    assert loaded(tmp_path, dedup_threshold=0.9).path == artifact.path
    assert rejected_of(artifact) == [(1, "field 'output' is empty")]


def test_options_without_effect_share_the_artifact(tmp_path: Path) -> None:
    def fingerprint(**changes: Any) -> str:
        return loaded(tmp_path, ROWS, **changes).fingerprint

    assert fingerprint(dedup="exact") == fingerprint(dedup="exact", dedup_threshold=0.9)
    assert len({fingerprint(), *(fingerprint(dedup=d, dedup_threshold=t) for d, t in DIFFERENT)}) == 4


DIFFERENT = [("exact", 0.8), ("near", 0.8), ("near", 0.9)]


@pytest.mark.parametrize("dedup", ["exact", "near"])
def test_labels_of_the_world_stay_beside_their_examples(dedup: str, tmp_path: Path) -> None:
    config = VerifiableDataConfig(
        name="verifiable", size=400, duplicates=0.2, benchmark_items=40, dedup=dedup, limit=150
    )
    artifact = load(runtime(tmp_path), config)
    truth = generate(size=400, duplicates=0.2, benchmark_items=40, seed=0)
    pool, labels = pool_of(artifact), labels_of(artifact)
    assert labels is not None
    assert len(pool) == len(labels.quality) == 150
    for example, quality in zip(pool, labels.quality, strict=True):
        label, row = truth.labels[example.row_index], truth.rows[example.row_index]
        lone = label.quality in COPIES and quality == "clean"
        assert (label.quality if lone else quality, example.output) == (label.quality, row["output"])
    questions = [task_of(example.instruction, example.input).question for example in pool]
    assert [family for family, _ in questions] == labels.family
    clean = {question for question, quality in zip(questions, labels.quality, strict=True) if quality == "clean"}
    copies_kept = [q for q, quality in zip(questions, labels.quality, strict=True) if quality in COPIES]
    assert set(copies_kept) <= clean  # a copy repeats something
    relabelled = sum(truth.labels[e.row_index].quality in COPIES for e in pool) - len(copies_kept)
    assert relabelled > 0
    assert max(Counter(example.content_hash for example in pool).values()) == 1
    dropped = Counter(truth.labels[row].quality for row, _ in rejected_of(artifact))
    assert artifact.info["rejected"] == dropped.total() == 400 - artifact.info["accepted"]
    copies = sum(label.quality == "exact_duplicate" for label in truth.labels)
    # the first row stays, which may be the one that is called a duplicate: the clean row is dropped then
    assert dropped["exact_duplicate"] + dropped["clean"] >= copies > 0
    assert dedup == "near" or set(dropped) == {"exact_duplicate", "clean"}
