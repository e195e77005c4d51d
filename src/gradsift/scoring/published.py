"""Published scores: a file that `gradsift scores RUN --out FILE` wrote, joined to the data by text. Its columns:

    id         content hash and occurrence number of the example in the data that was scored
    row_index  the example's row in that data
    text_hash  hash of the example's texts (`gradsift.data.examples.content_hash`); rows are joined by this column alone
    score      the score, higher is better; empty if the scorer defines no score for the example
    ...        one column for each part of the score
    status     scored, undefined or excluded
    reason     why the example is undefined or excluded

A file that was made by other means needs only `text_hash` and `score`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gradsift.data.columns import listed
from gradsift.data.examples import Example, Rejected
from gradsift.data.files import SUFFIXES, read_rows
from gradsift.errors import ConfigError, DataError
from gradsift.scoring.scores import EXCLUDED, SCORED, UNDEFINED, Scores

OWN = ("id", "row_index", "text_hash", "score", "status", "reason")  # all other columns are parts of the score


def require_scores(path: Path) -> None:
    """Raise ConfigError unless a file of scores exists, has a known type, and has the required columns."""
    if not path.is_file() or not path.name.lower().endswith(SUFFIXES):
        problem = "is of no known type" if path.is_file() else f"is no file (now in {Path.cwd()})"
        raise ConfigError(
            f"data.scores={path} {problem}; give one that `gradsift scores RUN --out FILE` wrote (.parquet, .jsonl "
            "or .csv)"
        )
    first = next(read_rows(path), None)
    columns = first.content if first is not None and isinstance(first.content, dict) else {}
    if missing := [name for name in ("text_hash", "score") if name not in columns]:
        raise ConfigError(
            f"data.scores={path} has no column {' and no column '.join(missing)}: its columns are "
            f"{listed(columns) or 'none'}; `gradsift scores RUN --out FILE` writes them"
        )


def join_scores(
    path: Path, pool: Sequence[Example], accepted: Sequence[Example]
) -> tuple[list[Example], list[Rejected], Scores, int]:
    """Join the scores of a file to the pool by the hash of the examples' texts.

    The k-th of several equal texts gets the k-th score of this text in the file, or the text's last score if the file
    has fewer than k.

    Returns:
        The examples of the pool that have a score, the other examples as rejected rows, the scores, and the number of
        scores in the file that belong to no `accepted` example. `accepted` has all accepted examples of the data, the
        held-out ones included.

    Raises:
        DataError: no example has a score, or a row of the file cannot be used.
    """
    require_scores(path)
    by_hash: dict[str, list[dict[str, Any]]] = {}
    for number, entry in enumerate(read_rows(path), start=1):
        checked = _checked(path, number, entry.content)
        by_hash.setdefault(checked["text_hash"], []).append(checked)
    kept, rejected, rows = [], [], []
    for example in pool:
        if same := by_hash.get(example.content_hash):
            kept.append(example)
            occurrence = int(example.example_id.rsplit("-", 1)[1])  # the id is the content hash and this number
            rows.append(same[min(occurrence, len(same) - 1)])
        else:
            reason = f"no score in {path.name} has the hash of its text, {example.content_hash}"
            rejected.append(Rejected(example.row_index, reason, None, example.original))
    if not kept:
        raise DataError(
            f"data.scores={path}: none of the {len(pool):,} rows has one of its {sum(map(len, by_hash.values())):,} "
            "scores; give the data that was scored, with the same data.format and data.fields"
        )
    names = dict.fromkeys(name for row in rows for name in row if name not in OWN)  # of the parts, in their order
    parts = {name: np.array([row.get(name, math.nan) for row in rows]) for name in names}
    scores = Scores(np.array([row["score"] for row in rows]), parts)
    marks = [(row["status"], row["reason"]) for row in rows]
    for status, reason in dict.fromkeys(marks):
        scores.mark(np.array([mark == (status, reason) for mark in marks]), status, reason)
    used = {example.content_hash for example in accepted}
    return kept, rejected, scores, sum(len(same) for digest, same in by_hash.items() if digest not in used)


def _checked(path: Path, number: int, row: Any) -> dict[str, Any]:
    """Return the row's hash, score, status, reason and numeric parts; raise a `DataError` if one of them is invalid."""
    place = f"data.scores={path}, row {number}"
    if not isinstance(row, dict) or not isinstance(row.get("text_hash"), str) or not row["text_hash"]:
        raise DataError(f"{place}: text_hash is not text; write the file again with `gradsift scores`")
    numbers = {name: _number(value) for name, value in row.items() if name not in OWN}
    checked: dict[str, Any] = {name: value for name, value in numbers.items() if value is not None}
    score = _number(row.get("score"))
    status = row.get("status") or (UNDEFINED if score is None or math.isnan(score) else SCORED)
    if status not in (SCORED, UNDEFINED, EXCLUDED):
        raise DataError(f"{place}: status {str(status)[:40]!r} is none of {SCORED}, {UNDEFINED}, {EXCLUDED}")
    if score is None or (status == SCORED and not math.isfinite(score)):
        raise DataError(f"{place}: score {str(row.get('score'))[:40]!r} is not a finite number; leave out such rows")
    reason = "" if status == SCORED else str(row.get("reason") or "the published score is empty")
    return checked | {"text_hash": row["text_hash"], "score": score, "status": status, "reason": reason}


def _number(value: Any) -> float | None:
    """Return the number that a cell holds, NaN if the cell is empty, or None if it holds anything else."""
    if value is None or value == "":
        return math.nan
    try:
        return float(value) if isinstance(value, int | float | str) else None
    except ValueError:
        return None


def published(published_scores: Scores) -> Scores:
    """Return the scores that were read from the file `data.scores`, unchanged."""
    return published_scores
