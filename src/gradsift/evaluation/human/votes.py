"""Raters and their votes in one SQLite file, and the counts of the votes.

Each vote is on disk before the next page is shown. Shape letters: N items, K categories (win, tie, lose).
"""

from __future__ import annotations

import random
import secrets
import sqlite3
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import numpy as np

from gradsift.errors import ConfigError, DataError
from gradsift.evaluation.human.pairs import Key, Pairs
from gradsift.evaluation.pws import SIGNS, Outcome, Outcomes, agreement, summarise

Choice = Literal["first", "tie", "second"]
NAME_LENGTH = 60  # characters of a rater's name
COMMENT_LENGTH = 1000  # characters of a comment
_APPLICATION = 0x67736865  # "gshe": distinguishes files of votes from other SQLite files
_FORMAT = 2
_SCHEMA = f"""
CREATE TABLE about (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
CREATE TABLE items (item INTEGER PRIMARY KEY, benchmark TEXT NOT NULL, item_id TEXT NOT NULL) STRICT;
CREATE TABLE raters (
    rater INTEGER PRIMARY KEY, name TEXT NOT NULL, folded TEXT NOT NULL UNIQUE, joined TEXT NOT NULL, finished TEXT
) STRICT;
CREATE TABLE shown (
    rater INTEGER NOT NULL REFERENCES raters, item INTEGER NOT NULL REFERENCES items,
    model_first INTEGER NOT NULL CHECK (model_first IN (0, 1)),
    choice TEXT CHECK (choice IN ('first', 'tie', 'second')), voted TEXT,
    bad INTEGER NOT NULL DEFAULT 0 CHECK (bad IN (0, 1)), comment TEXT NOT NULL DEFAULT '',
    PRIMARY KEY (rater, item)
) STRICT;
PRAGMA application_id = {_APPLICATION};
PRAGMA user_version = {_FORMAT};
"""


@dataclass(frozen=True)
class Rater:
    """A rater. A rater who has finished can no longer vote, and sees the counts."""

    number: int
    name: str
    finished: bool


@dataclass(frozen=True)
class Vote:
    """One item as a rater sees it; `choice` is None before the vote. `bad` marks a tie of two bad answers."""

    rater: str
    item: int  # position in the order shown, from 1
    key: Key
    model_first: bool
    choice: Choice | None
    bad: bool = False
    comment: str = ""

    @property
    def outcome(self) -> Outcome:
        """The item's outcome for the model; "invalid" if the rater has not voted."""
        if self.choice is None:
            return "invalid"
        if self.choice == "tie":
            return "tie"
        return "win" if (self.choice == "first") == self.model_first else "lose"


