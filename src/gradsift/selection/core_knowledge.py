"""Core knowledge: the directions along which the gradients of a target set vary most (G2IS, arXiv 2502.11062).

    K_c = X^T u_c / |X^T u_c|        for the leading eigenvectors u_c of H X X^T H, with H = I - 1 1^T / T

The rows of X (T, D) are the target gradients, and H subtracts their mean. The K_c are the principal components of X.
They are computed from the (T, T) inner products of the gradients, because T is small compared to D.

Shape letters: T target gradients, D features, C components.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gradsift.errors import GradsiftError
from gradsift.features.vectors import Features, blocks, products

_NO_VARIANCE = 1e-9  # a variance below this share of the mean squared length is due to float32's rounding
_NO_PROJECTION = 1e-9  # the sign of a smaller projection of the mean on a component is due to rounding


@dataclass(frozen=True)
class CoreKnowledge:
    """The principal components by descending variance, and how often two target gradients conflict."""

    directions: np.ndarray  # (C, D) float64, length 1
    variances: np.ndarray  # (C,) share of the variance of each component; [1] if the mean replaces the components
    conflicts: float | None  # share of pairs of target gradients with a negative inner product; None if T is 1


def core_knowledge(target: Features, explained: float) -> CoreKnowledge:
    """Return the fewest leading principal components that explain at least the share `explained` of the variance.

    The G2IS paper does not mention the following choices. Target gradients that are zero are left out. PCA leaves the
    sign of a component open. We choose the sign that makes the component's inner product with the mean target gradient
    positive. If this inner product is 0, we choose the sign that makes the component's entry with the largest absolute
    value positive. If there is only one gradient, or all are equal, the only component is the normalised mean gradient.
    All target gradients have equal weight, whatever their task.

    Raises:
        GradsiftError: every target gradient is zero.
    """
    rows = np.flatnonzero(target.has_direction)
    if not len(rows):
        raise GradsiftError("every gradient of the target set is zero; look at its rows and at the proxy's training")
    size = len(rows)
    gram = np.empty((size, size))  # (T, T), X X^T
    for where, block in blocks(target, rows):
        gram[:, where] = products(target, rows, block)
    mean = _weighted_sums(target, rows, np.full((1, size), 1 / size))[0]
    # before centring: two gradients conflict if a step along one raises the loss of the other, <g, g'> < 0
    pairs = gram[np.triu_indices(size, 1)]
    conflicts = float((pairs < 0).mean()) if len(pairs) else None
    # H X X^T H with H = I - 1 1^T / T
    centred = gram - gram.mean(0) - gram.mean(1)[:, None] + gram.mean()
    values, vectors = np.linalg.eigh(centred)
    # eigh returns ascending eigenvalues, and rounding makes some that are zero negative
    values, vectors = np.maximum(values[::-1], 0), vectors[:, ::-1]
    if values.sum() <= _NO_VARIANCE * np.trace(gram):
        return CoreKnowledge(mean[None] / np.linalg.norm(mean), np.ones(1), conflicts)
    shares = values / values.sum()
    # `explained` may be 1, and the sum of all shares may be rounded to just below 1
    count = 1 + int(np.searchsorted(np.cumsum(shares), explained - 1e-9))
    count = min(count, int((shares > _NO_VARIANCE).sum()))
    # X need not be centred here: an eigenvector u with a positive eigenvalue sums to zero, so H u = u and
    # X^T u = (H X)^T u
    components = _weighted_sums(target, rows, vectors[:, :count].T)
    components /= np.linalg.norm(components, axis=1, keepdims=True)
    projections = components @ mean  # (C,)
    largest = components[np.arange(count), np.abs(components).argmax(1)]
    negative = np.where(np.abs(projections) > _NO_PROJECTION, projections, largest) < 0
    components *= np.where(negative, -1.0, 1.0)[:, None]
    return CoreKnowledge(components, shares[:count], conflicts)


def _weighted_sums(target: Features, rows: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return C weighted sums (C, D) float64 of the target gradients at `rows` (T,); `weights` is (C, T)."""
    total = np.zeros((len(weights), target.vectors.shape[1]))
    for where, block in blocks(target, rows):
        total += weights[:, where] @ block
    return total
