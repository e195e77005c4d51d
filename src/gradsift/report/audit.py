"""The noise audit of one scorer: does its score keep known corruption out of the selection?

It reads what no scorer sees: the labels of the embedded world, and of `data.corruption` on a user's own data. Three
kinds of figure, because each alone misleads: the spoilt share of the selection at the budgets that matter (a score may
sort the whole pool well and still spoil its head), the AUROC of each kind of corruption (the head may be clean by
luck), and the number of families kept (a score may buy purity with sameness).

Shape letters: N examples of the pool, k selected ones.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gradsift.config import COPIES
from gradsift.data.load import SPOILT, Labels
from gradsift.data.verifiable import DEFINING, DELAYED, effective_families
from gradsift.scoring.scores import SCORED, Scores

CLEAN = "clean"
GROUPS = {"defining": DEFINING, "delayed": DELAYED}  # families of `data.delayed`, by what is said of them


def audit(
    scores: Scores, labels: Labels, families: Sequence[str], chosen: Mapping[float, np.ndarray]
) -> dict[str, Any]:
    """All figures of one scorer, as JSON values; None where a figure is not defined.

    Args:
        families: (N,) kind of task of each example, from the labels or from clusters.
        chosen: for each alpha the selected positions (k,).
    """
    quality = np.array(labels.quality)
    spoilt = np.isin(quality, SPOILT)
    ranked = np.where(scores.status == SCORED, scores.score, -np.inf)  # what has no score is never selected
    clean = ranked[quality == CLEAN]
    kinds = {kind: ranked[quality == kind] for kind in (*SPOILT, *COPIES)}
    return {
        "rows": len(quality),
        "spoilt": float(spoilt.mean()),
        "duplicates": float(np.isin(quality, COPIES).mean()),
        "families_pool": effective_families(families),
        "auroc_spoilt": auroc(clean, ranked[spoilt]),
        "kinds": {
            kind: {"rows": len(theirs), "auroc": auroc(clean, theirs)} for kind, theirs in kinds.items() if len(theirs)
        },
        "groups": _groups(ranked, labels),
        "selections": [_selection(alpha, positions, labels, families) for alpha, positions in sorted(chosen.items())],
    }


def auroc(clean: np.ndarray, other: np.ndarray) -> float | None:
    """Chance that a random clean example scores higher than a random one of the others; ties count half.

    1: every clean example stands before the others; 0.5: the score cannot tell them; below 0.5: it prefers the others.
    None where either is empty.
    """
    if not len(clean) or not len(other):
        return None
    ordered = np.sort(other)
    below, not_above = (np.searchsorted(ordered, clean, side) for side in ("left", "right"))
    return float((below + not_above).sum() / (2 * len(clean) * len(other)))


def spread_of_random(share: float, rows: int, chosen: int) -> float:
    """Standard deviation of the spoilt share among `chosen` of `rows` drawn at random without replacement."""
    if rows <= 1:
        return 0.0
    return math.sqrt(share * (1 - share) / chosen * (rows - chosen) / (rows - 1))


def kept_twice(positions: Sequence[int], origin: Sequence[int | None] | None) -> float | None:
    """Share of the selected copies whose original is selected too; None where no injected copy is."""
    selected = set(positions)
    originals = [source for position in positions if origin and (source := origin[position]) is not None]
    return sum(source in selected for source in originals) / len(originals) if originals else None


def _selection(alpha: float, positions: np.ndarray, labels: Labels, families: Sequence[str]) -> dict[str, Any]:
    chosen: list[int] = sorted(int(position) for position in positions)
    counts = Counter(labels.quality[position] for position in chosen)
    base = sum(quality in SPOILT for quality in labels.quality) / len(labels.quality)
    groups = {name: _group_shares(chosen, labels, family) for name, family in GROUPS.items() if _has(labels, family)}
    return {
        "alpha": alpha,
        "rows": len(chosen),
        "spoilt": sum(counts[kind] for kind in SPOILT) / len(chosen),
        "spoilt_random_sd": spread_of_random(base, len(labels.quality), len(chosen)),
        "duplicates": sum(counts[kind] for kind in COPIES) / len(chosen),
        "kept_twice": kept_twice(chosen, labels.origin),
        "families": effective_families([families[position] for position in chosen]),
        "qualities": {kind: counts[kind] / len(chosen) for kind in sorted(set(labels.quality))},
        "groups": groups,
        "positions": chosen,
    }


def _has(labels: Labels, family: str) -> bool:
    return labels.family is not None and family in labels.family


def _group_shares(chosen: Sequence[int], labels: Labels, family: str) -> float:
    """Share of a family's clean examples in the selection."""
    family_of = labels.family or []
    return sum(family_of[p] == family and labels.quality[p] == CLEAN for p in chosen) / len(chosen)


def _groups(ranked: np.ndarray, labels: Labels) -> dict[str, Any]:
    """How the delayed families' clean examples rank among all other clean ones: above 0.5 they are preferred."""
    clean, family = np.array(labels.quality) == CLEAN, np.array(labels.family or [])
    found = {}
    for name, its in GROUPS.items():
        if _has(labels, its):
            theirs = clean & (family == its)
            others = clean & ~np.isin(family, list(GROUPS.values()))
            found[name] = {
                "rows": int(theirs.sum()),
                "share": float(theirs.mean()),
                "auroc": auroc(ranked[theirs], ranked[others]),
            }
    return found
