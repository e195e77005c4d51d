"""The data of the report's example browser: the examples of a pool, with the scores and selections of every method.

A pool is packed into one sequence of bytes, compressed and written as base64, with a JSON description beside it. The
page reads the columns as typed arrays and searches the texts as one string, so that it is fast with 52,000 examples.

Shape letters: N examples of the pool, n examples that the page holds.
"""

from __future__ import annotations

import base64
import gzip
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from gradsift.data.examples import Example
from gradsift.pages import presentable
from gradsift.report.material import Material, Run
from gradsift.report.run_tables import grouped
from gradsift.scoring.scores import EXCLUDED, SCORED, UNDEFINED
from gradsift.selection.choice import best_first

CUT = 400  # characters of a text that the page holds
MOST = 100_000  # examples that one page holds (see `held`)
STATUSES = (SCORED, UNDEFINED, EXCLUDED)
_END, _FIELD = "\x1e", "\x1f"  # separators, which no presentable text contains


@dataclass(frozen=True, eq=False)
class Pool:
    """The examples of one dataset and seed, with the scores and selections of all runs.

    `methods` and `selections` have the form that the page's script reads; their columns are arrays (N,). In a method,
    `rank` is 1 for the highest score (equal scores in row order) and 0 without a score; `parts` are the numbers from
    which the score is computed, and the statistics of the ensemble. In a selection, `method` is an index into
    `methods`; `place` counts from 1 in the order of the selection and is 0 for examples that are not selected;
    `everything` is True for the full-data run.
    """

    name: str
    examples: Sequence[Example]
    quality: Sequence[str] | None
    family: Sequence[str] | None
    methods: list[dict[str, Any]] = field(default_factory=list)
    selections: list[dict[str, Any]] = field(default_factory=list)


class Packed(NamedTuple):
    """A pool in the form that is written into the page."""

    about: dict[str, Any]  # for JSON: names, and the type and offset of each column
    data: str  # base64 of gzip


def pools(material: Material) -> list[Pool]:
    """Return the pools of all runs that have data, scores and a selection in the store; other runs are left out."""
    runs = [run for run in material.runs if run.has("load") and run.has("score") and run.has("select")]
    return [_pool(material, group) for group in grouped(runs, lambda run: run.data).values()]


def _pool(material: Material, runs: Sequence[Run]) -> Pool:
    runs = [run for run in runs if not run.is_full] or runs
    labels = material.labels(runs[0])
    seed = runs[0].record.get("data_seed")
    name = str(runs[0].record.get("dataset", "data")) + (f", seed {seed}" if seed is not None else "")
    quality, family = (None, None) if labels is None else (labels.quality, labels.family)
    pool = Pool(name, material.examples(runs[0]), quality, family)
    methods: dict[str, int] = {}  # index by the fingerprint of the scores, which several runs may share
    selections: set[str] = set()
    for run in runs:
        scored, selected = run.one("score").fingerprint, run.one("select").fingerprint
        if scored not in methods:
            methods[scored] = len(pool.methods)
            names = [method["name"] for method in pool.methods]
            candidates = [run.method, f"{run.method}, seed {run.record.get('seed')}"]
            candidates += [f"{run.method} ({number})" for number in range(2, len(names) + 3)]
            unused = next(candidate for candidate in candidates if candidate not in names)
            pool.methods.append(_method(material, run, unused))
        if selected not in selections:
            selections.add(selected)
            pool.selections.append(_selection(material, run, pool, methods[scored]))
    return pool


def _method(material: Material, run: Run, name: str) -> dict[str, Any]:
    scores = material.scores(run)
    rank = np.zeros(len(scores.score), np.uint32)
    ordered = best_first(scores)
    rank[ordered] = np.arange(1, len(ordered) + 1)
    parts: dict[str, np.ndarray] = dict(vars(material.statistics(run))) if run.has("statistics") else {}
    for key, values in scores.parts.items():
        if np.issubdtype(values.dtype, np.number):
            parts.setdefault(key, values)
    reasons, reason = _coded(scores.reason.tolist())
    return {
        "name": name,
        "scored": len(ordered),
        "reasons": reasons,
        "score": scores.score.astype(np.float32),
        "rank": rank,
        "status": np.array([STATUSES.index(status) for status in scores.status.tolist()], np.uint8),
        "reason": reason,
        "parts": [[key, values.astype(np.float32)] for key, values in parts.items()],
    }


