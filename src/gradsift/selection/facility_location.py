"""Facility location: a subset in which every candidate has something like itself (Superfiltering.D, arXiv 2402.00530).

    f(S) = sum over candidates i of max over j in S of sim(i, j)

is monotone and submodular, so that taking the largest gain each time reaches at least 1 - 1/e of the best
f of any subset of that size. Superfiltering.D lets the best 20 % by score enter and keeps 2 % of the pool.

Our reading: f of nothing is 0, so a negative cosine counts as 0; an example without direction is like
nothing, itself included; equal gains go to the higher score, then by row order.

Shape letters: n candidates, D features, B rows of a block, C columns whose gain is computed together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from fractions import Fraction

import numpy as np

from gradsift.diagnostics import Diagnostic
from gradsift.errors import ConfigError
from gradsift.features.vectors import Features
from gradsift.runtime import Task, unseen
from gradsift.scoring.scores import Scores
from gradsift.selection.candidates import best_by_direction
from gradsift.selection.choice import Choice
from gradsift.selection.products import DECIMALS, blocks, squared_lengths

# inner products (B, C), squared lengths of the rows (B,) and of the columns (C,), and D, to (B, C) from 0
Similarity = Callable[[np.ndarray, np.ndarray, np.ndarray, int], np.ndarray]

_FIRST_BATCH = 16  # gains computed together; doubled while they do not suffice
_LARGEST_BATCH = 512
_SAME = 1e-12  # squared distance up to which two unit vectors are one: float64's rounding


def facility_location(
    scores: Scores, size: int, embeddings: Features, task: Task = unseen, *, similarity: str, candidates: float
) -> Choice:
    """Exact greedy maximisation of f over the best candidates by score, in the order of the picks.

    A gain can only shrink, so an old one is a bound: only those are computed anew that may be the largest.

    Args:
        similarity: `exp_distance`, exp(-||x - y|| / D), or `cosine`.
        candidates: share of the pool, by score, that enters.

    Raises:
        ConfigError: fewer enter than the budget.
    """
    count = int(Fraction(str(candidates)) * len(scores.score))
    if count < size:
        raise ConfigError(
            f"selector.candidates={candidates} lets {count:,} of {len(scores.score):,} examples enter, and the budget "
            f"is {size:,}; raise selector.candidates, or lower alpha below it"
        )
    ground = np.concatenate(best_by_direction(scores, embeddings))[:count]
    cover = _Cover(embeddings, ground, SIMILARITIES[similarity])
    picked: list[int] = []
    with task("facility location", min(size, len(ground))) as advance:
        while len(picked) < min(size, len(ground)):
            picked.append(cover.pick())
            advance(1)
    return Choice(ground[picked], _diagnostics(cover.covered, len(picked)))


def exp_distance(inner: np.ndarray, rows: np.ndarray, columns: np.ndarray, dimensions: int) -> np.ndarray:
    squared = rows[:, None] + columns - 2 * inner
    squared[squared < _SAME] = 0
    distance = np.sqrt(squared, out=squared)
    distance /= -dimensions
    near: np.ndarray = np.exp(distance, out=distance)
    return near


def cosine(inner: np.ndarray, rows: np.ndarray, columns: np.ndarray, dimensions: int) -> np.ndarray:
    positive: np.ndarray = np.maximum(inner, 0)
    return positive


SIMILARITIES: dict[str, Similarity] = {"exp_distance": exp_distance, "cosine": cosine}


class _Cover:
    """The candidates, how well each is covered by the picks, and bounds on what a further pick gains."""

    def __init__(self, features: Features, ground: np.ndarray, similarity: Similarity) -> None:
        self.features = features
        self.ground = ground
        self.similarity = similarity
        self.squares = squared_lengths(features, ground)
        self.directed = self.squares > 0
        self.covered = np.zeros(len(ground))  # max over the picks of sim(i, .)
        self.bounds = np.full(len(ground), np.inf)  # a candidate's gain when it was last computed; -inf once picked

    def pick(self) -> int:
        """Take the candidate with the largest gain; its place among the candidates."""
        fresh = np.zeros(len(self.ground), dtype=bool)
        batch = _FIRST_BATCH
        while (stale := self._undecided(fresh)[:batch]).size:
            self.bounds[stale] = self._gains(stale)
            fresh[stale] = True
            batch = min(2 * batch, _LARGEST_BATCH)
        best = int(np.argmax(self.bounds))
        for where, near in self._similarities(np.array([best])):
            self.covered[where] = np.maximum(self.covered[where], near[:, 0])
        self.bounds[best] = -np.inf
        return best

    def _undecided(self, fresh: np.ndarray) -> np.ndarray:
        """Candidates whose bound, but not yet their gain, is ahead of every gain; largest bound first."""
        gains = np.where(fresh, self.bounds, -np.inf)
        best = int(np.argmax(gains))
        places = np.arange(len(gains))
        ahead = ~fresh & ((self.bounds > gains[best]) | ((self.bounds == gains[best]) & (places < best)))
        found = np.flatnonzero(ahead & (self.bounds > -np.inf))
        return found[np.argsort(-self.bounds[found], kind="stable")]

    def _gains(self, columns: np.ndarray) -> np.ndarray:
        gains = np.zeros(len(columns))
        for where, near in self._similarities(columns):
            gains += np.maximum(near - self.covered[where, None], 0).sum(0)
        return np.round(gains, DECIMALS)

    def _similarities(self, columns: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
        others = self.features.vectors[self.ground[columns]].astype(np.float64)
        for where, rows in blocks(self.features, self.ground):
            near = self.similarity(rows @ others.T, self.squares[where], self.squares[columns], rows.shape[1])
            near[~self.directed[where]] = 0
            near[:, ~self.directed[columns]] = 0
            yield where, near


def _diagnostics(covered: np.ndarray, count: int) -> list[Diagnostic]:
    if not count:
        return []
    mean = float(covered.mean())
    seen = f"a candidate's mean similarity to the nearest of the {count:,} selected is {mean:.4f}"
    return [Diagnostic("facility_location", "ok", {"mean_similarity": mean, "candidates": len(covered)}, seen)]
