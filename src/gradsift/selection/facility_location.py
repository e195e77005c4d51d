"""Facility location: a subset that contains something similar to every candidate (Superfiltering.D, arXiv 2402.00530).

    f(S) = sum over candidates i of max over j in S of sim(i, j)

The subset S is built greedily: each step adds the candidate that increases f most. As f is monotone and submodular, f
of the result is at least 1 - 1/e times the largest f of any subset of that size. In Superfiltering.D, the candidates
are the 20 % of the pool with the highest scores, and 2 % of the pool are selected.

The paper does not mention the following choices. f of the empty set is 0, so a negative cosine counts as 0. An example
whose vector is zero has similarity 0 to every example, itself included. Of candidates with equal gains, the candidate
with the highest score is picked; if their scores are equal too, the first in row order is picked.

Shape letters: n candidates, D features, B rows of a block, C columns whose gain is computed together.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

import numpy as np

from gradsift.diagnostics import Diagnostic
from gradsift.errors import ConfigError
from gradsift.features.vectors import DECIMALS, Features, blocks, squared_lengths
from gradsift.runtime import Task, unseen
from gradsift.scoring.scores import Scores
from gradsift.selection.choice import Choice, best_by_direction

_FIRST_BATCH = 16  # number of gains computed together at first; doubled until the largest gain is known
_LARGEST_BATCH = 512
_SAME = 1e-12  # squared distance of equal unit vectors, up to float64's rounding


def facility_location(
    scores: Scores, size: int, embeddings: Features, task: Task = unseen, *, similarity: str, candidates: float
) -> Choice:
    """Select candidates greedily by their gain in f; the positions are in the order in which they are picked.

    Args:
        similarity: sim(x, y) of two embeddings: `exp_distance` for exp(-||x - y|| / D), or `cosine`.
        candidates: share of the pool, between 0 and 1; this share of the examples, those with the highest scores, are
            the candidates.

    Raises:
        ConfigError: the share `candidates` of the pool has fewer than `size` examples.
    """
    # exact decimals, as in `budget`: 0.29 of 100 candidates are 29
    count = int(Fraction(str(candidates)) * len(scores.score))
    if count < size:
        raise ConfigError(
            f"selector.candidates={candidates} gives {count:,} candidates among {len(scores.score):,} examples, but "
            f"the budget is {size:,}; raise selector.candidates, or lower alpha below it"
        )
    ground = np.concatenate(best_by_direction(scores, embeddings))[:count]
    cover = _Cover(embeddings, ground, similarity)
    picked: list[int] = []
    with task("facility location", min(size, len(ground))) as advance:
        while len(picked) < min(size, len(ground)):
            picked.append(cover.pick())
            advance(1)
    diagnostics = []
    if picked:
        mean = float(cover.covered.mean())
        message = f"a candidate's mean similarity to the nearest of the {len(picked):,} selected is {mean:.4f}"
        values: dict[str, float | None] = {"mean_similarity": mean, "candidates": len(ground)}
        diagnostics.append(Diagnostic("facility_location", "ok", values, message))
    return Choice(ground[picked], diagnostics)


class _Cover:
    """The candidates and, for each candidate, its largest similarity to a picked one and an upper bound of its gain."""

    def __init__(self, features: Features, ground: np.ndarray, similarity: str) -> None:
        self.features = features
        self.ground = ground
        self.similarity = similarity
        self.squares = squared_lengths(features, ground)
        self.directed = self.squares > 0
        self.covered = np.zeros(len(ground))  # max over the picks of sim(i, .)
        self.bounds = np.full(len(ground), np.inf)  # each candidate's gain when last computed; -inf after it is picked

    def pick(self) -> int:
        """Pick the candidate with the largest gain; return its index among the candidates."""
        # Lazy greedy (Minoux, 1978): f is submodular, so a gain computed for an earlier pick is an upper bound of the
        # present gain. Gains are recomputed until no bound exceeds the best recomputed gain.
        fresh = np.zeros(len(self.ground), dtype=bool)
        batch = _FIRST_BATCH
        while (stale := self._undecided(fresh)[:batch]).size:
            self.bounds[stale] = self._gains(stale)
            fresh[stale] = True
            batch = min(2 * batch, _LARGEST_BATCH)
        best = int(np.argmax(self.bounds))
        for where, near in self._similarities(np.array([best])):
            # with the maximum over S stored, a gain needs one pass over the candidates and none over S
            self.covered[where] = np.maximum(self.covered[where], near[:, 0])
        self.bounds[best] = -np.inf
        return best

    def _undecided(self, fresh: np.ndarray) -> np.ndarray:
        """Return the candidates that may be picked before the best candidate whose gain is known, largest bound first.

        Args:
            fresh: (n,) bool, whether a candidate's bound is its present gain.
        """
        gains = np.where(fresh, self.bounds, -np.inf)
        best = int(np.argmax(gains))
        places = np.arange(len(gains))
        # a candidate with an equal bound and a higher score is undecided too: it is taken if its gain equals the best
        ahead = ~fresh & ((self.bounds > gains[best]) | ((self.bounds == gains[best]) & (places < best)))
        undecided = np.flatnonzero(ahead & (self.bounds > -np.inf))
        return undecided[np.argsort(-self.bounds[undecided], kind="stable")]

    def _gains(self, columns: np.ndarray) -> np.ndarray:
        gains = np.zeros(len(columns))
        for where, near in self._similarities(columns):
            gains += np.maximum(near - self.covered[where, None], 0).sum(0)
        # rounded, so that equal gains compare as equal, whatever the blocks in which they were added up
        return np.round(gains, DECIMALS)

    def _similarities(self, columns: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
        """Yield, block by block, a slice of B candidates and their similarities (B, C) to the candidates `columns`."""
        others = self.features.vectors[self.ground[columns]].astype(np.float64)  # (C, D)
        for where, rows in blocks(self.features, self.ground):
            inner = rows @ others.T
            if self.similarity == "cosine":
                near = np.maximum(inner, 0)
            else:
                squared = self.squares[where, None] + self.squares[columns] - 2 * inner
                squared[squared < _SAME] = 0
                distance = np.sqrt(squared, out=squared)
                distance /= -rows.shape[1]
                near = np.exp(distance, out=distance)
            near[~self.directed[where]] = 0
            near[:, ~self.directed[columns]] = 0
            yield where, near
