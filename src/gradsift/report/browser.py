"""The data that the report's browser holds: the examples of a pool, and what every method said of each.

A pool is packed into one run of bytes, compressed and written as base64, with a JSON description beside it. The page
reads the columns as typed arrays and searches the texts as one string, so 52,000 examples answer at once.

Shape letters: N examples of the pool, n of them that the page holds.
"""

from __future__ import annotations

import base64
import gzip
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gradsift.artifacts import Artifact
from gradsift.data.examples import Example
from gradsift.pages import presentable
from gradsift.report.material import Material, Run
from gradsift.scoring.scores import EXCLUDED, SCORED, UNDEFINED, Scores
from gradsift.selection.candidates import best_first

CUT = 400  # characters of a text that the page holds
MOST = 100_000  # examples that one page holds; of larger pools the selected ones and an even share of the others
STATUSES = (SCORED, UNDEFINED, EXCLUDED)
_END, _FIELD = "\x1e", "\x1f"  # no presentable text holds them


@dataclass(frozen=True, eq=False)
class Ranking:
    """What one method said of each example."""

    name: str
    scores: Scores
    rank: np.ndarray  # (N,) from 1, highest score first, ties by row order; 0 where it is not `scored`
    parts: Mapping[str, np.ndarray]  # (N,) numbers that the score is made of, and what the ensemble measured


@dataclass(frozen=True, eq=False)
class Selection:
    """What one run selected."""

    name: str
    ranking: int  # place among the pool's rankings
    share: str  # alpha, as people say it
    budget: int
    selector: str
    everything: bool  # the full-data run, which asks no method
    place: np.ndarray  # (N,) from 1, in the order of the selection; 0 where it was not selected
    size: int


@dataclass(frozen=True, eq=False)
class Pool:
    """The examples of one dataset and seed, with all that the runs found about them."""

    name: str
    examples: Sequence[Example]
    quality: Sequence[str] | None
    family: Sequence[str] | None
    rankings: list[Ranking] = field(default_factory=list)
    selections: list[Selection] = field(default_factory=list)


def pools(material: Material) -> list[Pool]:
    """The pools that any run selected from; a run without scores or a selection has nothing to show."""
    groups: dict[str, list[Run]] = {}
    for run in material.runs:
        if run.data is not None and run.has("load") and run.has("score") and run.has("select"):
            groups.setdefault(run.data, []).append(run)
    return [_pool(material, runs) for runs in groups.values()]


def _pool(material: Material, runs: Sequence[Run]) -> Pool:
    methods = [run for run in runs if run.record["scorer"] != "full"] or runs
    first = methods[0]
    labels = material.labels(first)
    seed = first.record.get("data_seed")
    name = str(first.record.get("dataset", "data")) + (f", seed {seed}" if seed is not None else "")
    quality, family = (None, None) if labels is None else (labels.quality, labels.family)
    pool = Pool(name, material.examples(first), quality, family)
    places: dict[str, int] = {}
    names: set[str] = set()
    for run in methods:
        scored = run.one("score")
        if scored.fingerprint not in places:
            places[scored.fingerprint] = len(pool.rankings)
            pool.rankings.append(_ranking(material, run, _unused(run.method, run.record.get("seed"), names)))
    chosen: set[str] = set()
    for run in methods:
        if run.one("select").fingerprint not in chosen:  # several targets may share one
            chosen.add(run.one("select").fingerprint)
            pool.selections.append(_selection(material, run, pool, places[run.one("score").fingerprint]))
    return pool


def _unused(name: str, seed: Any, names: set[str]) -> str:
    """`name`, with the seed or a number where another ranking has it already."""
    seeded = [] if seed is None else [f"{name}, seed {seed}"]
    number = 2
    for one in (name, *seeded):
        if one not in names:
            names.add(one)
            return one
    while f"{name} ({number})" in names:
        number += 1
    names.add(f"{name} ({number})")
    return f"{name} ({number})"


def _ranking(material: Material, run: Run, name: str) -> Ranking:
    scores = material.scores(run)
    rank = np.zeros(len(scores.score), np.uint32)
    ordered = best_first(scores)
    rank[ordered] = np.arange(1, len(ordered) + 1)
    parts = {key: values for key, values in scores.parts.items() if np.issubdtype(values.dtype, np.number)}
    if run.has("statistics"):
        measured = vars(material.statistics(run))
        parts = {**measured, **{key: values for key, values in parts.items() if key not in measured}}
    return Ranking(name, scores, rank, parts)


def _selection(material: Material, run: Run, pool: Pool, ranking: int) -> Selection:
    artifact: Artifact = run.one("select")
    positions = material.selected(run)
    place = np.zeros(len(pool.examples), np.uint32)
    place[positions] = np.arange(1, len(positions) + 1)
    everything = run.record["scorer"] == "full"
    share = "all" if everything else f"{100 * run.alpha:g} %"
    selector = str((run.config.get("selector") or {}).get("name", "?"))
    name = "everything" if everything else f"{pool.rankings[ranking].name} at {share}"
    if selector not in ("topk", "?") and not everything:
        name += f", {selector}"
    budget = int(artifact.info.get("budget", len(positions)))
    return Selection(name, ranking, share, budget, selector, everything, place, len(positions))


