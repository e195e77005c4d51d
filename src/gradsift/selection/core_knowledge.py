"""Core knowledge: the directions along which the gradients of a target set vary most (G2IS, arXiv 2502.11062).

    K_c = X^T u_c / |X^T u_c|        for the leading eigenvectors u_c of the centred H X X^T H

which are the principal components of X, found through its inner products, as T is small beside D.

Shape letters: T target gradients, D features, C components.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gradsift.errors import GradsiftError
from gradsift.features.vectors import Features
from gradsift.selection.products import blocks, products

_NO_VARIANCE = 1e-9  # of the mean squared length: below it, what is left is float32's rounding
_NO_PROJECTION = 1e-9  # of the mean on a component: below it, the mean tells no direction


@dataclass(frozen=True)
class CoreKnowledge:
    """Components by descending variance, and what is known of the target gradients."""

    directions: np.ndarray  # (C, D) float64, length 1
    variances: np.ndarray  # (C,) share of the variance; [1] where the mean stands in for the components
    cosines: np.ndarray  # (C,) of each component with the mean target gradient, at least 0
    conflicts: float | None  # share of pairs of target gradients whose inner product is negative; None without a pair
    used: int  # T, target gradients with a direction


def core_knowledge(target: Features, explained: float) -> CoreKnowledge:
    """The fewest components that explain `explained` of the variance, turned towards the mean target gradient.

    Our reading: gradients of zero are left out; the sign of a component, which PCA leaves open, is that of
    the mean's projection on it (where that is 0, of its largest entry); a single gradient, or several
    without variance, have one component, their mean direction. Tasks are not told apart.

    Raises:
        GradsiftError: every target gradient is zero.
    """
    rows = np.flatnonzero(target.has_direction())
    if not len(rows):
        raise GradsiftError("every gradient of the target set is zero; look at its rows and at the proxy's training")
    gram = _gram(target, rows)
    mean = _combine(target, rows, np.full((1, len(rows)), 1 / len(rows)))[0]
    size = len(rows)
    pairs = gram[np.triu_indices(size, 1)]
    conflicts = float((pairs < 0).mean()) if len(pairs) else None
    centred = gram - gram.mean(0) - gram.mean(1)[:, None] + gram.mean()
    values, vectors = np.linalg.eigh(centred)
    values, vectors = np.maximum(values[::-1], 0), vectors[:, ::-1]
    if values.sum() <= _NO_VARIANCE * np.trace(gram):
        length = float(np.linalg.norm(mean))
        return CoreKnowledge(mean[None] / length, np.ones(1), np.ones(1), conflicts, size)
    shares = values / values.sum()
    count = 1 + int(np.searchsorted(np.cumsum(shares), explained - 1e-9))
    count = min(count, int((shares > _NO_VARIANCE).sum()))
    components = _combine(target, rows, vectors[:, :count].T)
    components /= np.linalg.norm(components, axis=1, keepdims=True)
    components *= _signs(components, mean)[:, None]
    length = float(np.linalg.norm(mean))
    cosines = components @ mean / length if length > 0 else np.zeros(count)
    return CoreKnowledge(components, shares[:count], cosines, conflicts, size)


def _gram(target: Features, rows: np.ndarray) -> np.ndarray:
    """(T, T) float64 inner products of the target gradients."""
    gram = np.empty((len(rows), len(rows)))
    for where, block in blocks(target, rows):
        gram[:, where] = products(target, rows, block)
    return gram


def _combine(target: Features, rows: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(C, D) float64 sums of the target gradients, weighted by `weights` (C, T)."""
    total = np.zeros((len(weights), target.vectors.shape[1]))
    for where, block in blocks(target, rows):
        total += weights[:, where] @ block
    return total


def _signs(components: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """(C,) of 1 and -1."""
    projections = components @ mean
    largest = components[np.arange(len(components)), np.abs(components).argmax(1)]
    return np.where(np.where(np.abs(projections) > _NO_PROJECTION, projections, largest) < 0, -1.0, 1.0)
