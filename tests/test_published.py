"""Laws of published scores: written for any trainer's data, joined by text, and no model is loaded for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from conftest import Cli

from gradsift.data.examples import content_hash

ROWS = [{"instruction": f"Say {'x' * (n % 7)} {n}.", "output": f"{'y' * (n % 5)} {n}"} for n in range(40)]
ROWS += ROWS[:3]  # exact duplicates
FOREIGN = ("tracker=none", "report=false", "compute.threads=1", "stop_after=selection", "proxy=tiny_bytes")


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def last_run(gradsift: Cli) -> tuple[Path, dict[str, Any]]:
    folder = max(gradsift.folder.glob("outputs/*/*"), key=lambda path: path.stat().st_mtime_ns)
    return folder, json.loads((folder / "run.json").read_text())


def selected(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "selection.jsonl").read_text().splitlines()]


@pytest.fixture
def scored(gradsift: Cli) -> Path:
    """The folder of a run that scored `ROWS` by random numbers."""
    data = written(gradsift.folder / "rows.jsonl", ROWS)
    assert gradsift("data=json", f"data.path={data}", "scorer=random", *FOREIGN, "alpha=0.2") == 0
    return last_run(gradsift)[0]


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".csv"])
def test_published_scores_select_the_same_rows_without_a_model(suffix: str, scored: Path, gradsift: Cli) -> None:
    file = gradsift.folder / f"scores{suffix}"
    assert gradsift("scores", str(scored), "--out", str(file)) == 0
    data = written(gradsift.folder / "copy.jsonl", ROWS)
    before = set((gradsift.store / "backbone").iterdir())
    assert gradsift("data=json", f"data.path={data}", f"data.scores={file}", *FOREIGN, "alpha=0.2") == 0
    folder, run = last_run(gradsift)
    assert selected(folder) == selected(scored)  # to the last digit of the scores
    assert {stage["name"] for stage in run["stages"]} == {"load", "score", "select"}
    assert set((gradsift.store / "backbone").iterdir()) == before
    assert run["scorer"] == "published"


def test_the_file_has_a_row_for_each_example_with_every_part(gradsift: Cli) -> None:
    data = written(gradsift.folder / "rows.jsonl", ROWS)
    length = ("scorer=length", "scorer.unit=characters")
    assert gradsift("data=json", f"data.path={data}", *length, *FOREIGN) == 0
    folder, run = last_run(gradsift)
    assert gradsift("scores", str(folder), "--out", "scores.parquet") == 0
    table = pq.read_table("scores.parquet")
    assert table.column_names == ["id", "row_index", "text_hash", "score", "characters", "status", "reason"]
    assert table["row_index"].to_pylist() == list(range(len(ROWS)))
    expected = [content_hash((), row["instruction"], "", row["output"]) for row in ROWS]
    assert table["text_hash"].to_pylist() == expected
    (stored,) = [Path(stage["artifact"]) for stage in run["stages"] if stage["name"] == "score"]
    for name in ("score", "characters"):
        assert table[name].to_pylist() == pq.read_table(stored / "scores.parquet")[name].to_pylist()


def test_rows_without_a_score_are_rejected_with_the_reason_and_counted(
    scored: Path, gradsift: Cli, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gradsift("scores", str(scored), "--out", "scores.jsonl") == 0
    known = [{"question": row["instruction"], "answer": row["output"], "source": "a"} for row in ROWS[10:30]]
    new = {"question": "Of another set?", "answer": "Yes."}
    data = written(gradsift.folder / "other.jsonl", [new, *known])
    capsys.readouterr()
    assert gradsift("data=json", f"data.path={data}", "data.scores=scores.jsonl", *FOREIGN) == 0
    folder, run = last_run(gradsift)
    assert (run["data"]["rows"], run["data"]["rejected"], run["data"]["rows_without_score"]) == (20, 1, 1)
    assert run["data"]["unused_scores"] == len(ROWS) - 20
    assert "scores for 20 of 21 rows; the other 1 are rejected; 23 of its scores are" in capsys.readouterr().out
    (rejected,) = [json.loads(line) for line in Path(run["files"]["rejected rows"]).read_text().splitlines()]
    digest = content_hash((), new["question"], "", new["answer"])
    assert rejected["reason"] == f"no score in scores.jsonl has the hash of its text, {digest}"
    assert rejected["content"] == new
    best = max(
        (row for row in map(json.loads, Path("scores.jsonl").read_text().splitlines()) if 10 <= row["row_index"] < 30),
        key=lambda row: row["score"],
    )
    assert selected(folder)[0]["question"] == ROWS[best["row_index"]]["instruction"]


@pytest.mark.parametrize("draw", [("data.holdout=12",), ("data.limit=15",), ("data.limit=15", "data.holdout=12")])
def test_published_scores_are_joined_after_the_draw(draw: tuple[str, ...], scored: Path, gradsift: Cli) -> None:
    """The rows that are drawn are those of a run without the file, and each has its own score of the file."""
    assert gradsift("scores", str(scored), "--out", "scores.jsonl") == 0
    published = [json.loads(line) for line in Path("scores.jsonl").read_text().splitlines()]
    drawn = {}
    for name, options in {"scorer": ("scorer=random",), "file": ("data.scores=scores.jsonl",)}.items():
        assert gradsift("data=json", "data.path=rows.jsonl", *options, *draw, *FOREIGN, "alpha=1") == 0
        folder, run = last_run(gradsift)
        rows = selected(folder)
        drawn[name] = {row["gradsift"]["row_index"] for row in rows}
        assert len(rows) == run["data"]["rows"] < len(ROWS)
        if name == "file":
            assert run["data"]["unused_scores"] == 0  # rows that are not drawn are in the data as well
            own = {row["row_index"]: row["score"] for row in published}
            assert [row["gradsift"]["score"] for row in rows] == [own[row["gradsift"]["row_index"]] for row in rows]
            assert [row["gradsift"]["score"] for row in rows] == sorted(map(own.get, drawn[name]), reverse=True)
    assert drawn["file"] == drawn["scorer"]


def test_equal_texts_take_the_scores_of_their_occurrences(gradsift: Cli) -> None:
    row = {"instruction": "Again?", "output": "Again."}
    data = written(gradsift.folder / "rows.jsonl", [row] * 3)
    digest = content_hash((), row["instruction"], "", row["output"])
    scores = [{"text_hash": digest, "score": score, "part": score + 1} for score in (1.0, 5.0)]
    scores.append({"text_hash": "of a text that is not in the data", "score": 3.0, "other part": 1.0})
    written(gradsift.folder / "scores.jsonl", scores)
    assert gradsift("data=json", f"data.path={data}", "data.scores=scores.jsonl", *FOREIGN, "alpha=1") == 0
    folder, run = last_run(gradsift)
    rows = [(each["gradsift"]["row_index"], each["gradsift"]["score"]) for each in selected(folder)]
    assert rows == [(1, 5.0), (2, 5.0), (0, 1.0)]
    (stored,) = [Path(stage["artifact"]) for stage in run["stages"] if stage["name"] == "score"]
    columns = pq.read_table(stored / "scores.parquet").column_names
    assert columns == ["example_id", "score", "part", "status", "reason"]


def test_what_a_scorer_did_not_score_stays_unscored(gradsift: Cli) -> None:
    data = written(gradsift.folder / "rows.jsonl", ROWS[:4])
    hashes = [content_hash((), row["instruction"], "", row["output"]) for row in ROWS[:4]]
    scores: list[dict[str, Any]] = [{"text_hash": digest, "score": 1.0} for digest in hashes]
    scores[1] |= {"score": None}
    scores[2] |= {"status": "excluded", "reason": "IFD is at least 1"}
    written(gradsift.folder / "scores.jsonl", scores)
    assert gradsift("data=json", f"data.path={data}", "data.scores=scores.jsonl", *FOREIGN, "alpha=1") == 0
    folder, run = last_run(gradsift)
    assert [each["gradsift"]["row_index"] for each in selected(folder)] == [0, 3]
    assert run["scores"]["reasons"] == {"the published score is empty": 1, "IFD is at least 1": 1}


@pytest.mark.parametrize(
    ("content", "words"),
    {
        None: "is no file",
        '{"id": "a"}': "has no column text_hash and no column score: its columns are id",
        '{"text_hash": "a", "score": "high"}': "row 1: score 'high' is not a finite number",
        '{"text_hash": "a", "score": 1, "status": "good"}': "row 1: status 'good' is none of scored",
        '{"text_hash": 7, "score": 1}': "row 1: text_hash is not text",
        '{"text_hash": "a", "score": 1}': "none of the 43 rows has one of its 1 scores",
    }.items(),
)
def test_a_file_that_cannot_be_used_has_a_remedy(
    content: str | None, words: str, gradsift: Cli, capsys: pytest.CaptureFixture[str]
) -> None:
    data = written(gradsift.folder / "rows.jsonl", ROWS)
    if content is not None:
        Path("scores.jsonl").write_text(content + "\n")
    assert gradsift("data=json", f"data.path={data}", "data.scores=scores.jsonl", *FOREIGN) == 2
    error = capsys.readouterr().err
    assert words in error
    assert "data.scores=scores.jsonl" in error
    assert "Traceback" not in error


def test_a_corrupted_text_has_no_published_score(gradsift: Cli, capsys: pytest.CaptureFixture[str]) -> None:
    assert gradsift("data.corruption.share=0.3", "data.scores=x.csv", "tracker=none") == 2
    assert "data.scores has no score of a corrupted text" in capsys.readouterr().err


def test_the_command_names_what_it_lacks(gradsift: Cli, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = {
        ("run",): "required: --out",
        ("run", "--out", "scores.xlsx"): "of no known type; let its name end in one of: .parquet, .jsonl, .csv",
        ("run", "--out", "nowhere/scores.csv"): "there is no folder nowhere",
        ("run", "--out", "scores.csv"): "holds neither run.json nor folders of jobs",
    }
    for arguments, words in wrong.items():
        assert gradsift("scores", *arguments) == 2
        assert words in capsys.readouterr().err
    assert not list(gradsift.folder.glob("*scores*"))