# ------------------------------------------------------------------------------------------- packed


@dataclass(frozen=True)
class Packed:
    """A pool as the page holds it."""

    name: str
    about: dict[str, Any]  # JSON: where each column begins, and names
    data: str  # base64 of gzip

    @property
    def rows(self) -> int:
        return int(self.about["rows"])


class _Columns:
    """Columns one behind the other, each at a multiple of four bytes; equal ones are kept once."""

    def __init__(self) -> None:
        self.bytes = bytearray()
        self._places: dict[tuple[str, bytes], int] = {}

    def add(self, values: np.ndarray, kind: str) -> list[Any]:
        """`[kind, offset]`; kinds are f4, u4, u2 and u1, little-endian."""
        data = np.ascontiguousarray(values, dtype=np.dtype(f"<{kind}")).tobytes()
        if (kind, data) not in self._places:
            self.bytes += bytes(-len(self.bytes) % 4)
            self._places[kind, data] = len(self.bytes)
            self.bytes += data
        return [kind, self._places[kind, data]]


def pack(pool: Pool, most: int = MOST) -> Packed:
    """The pool for the page: columns first, then the texts; scores and values as 32-bit floats."""
    rows = held(pool, most)
    columns = _Columns()
    labels, label = _coded(pool.quality, rows)
    families, family = _coded(pool.family, rows)
    examples = [pool.examples[row] for row in rows]
    about = {
        "name": pool.name,
        "rows": len(rows),
        "total": len(pool.examples),
        "statuses": list(STATUSES),
        "labels": labels,
        "families": families,
        "label": columns.add(label, "u2"),
        "family": columns.add(family, "u2"),
        "row_index": columns.add(np.array([example.row_index for example in examples]), "u4"),
        "methods": [_method(columns, ranking, rows) for ranking in pool.rankings],
        "selections": [_chosen(columns, selection, rows) for selection in pool.selections],
        "hidden": columns.add(np.array([sum(_hidden(text) for text in _fields(one)) for one in examples]), "u4"),
    }
    about["texts"] = len(columns.bytes)
    texts = _END.join(_FIELD.join(presentable(text[:CUT]) for text in _fields(one)) for one in examples)
    packed = gzip.compress(bytes(columns.bytes) + texts.encode("utf-8"), 4, mtime=0)
    return Packed(pool.name, about, base64.b64encode(packed).decode("ascii"))


def held(pool: Pool, most: int) -> np.ndarray:
    """(n,) positions that the page holds: all, or what any run selected and an even share of the others."""
    count = len(pool.examples)
    if count <= most:
        return np.arange(count)
    selected = np.zeros(count, bool)
    for selection in pool.selections:
        selected |= selection.place > 0
    if selected.sum() > most:  # of each selection the first
        selected[:] = False
        for selection in pool.selections:
            selected |= (selection.place > 0) & (selection.place <= most // len(pool.selections))
    room = most - int(selected.sum())
    others = np.flatnonzero(~selected)
    evenly = others[np.linspace(0, len(others) - 1, room).astype(int)] if room > 0 else others[:0]
    return np.union1d(np.flatnonzero(selected), evenly)


def _fields(example: Example) -> tuple[str, str, str, str]:
    """Prompt, input, response, and the turns before them."""
    before = "\n".join(f"{turn.role}: {turn.content}" for turn in example.history)
    return example.instruction, example.input, example.output, before


def _hidden(text: str) -> int:
    return max(0, len(text) - CUT)


def _coded(names: Sequence[str] | None, rows: np.ndarray) -> tuple[list[str], np.ndarray]:
    """The different names, and of each row the place of its name."""
    if names is None:
        return [], np.zeros(0)
    known = sorted(set(names))
    places = {name: place for place, name in enumerate(known)}
    return known, np.array([places[names[row]] for row in rows])


def _method(columns: _Columns, ranking: Ranking, rows: np.ndarray) -> dict[str, Any]:
    scores = ranking.scores
    reasons, reason = _coded(scores.reason.tolist(), rows)
    status = np.array([STATUSES.index(one) for one in scores.status.tolist()])[rows]
    return {
        "name": ranking.name,
        "scored": int((ranking.rank > 0).sum()),
        "reasons": reasons,
        "score": columns.add(scores.score[rows], "f4"),
        "rank": columns.add(ranking.rank[rows], "u4"),
        "status": columns.add(status, "u1"),
        "reason": columns.add(reason, "u2"),
        "parts": [[name, columns.add(values[rows], "f4")] for name, values in ranking.parts.items()],
    }


def _chosen(columns: _Columns, selection: Selection, rows: np.ndarray) -> dict[str, Any]:
    return {
        "name": selection.name,
        "method": selection.ranking,
        "share": selection.share,
        "budget": selection.budget,
        "size": selection.size,
        "selector": selection.selector,
        "everything": selection.everything,
        "place": columns.add(selection.place[rows], "u4"),
    }
