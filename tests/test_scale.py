"""Laws of the code for pools beyond memory: results equal the simple implementation's, with less memory."""

from __future__ import annotations

import json
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.scale import Pool, file_bytes, make_inputs
from gradsift.artifacts import Artifact
from gradsift.data import examples as examples_module
from gradsift.data.examples import Example, Turn, make_example, read_blocks, read_column, read_examples, write_examples
from gradsift.errors import DataError
from gradsift.gradients.statistics import NORMS_FILE, compute_statistics, read_statistics
from gradsift.scoring.scores import EXCLUDED, UNDEFINED, Scores, read_scores, write_scores
from gradsift.scoring.stage import scores_of
from gradsift.selection.checks import lengths
from gradsift.selection.stage import SELECTION_FILE, positions_of, write_selection
from gradsift.selection.topk import topk


@pytest.fixture(scope="module", autouse=True)
def small_blocks() -> Iterator[None]:
    """Read three rows per block, so that a few rows are several blocks."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(examples_module, "_BLOCK", 3)
        yield


def pool(count: int) -> list[Example]:
    seen: Counter[str] = Counter()
    before = (Turn("system", "be kind"), Turn("user", "hi"), Turn("assistant", "שלום"))
    odd = {"half a pair": "\ud83d", "deep": [1, None]}
    return [
        make_example(
            3 * i, before[: i % 4], f"ask {i} 🏳️‍🌈", "in" * (i % 2), "x" * i, odd if i % 5 == 2 else {"i": i}, seen
        )
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pool") / "examples.parquet"
    write_examples(path, pool(11))
    return path


# ------------------------------------------------------------------------------------------- examples


def test_blocks_are_the_examples_in_their_order(file: Path) -> None:
    assert read_examples(file) == pool(11)
    assert [block.num_rows for block in read_blocks(file)] == [3, 3, 3, 2]
    assert read_column(file, "row_index").to_pylist() == list(range(0, 33, 3))


def test_blocks_of_a_broken_file_are_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"e\.parquet is missing"):
        list(read_blocks(tmp_path / "e.parquet"))
    pq.write_table(pa.table({"a": [1]}), tmp_path / "e.parquet")
    with pytest.raises(DataError, match=r"e\.parquet is missing, broken or no file of examples"):
        read_column(tmp_path / "e.parquet", "row_index")


def test_lengths_are_those_of_a_loop_over_the_examples(file: Path) -> None:
    found = lengths(file)
    for position, example in enumerate(pool(11)):
        answers = [turn.content for turn in example.history if turn.role == "assistant"] + [example.output]
        asked = [turn.content for turn in example.history if turn.role != "assistant"]
        asked += [example.instruction, example.input]
        assert found["response_characters"][position] == sum(map(len, answers))
        assert found["prompt_characters"][position] == sum(map(len, asked))
        assert found["response_to_prompt"][position] == sum(map(len, answers)) / sum(map(len, asked))


# ------------------------------------------------------------------------------------------ selection


def selection_the_simple_way(positions: list[int], scores: Scores, examples: list[Example]) -> bytes:
    lines = []
    for rank, position in enumerate(positions, start=1):
        example = examples[position]
        own = {"rank": rank, "score": float(scores.score[position])}
        own |= {"example_id": example.example_id, "row_index": example.row_index}
        own |= {"corruption": "garbled"} if position == 4 else {}
        row = {**example.original, "gradsift": own}
        half_a_pair = "half a pair" in row
        lines.append(json.dumps(row, ensure_ascii=half_a_pair) + "\n")
    return "".join(lines).encode()


@settings(deadline=None)
@given(st.permutations(range(11)), st.integers(1, 11))
def test_a_selection_is_written_as_if_all_examples_were_at_hand(file: Path, order: list[int], size: int) -> None:
    scores, out = Scores(np.linspace(0, 1, 11)), file.parent / "s.jsonl"
    write_selection(out, np.array(order[:size]), scores, file, {4: "garbled"})
    assert out.read_bytes() == selection_the_simple_way(order[:size], scores, pool(11))
    assert sorted(path.name for path in file.parent.iterdir()) == ["examples.parquet", "s.jsonl"]


def test_to_write_a_selection_takes_a_block_and_neither_the_pool_nor_itself(tmp_path: Path) -> None:
    seen: Counter[str] = Counter()
    rows = [make_example(i, (), f"{i}", "", "x", {"text": f"{i}" * 400}, seen) for i in range(3000)]
    write_examples(tmp_path / "e.parquet", rows)
    whole = sum(len(example.original["text"]) for example in rows)
    tracemalloc.start()
    write_selection(tmp_path / "s.jsonl", np.arange(3000)[::-1], Scores(np.zeros(3000)), tmp_path / "e.parquet")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (tmp_path / "s.jsonl").stat().st_size > whole > 4e6
    assert peak < whole / 4


# ----------------------------------------------------------------------------------- statistics, scores


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("scope", ["all", "scaled"])
def test_statistics_read_member_by_member_are_numpys_over_all_of_them(shards: int, scope: str, tmp_path: Path) -> None:
    members, defined, count = 9, 20, 23  # beyond eight numpy might add in another order
    rng = np.random.default_rng(0)
    table = rng.lognormal(size=(3, members, defined)).astype(np.float32)

    def shard(member: int, number: int) -> Artifact:
        rows = np.arange(number, defined, shards)
        folder = tmp_path / f"{member}-{number}"
        folder.mkdir()
        values = dict(zip(("norm_A", "norm_B", "loss"), table[:, member, rows], strict=True))
        pq.write_table(pa.table({"row": rows, **values}), folder / NORMS_FILE)
        info = {"shard": number, "shards": shards, "all_rows": defined, "size_A": 2.0 + member, "size_B": 3.0}
        return Artifact("norms", folder, "", {"info": info})

    late = [[shard(member, number) for number in range(shards)] for member in range(members)]
    found = compute_statistics(late[:2], late, scope, count)
    a, b, loss = table.astype(np.float64)
    sizes = np.arange(members)[:, None] + 2.0
    norms = np.hypot(a, b) if scope == "all" else np.hypot(a / 3.0, b / sizes)
    for name, expected in (("G_t", norms.mean(0)), ("V_t", norms.var(0)), ("loss_t", loss.mean(0))):
        assert np.array_equal(getattr(found, name)[:defined], expected)
        assert np.isnan(getattr(found, name)[defined:]).all()
    assert np.array_equal(found.V_s[:defined], norms[:2].var(0))


def test_statuses_and_reasons_come_back_with_equal_texts_once_in_memory(tmp_path: Path) -> None:
    scores = Scores(np.arange(400.0), {"part": np.arange(400)})
    scores.mark(np.arange(400) % 3 == 1, EXCLUDED, "too large")
    scores.mark(np.arange(400) % 3 == 2, UNDEFINED, "no token")
    assert len({id(text) for text in scores.status}) == len({id(text) for text in scores.reason}) == 3
    ids = [f"{i}-0" for i in range(400)]
    write_scores(tmp_path / "scores.parquet", scores, [ids[:3], pa.array(ids[3:])])
    again = read_scores(tmp_path / "scores.parquet")
    assert again.status.tolist() == scores.status.tolist()
    assert again.reason.tolist() == scores.reason.tolist()
    assert len({id(text) for text in again.reason}) == 3
    assert pq.read_table(tmp_path / "scores.parquet")["example_id"].to_pylist() == ids


# ------------------------------------------------------------------------------------- the benchmark


def test_the_benchmark_runs_the_stages_to_what_the_whole_arrays_give(tmp_path: Path) -> None:
    synthetic = Pool(tmp_path, rows=3000, members=2, shards=2, alpha=0.1)
    make_inputs(synthetic)
    made = synthetic.selection()
    scores = scores_of(synthetic.scores())
    assert (scores.status == UNDEFINED).sum() == 3
    values = read_statistics(synthetic.statistics())
    expected = (values.G_s - values.G_t) / (values.G_s + 1e-8) / (values.V_t + 1e-8)
    best = sorted(range(2997), key=lambda i: (-expected[i], i))[:300]
    assert positions_of(made).tolist() == best == topk(scores, 300).positions.tolist()
    lines = made.file(SELECTION_FILE).read_text().splitlines()
    assert [json.loads(line)["gradsift"]["row_index"] for line in lines] == best
    assert file_bytes(synthetic)["norms/gradient_norms.parquet"] > 20
