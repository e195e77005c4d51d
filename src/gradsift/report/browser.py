"""The data of the report's example browser: the examples of a pool, with the scores and selections of every method.

The page contains two things for each pool: a byte string, compressed and written as base64, and a JSON description of
the columns in the byte string. The page's script reads the columns as typed arrays. It searches all texts as one
string, which keeps a search over 52,000 examples fast.

Shape letters: N examples of the pool, n examples on the page.
"""

from __future__ import annotations

import base64
import gzip
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from gradsift.data.examples import Example
from gradsift.pages import presentable
from gradsift.report.material import Material, Run
from gradsift.report.run_tables import grouped
from gradsift.report.table import percent
from gradsift.scoring.scores import EXCLUDED, SCORED, UNDEFINED
from gradsift.selection.choice import best_first

CUT = 400  # characters of a text on the page; the rest is cut off
MOST = 100_000  # examples on a page
STATUSES = (SCORED, UNDEFINED, EXCLUDED)
_END, _FIELD = "\x1e", "\x1f"  # separators, which no presentable text contains


@dataclass(frozen=True, eq=False)
class Pool:
    """The examples of one dataset and seed, with the scores and selections of all runs.

    The page's script reads `methods` and `selections`. The columns in their entries are arrays (N,).

    In an entry of `methods`, `rank` is 1 for the highest score (equal scores are ranked in row order) and 0 for
    examples without a score. `parts` has the numbers from which the score is computed, and the statistics of the
    ensemble.

    In an entry of `selections`, `method` is an index into `methods`. `place` is the example's place in the selection,
    counted from 1, or 0 for examples that are not selected. `everything` is True for the full-data run.
    """

    name: str
    examples: Sequence[Example]
    quality: Sequence[str] | None
    family: Sequence[str] | None
    methods: list[dict[str, Any]] = field(default_factory=list)
    selections: list[dict[str, Any]] = field(default_factory=list)


class Packed(NamedTuple):
    """A pool in the form in which the page contains it."""

    about: dict[str, Any]  # written as JSON: names, and the type and offset of each column
    data: str  # columns and texts, compressed with gzip, as base64


def pools(material: Material) -> list[Pool]:
    """Return the pools of the runs whose data, scores and selection are in the store."""
    runs = [run for run in material.runs if run.has("load") and run.has("score") and run.has("select")]
    return [_pool(material, group) for group in grouped(runs, lambda run: run.data).values()]


def _pool(material: Material, runs: Sequence[Run]) -> Pool:
    runs = [run for run in runs if not run.is_full] or runs
    labels = material.labels(runs[0])
    seed = runs[0].record.get("data_seed")
    name = str(runs[0].record.get("dataset", "data")) + (f", seed {seed}" if seed is not None else "")
    quality, family = (None, None) if labels is None else (labels.quality, labels.family)
    pool = Pool(name, material.examples(runs[0]), quality, family)
    by_scores = grouped(runs, lambda run: run.one("score").fingerprint)  # several runs may share their scores
    for run, *_ in by_scores.values():
        taken = [method["name"] for method in pool.methods]
        names = (run.method, f"{run.method}, seed {run.record.get('seed')}", f"{run.method} ({run.name})")
        pool.methods.append(_method(material, run, next(name for name in names if name not in taken)))
    for run, *_ in grouped(runs, lambda run: run.one("select").fingerprint).values():
        method = list(by_scores).index(run.one("score").fingerprint)
        pool.selections.append(_selection(material, run, pool, method))
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
    share = "all" if run.is_full else percent(run.alpha)
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


def packed_pools(all_pools: Sequence[Pool], most: int = MOST) -> list[Packed]:
    """Pack the pools.

    If all pools together have more than `most` examples, each pool keeps the same share of its examples.
    """
    total = max(most, sum(len(pool.examples) for pool in all_pools))
    return [pack(pool, math.ceil(most * len(pool.examples) / total)) for pool in all_pools]


def pack(pool: Pool, most: int = MOST) -> Packed:
    """Pack at most `most` examples of a pool: first the columns, with scores as 32-bit floats, then the texts."""
    rows = held(pool, most)
    packed = bytearray()
    offsets: dict[tuple[str, bytes], int] = {}  # by type and content, so that equal columns are stored once

    def described(value: Any) -> Any:
        """Append every array (N,) in the nested `value` to `packed`, reduced to the n examples on the page.

        Return a copy of `value` with `[type, offset]` in place of each array. The type is f4, u4, u2 or u1,
        little-endian. The offset is the position of the array's first byte in `packed`, a multiple of four.
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
    """Return the positions (n,) of the examples that the page shows, in ascending order.

    The page shows at most `most` examples. If the pool has more, the examples with the best places in a selection are
    taken first. The others are drawn at random, with a fixed seed, from the examples that are not selected.
    """
    count = len(pool.examples)
    best = np.full(count, count + 1)
    for selection in pool.selections:
        best = np.where(selection["place"] > 0, np.minimum(best, selection["place"]), best)
    order = np.lexsort((np.random.default_rng(0).permutation(count), best))
    return np.sort(order[:most])


def _coded(names: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """Return the different names in sorted order, and for each row the index of its name (uint16)."""
    known, codes = np.unique(np.array(names, dtype=object), return_inverse=True)
    return known.tolist(), codes.astype(np.uint16)
