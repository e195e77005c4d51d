"""Selection by clusters: k-means groups the embeddings, and each cluster's highest scores get a share of the budget.

Shape letters: n candidates, D features, C clusters.
"""

from __future__ import annotations

import numpy as np

from gradsift.diagnostics import Diagnostic
from gradsift.features.vectors import Features, blocks
from gradsift.scoring.scores import Scores
from gradsift.selection.budget import equal_shares, proportional_shares
from gradsift.selection.choice import Choice, best_by_direction, rank_within


def clusters(scores: Scores, size: int, embeddings: Features, *, clusters: int, allocation: str, seed: int) -> Choice:
    """Select the examples with the highest scores in each k-means cluster.

    Examples whose embedding is zero belong to no cluster and are taken only if the clusters do not fill the budget.

    Args:
        clusters: number of clusters. If fewer are found, because there are fewer different embeddings or k-means leaves
            some clusters empty, a diagnostic warns.
        allocation: how the budget is divided among the clusters. `proportional` divides it in proportion to the
            clusters' sizes (largest-remainder rounding). `equal` divides it equally; a cluster smaller than its share
            is selected whole, and the other clusters share what it leaves.
        seed: seed of k-means.
    """
    from sklearn.cluster import MiniBatchKMeans

    directed, undirected = best_by_direction(scores, embeddings)
    count = _different(embeddings, directed, clusters)
    if not count:
        return Choice(undirected[:size], [_diagnostic(0, clusters)])
    # mini-batches, because KMeans would copy the pool's vectors, which may be many gigabytes
    kmeans = MiniBatchKMeans(count, batch_size=4096, n_init=3, random_state=seed)
    labels = _by_first_seen(kmeans.fit_predict(embeddings.vectors[directed]))  # some of the clusters may be empty
    sizes = np.bincount(labels)
    within = min(size, len(directed))
    shares = proportional_shares(within, sizes) if allocation == "proportional" else equal_shares(within, sizes)
    # `directed` runs from the highest score down, so the first shares[c] members of cluster c are its best
    taken = rank_within(labels, sizes) < shares[labels]
    return Choice(np.concatenate([directed[taken], undirected[: size - within]]), [_diagnostic(len(sizes), clusters)])


def _different(features: Features, positions: np.ndarray, most: int) -> int:
    """Return the number of different vectors at `positions`; stop counting at `most`, which bounds the memory."""
    seen: set[bytes] = set()
    for _, rows in blocks(features, positions):
        for row in rows + 0.0:  # makes -0.0 the same as 0.0
            seen.add(row.tobytes())
            if len(seen) == most:
                return most
    return len(seen)


def _by_first_seen(labels: np.ndarray) -> np.ndarray:
    """Return the labels (n,) with the clusters renumbered, without gaps, in the order in which they first occur."""
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    # k-means numbers its clusters at random. After the renumbering, the cluster with the better example has the lower
    # number, so it gets the additional row if two clusters have equal remainders.
    order = np.empty(len(first), dtype=np.int64)
    order[np.argsort(first)] = np.arange(len(first))
    return order[inverse]


def _diagnostic(found: int, asked: int) -> Diagnostic:
    message = f"{found:,} clusters were found, and selector.clusters={asked:,}"
    check = "whether many examples have the same embedding, or lower selector.clusters"
    return Diagnostic.judged("clusters", found < asked, {"clusters": found, "asked": asked}, message, check)