class Votes:
    """The file of votes on the pairs of two models' answers, or on a random sample of the pairs."""

    def __init__(self, path: Path) -> None:
        """Open a file that `create` made; raise DataError if it is missing or not a file of votes."""
        if not path.is_file():
            raise DataError(f"{path} does not exist, so nobody has voted; serve the pairs first, without --results")
        self.path = path
        try:
            self._connection = _connect(path)
            (application,) = self._connection.execute("PRAGMA application_id").fetchone()
            (version,) = self._connection.execute("PRAGMA user_version").fetchone()
        except sqlite3.Error as error:
            raise DataError(f"{path} cannot be opened as a file of votes ({error}); name another --database") from error
        if (application, version) != (_APPLICATION, _FORMAT):
            self.close()
            raise DataError(f"{path} is not a file of votes of this version of gradsift; name another --database")
        self._connection.execute("PRAGMA journal_mode = WAL")  # pages can be read while a vote is written
        self.about: dict[str, str] = dict(self._connection.execute("SELECT name, value FROM about"))
        rows = self._connection.execute("SELECT item, benchmark, item_id FROM items ORDER BY item")
        self.keys: dict[int, Key] = {item: (benchmark, item_id) for item, benchmark, item_id in rows}

    @classmethod
    def create(cls, path: Path, pairs: Pairs, items: int | None, seed: int) -> Votes:
        """Create a file with `items` pairs (None: all) in random order; if the file already exists, open it.

        Raises:
            ConfigError: there are fewer pairs than `items`.
            DataError: the file cannot be written, or it exists and is not a file of votes.
        """
        keys = sorted(pairs.items)
        if items is not None and not 1 <= items <= len(keys):
            raise ConfigError(f"--items {items}: there are {len(keys)} pairs; give a number from 1 to {len(keys)}")
        drawn = random.Random(f"items/{seed}").sample(keys, items or len(keys))
        about = {
            "content": pairs.content,
            "model": pairs.model,
            "reference": pairs.reference,
            "seed": str(seed),
            "address": secrets.token_urlsafe(16),
        }
        try:
            path.touch(mode=0o600)  # it contains people's names and the secret part of the address
            connection = _connect(path)
            with _transaction(connection):
                if connection.execute("PRAGMA schema_version").fetchone() == (
                    0,
                ):  # no other process has created the tables
                    for statement in _SCHEMA.split(";"):
                        connection.execute(statement)
                    connection.executemany("INSERT INTO about VALUES (?, ?)", about.items())
                    rows = [(number, *key) for number, key in enumerate(drawn, start=1)]
                    connection.executemany("INSERT INTO items VALUES (?, ?, ?)", rows)
            connection.close()
        except (OSError, sqlite3.Error) as error:
            raise DataError(
                f"{path} cannot be written as a file of votes ({error}); name another --database"
            ) from error
        return cls(path)

    def close(self) -> None:
        self._connection.close()

    def require(self, pairs: Pairs, items: int | None = None, seed: int | None = None) -> None:
        """Check that the file was created for these pairs, this number of `items` and this `seed`.

        If `items` or `seed` is None, it is not compared.

        Raises:
            DataError: the file has votes on other answers.
            ConfigError: `items` or `seed` differs from that of the file.
        """
        if self.about["content"] != pairs.content:
            raise DataError(
                f"{self.path} has votes on other answers ({self.about['model']} against {self.about['reference']}); "
                "name another --database"
            )
        for option, given, stored in (("--items", items, len(self.keys)), ("--seed", seed, int(self.about["seed"]))):
            if given is not None and given != stored:
                raise ConfigError(
                    f"{option} {given}: {self.path} was created with {stored}; omit the option to continue, or name "
                    "another --database"
                )

    def join(self, name: str) -> Rater:
        """Return the rater with this name, ignoring case and extra spaces; for a new name, add a rater.

        A new rater sees the model's answer first for a random half of the items. The draw depends only on the file's
        seed and the rater's name.

        Raises:
            ConfigError: the name is empty, too long or not printable.
        """
        name = " ".join(unicodedata.normalize("NFC", name).split())
        if not name or len(name) > NAME_LENGTH or not name.isprintable():
            raise ConfigError(f"a rater's name must have 1 to {NAME_LENGTH} printable characters, not {name[:80]!a}")
        folded = name.casefold()
        with _transaction(self._connection):
            if not self._connection.execute("SELECT 1 FROM raters WHERE folded = ?", (folded,)).fetchone():
                cursor = self._connection.execute(
                    "INSERT INTO raters (name, folded, joined) VALUES (?, ?, ?)", (name, folded, _now())
                )
                sides = [True, False] * ((len(self.keys) + 1) // 2)
                random.Random(f"sides/{self.about['seed']}/{folded}").shuffle(sides)
                self._connection.executemany(
                    "INSERT INTO shown (rater, item, model_first) VALUES (?, ?, ?)",
                    [(cursor.lastrowid, item, side) for item, side in zip(self.keys, sides, strict=False)],
                )
        return next(rater for rater in self.raters() if rater.name.casefold() == folded)

    def raters(self) -> list[Rater]:
        """Return all raters in the order in which they joined."""
        rows = self._connection.execute("SELECT rater, name, finished IS NOT NULL FROM raters ORDER BY rater")
        return [Rater(number, name, bool(finished)) for number, name, finished in rows]

    def vote(self, rater: Rater, item: int, choice: Choice, *, bad: bool = False, comment: str = "") -> None:
        """Store a vote in place of an earlier one, unless the rater has finished. Long comments are cut."""
        self._connection.execute(
            "UPDATE shown SET choice = ?, bad = ?, comment = ?, voted = ? WHERE rater = ? AND item = ? "
            "AND (SELECT finished FROM raters WHERE raters.rater = shown.rater) IS NULL",
            (choice, bad, comment[:COMMENT_LENGTH], _now(), rater.number, item),
        )

    def finish(self, rater: Rater) -> None:
        """Record that a rater has finished, unless a vote is missing."""
        self._connection.execute(
            "UPDATE raters SET finished = ? WHERE rater = ? AND finished IS NULL "
            "AND NOT EXISTS (SELECT 1 FROM shown WHERE shown.rater = raters.rater AND choice IS NULL)",
            (_now(), rater.number),
        )

    def of(self, rater: Rater) -> list[Vote]:
        """Return a rater's votes, one per item, in the order in which the rater sees the items."""
        query = "SELECT item, model_first, choice, bad, comment FROM shown WHERE rater = ? ORDER BY item"
        return [
            Vote(rater.name, item, self.keys[item], bool(first), choice, bool(bad), comment)
            for item, first, choice, bad, comment in self._connection.execute(query, (rater.number,))
        ]

    def all(self) -> list[Vote]:
        """Return the votes of all raters, including those without a choice."""
        return [vote for rater in self.raters() for vote in self.of(rater)]


def _connect(path: Path) -> sqlite3.Connection:
    # isolation_level=None: each statement outside of a transaction commits by itself
    connection = sqlite3.connect(path, timeout=5, isolation_level=None, check_same_thread=False)
    connection.execute("PRAGMA synchronous = FULL")  # a confirmed vote survives a power cut
    connection.execute("PRAGMA foreign_keys = ON")
    return connection


@contextmanager
def _transaction(connection: sqlite3.Connection) -> Iterator[None]:
    with connection:
        connection.execute("BEGIN IMMEDIATE")
        yield


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _beside_judge(
    judged: Outcomes, decided: Outcomes, outcomes: Mapping[str, Outcomes], confidence: float
) -> dict[str, Any]:
    voted = {key: judged[key] for key in decided if key in judged}
    return {
        "pooled": summarise(voted, confidence)["pooled"],
        "majority": agreement(judged, decided),
        "raters": {rater: agreement(judged, each) for rater, each in outcomes.items()},
    }


def describe(votes: Iterable[Vote], judged: Outcomes | None, confidence: float) -> dict[str, Any]:
    """Return the counts and PWS of each rater and of the majority, and how far raters and judge agree.

    Args:
        votes: those without a choice are ignored.
        judged: outcomes of an LLM judge on the same items, if there is one.
        confidence: coverage of the intervals, between 0 and 1.

    Returns:
        JSON values:

        - `raters`, by name: counts, PWS with interval, and `both_bad` (ties of two bad answers).
        - `majority`: counts and PWS per benchmark and pooled. `split` is the number of items without a majority, which
          the PWS omits.
        - `agreement`: Cohen's kappa of each pair of raters, and Fleiss' kappa over the items that all raters rated.
        - `judge`: the judge's counts on the rated items, and its agreement with the majority and with each rater; None
          without a judge.
        - `comments`: all comments.
    """
    by_rater: dict[str, list[Vote]] = {}
    for vote in votes:
        if vote.choice is not None:
            by_rater.setdefault(vote.rater, []).append(vote)
    outcomes = {rater: {vote.key: vote.outcome for vote in cast} for rater, cast in by_rater.items()}
    raters = {}
    for rater, cast in by_rater.items():
        cell = summarise(outcomes[rater], confidence)["pooled"]
        del cell["invalid"]  # always 0 for a rater
        raters[rater] = {**cell, "both_bad": sum(vote.bad for vote in cast)}
    decided = majority(outcomes.values())
    summary = summarise(decided, confidence)
    for cell in (summary["pooled"], *summary["benchmarks"].values()):
        cell["split"] = cell.pop("invalid")
    shared = [key for key in decided if all(key in each for each in outcomes.values())] if len(outcomes) > 1 else []
    counts = np.array([[sum(each[key] == kind for each in outcomes.values()) for kind in SIGNS] for key in shared])
    return {
        "confidence": confidence,
        "raters": raters,
        "majority": {"pooled": summary["pooled"], "benchmarks": summary["benchmarks"]},
        "agreement": {
            "pairwise": [
                {"raters": [a, b], **agreement(outcomes[a], outcomes[b])} for a, b in combinations(outcomes, 2)
            ],
            "fleiss": {
                "raters": len(outcomes),
                "items": len(shared),
                "kappa": fleiss_kappa(counts) if shared else None,
            },
        },
        "judge": None if judged is None else _beside_judge(judged, decided, outcomes, confidence),
        "comments": [
            {"rater": vote.rater, "benchmark": vote.key[0], "item_id": vote.key[1], "comment": vote.comment}
            for cast in by_rater.values()
            for vote in cast
            if vote.comment
        ],
    }


def majority(raters: Iterable[Outcomes]) -> dict[Key, Outcome]:
    """Return for each item the outcome that more than half of its raters chose; "invalid" without such a majority."""
    votes: dict[Key, list[Outcome]] = {}
    for outcomes in raters:
        for key, kind in outcomes.items():
            votes.setdefault(key, []).append(kind)
    return {
        key: next((kind for kind in SIGNS if 2 * kinds.count(kind) > len(kinds)), "invalid")
        for key, kinds in votes.items()
    }


def fleiss_kappa(counts: np.ndarray) -> float | None:
    """Return Fleiss' kappa (1971), the agreement of several raters beyond chance: (P - Pe) / (1 - Pe).

    P is the mean over items of (sum_j n_ij^2 - n) / (n (n - 1)), and Pe is the sum of the squared shares of the
    categories. The result is None if all votes are the same, because the denominator is then 0.

    Args:
        counts: (N, K), the number of raters n_ij who put item i into category j; each row has the same sum n >= 2.
    """
    raters = counts[0].sum()
    observed = (((counts**2).sum(1) - raters) / (raters * (raters - 1))).mean()
    shares = counts.sum(0) / counts.sum()
    chance = (shares**2).sum()
    return None if np.count_nonzero(shares) == 1 else float((observed - chance) / (1 - chance))
