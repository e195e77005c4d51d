"""The best of every cluster: k-means on the embeddings, the budget over the clusters, the score within.

Shape letters: n candidates, D features, C clusters.
"""

from __future__ import annotations

import numpy as np

from gradsift.diagnostics import Diagnostic
from gradsift.features.vectors import Features
from gradsift.scoring.scores import Scores
from gradsift.selection.budget import equal_shares, proportional_shares
from gradsift.selection.candidates import best_by_direction
from gradsift.selection.choice import Choice
from gradsift.selection.products import blocks


def clusters(scores: Scores, size: int, embeddings: Features, *, clusters: int, allocation: str, seed: int) -> Choice:
    """Select from k-means clusters, best score first.

    Clusters stand in the order of their best example, so that neither labels nor row order decide. Examples
    without direction belong to no cluster and are taken only where the clusters do not hold the budget.

    Args:
        clusters: how many; as many as there are different embeddings where those are fewer, which is said.
        allocation: `proportional` to the clusters' sizes (largest remainder), or `equal` (what a small
            cluster cannot fill goes to the others).
        seed: of k-means.
    """
    directed, undirected = best_by_direction(scores, embeddings)
    count = _different(embeddings, directed, clusters)
    if not count:
        return Choice(undirected[:size], [_found(np.zeros(0, dtype=np.int64), clusters)])
    labels = _by_first_seen(_kmeans(embeddings.vectors[directed], count, seed))
    sizes = np.bincount(labels)
    within = min(size, len(directed))
    shares = proportional_shares(within, sizes) if allocation == "proportional" else equal_shares(within, sizes)
    taken = _rank_in_cluster(labels, sizes) < shares[labels]
    return Choice(np.concatenate([directed[taken], undirected[: size - within]]), [_found(sizes, clusters)])


def _different(features: Features, positions: np.ndarray, most: int) -> int:
    """How many different vectors there are, counted up to `most`."""
    seen: set[bytes] = set()
    for _, rows in blocks(features, positions):
        for row in rows + 0.0:  # -0.0 is 0.0
            seen.add(row.tobytes())
            if len(seen) == most:  # no more of them than that are ever held
                return most
    return len(seen)


def _kmeans(vectors: np.ndarray, count: int, seed: int) -> np.ndarray:
    """(n,) cluster of each of `vectors` (n, D) float32; some of the `count` clusters may be empty."""
    from sklearn.cluster import MiniBatchKMeans

    # minibatches: the pool's vectors may be many gigabytes, of which this makes no further copy
    labels: np.ndarray = MiniBatchKMeans(count, batch_size=4096, n_init=3, random_state=seed).fit_predict(vectors)
    return labels


def _by_first_seen(labels: np.ndarray) -> np.ndarray:
    """The same clusters, numbered without gaps in the order in which they first occur."""
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    order = np.empty(len(first), dtype=np.int64)
    order[np.argsort(first)] = np.arange(len(first))
    return order[inverse]


def _rank_in_cluster(labels: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """(n,) how many members of its cluster stand before each example."""
    order = np.argsort(labels, kind="stable")
    starts = np.cumsum(sizes) - sizes
    ranks = np.empty(len(labels), dtype=np.int64)
    ranks[order] = np.arange(len(labels)) - starts[labels[order]]
    return ranks


def _found(sizes: np.ndarray, asked: int) -> Diagnostic:
    values: dict[str, float | None] = {
        "clusters": len(sizes),
        "asked": asked,
        "smallest": int(sizes.min()) if len(sizes) else None,
        "largest": int(sizes.max()) if len(sizes) else None,
    }
    seen = f"{len(sizes):,} clusters were found, and selector.clusters={asked:,}"
    check = "whether many examples have the same embedding, or lower selector.clusters"
    return Diagnostic.judged("clusters", len(sizes) < asked, values, seen, check)