def _selection(material: Material, run: Run, pool: Pool, method: int) -> dict[str, Any]:
    positions = material.selected(run)
    place = np.zeros(len(pool.examples), np.uint32)
    place[positions] = np.arange(1, len(positions) + 1)
    share = "all" if run.is_full else f"{100 * run.alpha:g} %"
    selector = str((run.config.get("selector") or {}).get("name", "?"))
    name = "everything" if run.is_full else f"{pool.methods[method]['name']} at {share}"
    if selector not in ("topk", "?") and not run.is_full:
        name += f", {selector}"
    return {
        "name": name,
        "method": method,
        "share": share,
        "budget": int(run.one("select").info.get("budget", len(positions))),
        "size": len(positions),
        "selector": selector,
        "everything": run.is_full,
        "place": place,
    }


def pack(pool: Pool, most: int = MOST) -> Packed:
    """Return at most `most` examples of a pool in packed form: columns (scores as 32-bit floats), then texts."""
    rows = held(pool, most)
    packed = bytearray()
    offsets: dict[tuple[str, bytes], int] = {}  # equal columns are stored once

    def described(value: Any) -> Any:
        """Append the page's n entries of every array (N,) in the nested `value`, from a multiple of four bytes on.

        Returns a copy of `value` with `[type, offset]` in place of each array; types are f4, u4, u2, u1, little-endian.
        """
        if isinstance(value, Mapping):
            return {key: described(item) for key, item in value.items()}
        if isinstance(value, list):
            return [described(item) for item in value]
        if not isinstance(value, np.ndarray):
            return value
        kind = f"{value.dtype.kind}{value.dtype.itemsize}"
        data = value[rows].astype(f"<{kind}").tobytes()
        if (kind, data) not in offsets:
            packed.extend(bytes(-len(packed) % 4))
            offsets[kind, data] = len(packed)
            packed.extend(data)
        return [kind, offsets[kind, data]]

    count = len(pool.examples)
    labels, label = _coded(pool.quality or [""] * count)
    families, family = _coded(pool.family or [""] * count)
    fields = []
    for example in pool.examples:
        before = "\n".join(f"{turn.role}: {turn.content}" for turn in example.history)
        fields.append((example.instruction, example.input, example.output, before))
    about = described(
        {
            "name": pool.name,
            "rows": len(rows),
            "total": count,
            "statuses": list(STATUSES),
            "labels": labels if pool.quality else [],
            "families": families if pool.family else [],
            "label": label,
            "family": family,
            "row_index": np.array([example.row_index for example in pool.examples], np.uint32),
            "methods": pool.methods,
            "selections": pool.selections,
            "hidden": np.array([sum(max(0, len(text) - CUT) for text in texts) for texts in fields], np.uint32),
        }
    )
    about["texts"] = len(packed)
    texts = _END.join(_FIELD.join(presentable(text[:CUT]) for text in fields[row]) for row in rows)
    data = gzip.compress(bytes(packed) + texts.encode("utf-8"), 4, mtime=0)
    return Packed(about, base64.b64encode(data).decode("ascii"))


def held(pool: Pool, most: int) -> np.ndarray:
    """Return the positions (n,) of the examples that the page holds, ascending.

    All examples are held if there are at most `most`. Otherwise the selected examples (only the first of each selection
    if more than `most` are selected) and evenly spaced other examples are held, `most` in all.
    """
    count = len(pool.examples)
    if count <= most:
        return np.arange(count)
    places = np.array([selection["place"] for selection in pool.selections])
    selected = (places > 0).any(axis=0)
    if selected.sum() > most:  # keep the first examples of each selection
        selected = ((places > 0) & (places <= most // len(places))).any(axis=0)
    room = most - int(selected.sum())
    others = np.flatnonzero(~selected)
    evenly = others[np.linspace(0, len(others) - 1, room).astype(int)] if room > 0 else others[:0]
    return np.union1d(np.flatnonzero(selected), evenly)


def _coded(names: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """Return the different names, sorted, and for each row the index of its name (uint16)."""
    known, codes = np.unique(np.array(names, dtype=object), return_inverse=True)
    return known.tolist(), codes.astype(np.uint16)
