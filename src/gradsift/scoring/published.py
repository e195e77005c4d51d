"""Published scores, read from a file that `gradsift scores RUN --out FILE` wrote and joined to the data by text.

The file has the columns

    id         content hash and occurrence number of the example in the data that was scored
    row_index  the example's row in that data
    text_hash  hash of the example's texts (`gradsift.data.examples.content_hash`); rows are joined by this column alone
    score      higher = keep; empty if the scorer defines no score
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
    """Check that a file of scores exists, has a known type, and has the required columns in its first row.

    Raises:
        ConfigError: there is no such file, its type is unknown, or a column is missing.
    """
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


class Published:
    """The scores of a file, looked up by the hash of an example's texts."""

    def __init__(self, path: Path) -> None:
        require_scores(path)
        self.path = path
        self._rows = [_checked(path, number, row.content) for number, row in enumerate(read_rows(path), start=1)]
        self._by_hash: dict[str, list[int]] = {}
        for place, row in enumerate(self._rows):
            self._by_hash.setdefault(row["text_hash"], []).append(place)

    def divide(self, examples: Sequence[Example]) -> tuple[list[Example], list[Rejected]]:
        """Return the examples that have a score in the file, and the other examples as rejected rows.

        Raises:
            DataError: no example has a score.
        """
        kept = [example for example in examples if example.content_hash in self._by_hash]
        if not kept:
            raise DataError(
                f"data.scores={self.path}: none of the {len(examples):,} rows has one of its {len(self._rows):,} "
                "scores; give the data that was scored, with the same data.format and data.fields"
            )
        rejected = [
            Rejected(
                example.row_index,
                f"no score in {self.path.name} has the hash of its text, {example.content_hash}",
                None,
                example.original,
            )
            for example in examples
            if example.content_hash not in self._by_hash
        ]
        return kept, rejected

    def unused(self, examples: Sequence[Example]) -> int:
        """Return the number of scores in the file that belong to none of the examples."""
        used = {example.content_hash for example in examples}
        return sum(len(places) for digest, places in self._by_hash.items() if digest not in used)

    def of(self, examples: Sequence[Example]) -> Scores:
        """Return the scores of examples that `divide` kept, in their order.

        The k-th of several equal texts gets the k-th score of this text in the file, or the last one if the file
        has fewer.
        """
        places = []
        for example in examples:
            same = self._by_hash[example.content_hash]
            # example_id is the content hash and the occurrence number: the k-th of n equal texts gets the k-th score
            occurrence = int(example.example_id.rsplit("-", 1)[1])
            places.append(same[min(occurrence, len(same) - 1)])
        rows = [self._rows[place] for place in places]
        names = dict.fromkeys(name for row in self._rows for name in row if name not in OWN)
        parts = {name: np.array([row.get(name, math.nan) for row in rows]) for name in names}
        scores = Scores(np.array([row["score"] for row in rows]), parts)
        status = np.array([row["status"] for row in rows], dtype=object)
        for kind in (UNDEFINED, EXCLUDED):
            for reason in dict.fromkeys(row["reason"] for row in rows if row["status"] == kind):
                scores.mark((status == kind) & np.array([row["reason"] == reason for row in rows]), kind, reason)
        return scores


def _checked(path: Path, number: int, row: Any) -> dict[str, Any]:
    """Return the row's hash, score, status, reason, and other columns that hold numbers, or raise a `DataError`."""
    place = f"data.scores={path}, row {number}"
    if not isinstance(row, dict) or not isinstance(row.get("text_hash"), str) or not row["text_hash"]:
        raise DataError(f"{place}: text_hash is no text; write the file again with `gradsift scores`")
    numbers = {name: _number(value) for name, value in row.items() if name not in OWN}
    checked: dict[str, Any] = {name: value for name, value in numbers.items() if value is not None}
    score = _number(row.get("score"))
    status = row.get("status") or (UNDEFINED if score is None or math.isnan(score) else SCORED)
    if status not in (SCORED, UNDEFINED, EXCLUDED):
        raise DataError(f"{place}: status {str(status)[:40]!r} is none of {SCORED}, {UNDEFINED}, {EXCLUDED}")
    if score is None or (status == SCORED and not math.isfinite(score)):
        raise DataError(f"{place}: score {str(row.get('score'))[:40]!r} is no finite number; leave out such rows")
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
