"""The noise audit of one scorer: does its score keep known corruption out of the selection?

The audit uses labels that methods do not see: those of the embedded world or of `data.corruption`. Its main measures,
each with the reason why the others do not suffice:

    spoilt share  share of spoilt rows (rows that teach something wrong) in the selection at each alpha. Even with a
                  high AUROC, the few rows with the highest scores may be spoilt.
    AUROC         of clean rows against each kind of corrupted rows. A small selection may be clean by chance.
    families      effective number of families (kinds of task) in the selection. Clean rows may come from few families.

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

AUDIT_FILE = "audit.json"
CLEAN = "clean"
GROUPS = {"defining": DEFINING, "delayed": DELAYED}  # families of `data.delayed`, by their names in reports


def audit(
    scores: Scores, labels: Labels, families: Sequence[str], chosen: Mapping[float, np.ndarray]
) -> dict[str, Any]:
    """Return the audit of one scorer as JSON values; a measure that is not defined is None.

    The key `groups` has the families that `data.delayed` adds. For each group in the data, an AUROC compares the
    group's clean examples with the clean examples that are in no group.

    Args:
        families: (N,) kind of task of each example, from the labels or from clusters.
        chosen: the positions (k,) of the selected examples, for each alpha.
    """
    quality = np.array(labels.quality)
    spoilt = np.isin(quality, SPOILT)
    ranked = np.where(scores.status == SCORED, scores.score, -np.inf)  # rows without a score are never selected
    kinds = {kind: ranked[quality == kind] for kind in (*SPOILT, *COPIES)}
    is_clean = quality == CLEAN
    clean = ranked[is_clean]
    family = np.array(labels.family or [])
    groups = {}
    for name, its_family in _groups_in(labels).items():
        members = is_clean & (family == its_family)
        others = is_clean & ~np.isin(family, list(GROUPS.values()))
        groups[name] = {
            "rows": int(members.sum()),
            "share": float(members.mean()),
            "auroc": auroc(ranked[members], ranked[others]),  # above 0.5: the score prefers the group
        }
    return {
        "rows": len(quality),
        "spoilt": float(spoilt.mean()),
        "duplicates": float(np.isin(quality, COPIES).mean()),
        "families_pool": effective_families(families),
        "auroc_spoilt": auroc(clean, ranked[spoilt]),
        "kinds": {
            kind: {"rows": len(ranks), "auroc": auroc(clean, ranks)} for kind, ranks in kinds.items() if len(ranks)
        },
        "groups": groups,
        "selections": [_selection(alpha, positions, labels, families) for alpha, positions in sorted(chosen.items())],
    }


def auroc(clean: np.ndarray, other: np.ndarray) -> float | None:
    """Return the chance that a random entry of `clean` is above a random entry of `other`; ties count half.

    The result is None if either array is empty.
    """
    if not len(clean) or not len(other):
        return None
    ordered = np.sort(other)
    # The Mann-Whitney statistic over all pairs, in O(n log n): a clean score is above `below` other scores and equal to
    # `not_above` - `below` of them, so (`below` + `not_above`) / 2 counts a tie half.
    below, not_above = (np.searchsorted(ordered, clean, side) for side in ("left", "right"))
    return float((below + not_above).sum() / (2 * len(clean) * len(other)))


def spread_of_random(share: float, rows: int, chosen: int) -> float:
    """Return the standard deviation of the spoilt share of `chosen` rows, drawn at random without replacement.

    Args:
        share: spoilt share of all `rows` rows, from which the `chosen` rows are drawn.
    """
    if rows <= 1:
        return 0.0
    # hypergeometric: binomial times the correction for drawing without replacement
    return math.sqrt(share * (1 - share) / chosen * (rows - chosen) / (rows - 1))


def kept_twice(positions: Sequence[int], origin: Sequence[int | None] | None) -> float | None:
    """Return the share of selected injected copies whose original is selected too; None if no such copy is selected."""
    selected = set(positions)
    originals = [source for position in positions if origin and (source := origin[position]) is not None]
    return sum(source in selected for source in originals) / len(originals) if originals else None


def _selection(alpha: float, positions: np.ndarray, labels: Labels, families: Sequence[str]) -> dict[str, Any]:
    chosen: list[int] = sorted(int(position) for position in positions)
    counts = Counter(labels.quality[position] for position in chosen)
    base = sum(quality in SPOILT for quality in labels.quality) / len(labels.quality)
    clean_families = Counter(labels.family[p] for p in chosen if labels.quality[p] == CLEAN) if labels.family else {}
    return {
        "alpha": alpha,
        "rows": len(chosen),
        "spoilt": sum(counts[kind] for kind in SPOILT) / len(chosen),
        "spoilt_random_sd": spread_of_random(base, len(labels.quality), len(chosen)),
        "duplicates": sum(counts[kind] for kind in COPIES) / len(chosen),
        "kept_twice": kept_twice(chosen, labels.origin),
        "families": effective_families([families[position] for position in chosen]),
        "qualities": {kind: counts[kind] / len(chosen) for kind in sorted(set(labels.quality))},
        "groups": {name: clean_families.get(family, 0) / len(chosen) for name, family in _groups_in(labels).items()},
        "positions": chosen,
    }


def _groups_in(labels: Labels) -> dict[str, str]:
    return {name: family for name, family in GROUPS.items() if family in (labels.family or [])}
