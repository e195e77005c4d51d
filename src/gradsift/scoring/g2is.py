"""G2IS (arXiv 2502.11062) as a score, without its graph: agreement with the core knowledge of a target set.

    score(z) = sum_k s_k <row_z, K_k> / sum_k s_k

K_k is the k-th principal component of the target gradients (`gradsift.selection.core_knowledge`), with the sign for
which the mean target gradient has a positive projection on it. s_k is the share of the variance that K_k explains, and
row_z is the gradient feature of example z. The paper selects by a walk on a graph and defines no score; this score is
our own.
"""

from __future__ import annotations

from gradsift.features.vectors import Features
from gradsift.scoring.scores import Scores
from gradsift.scoring.similarity import agreement, mark_undirected
from gradsift.selection.core_knowledge import core_knowledge


def g2is(gradients: Features, target_gradients: Features, *, explained: float) -> Scores:
    """Return each example's projection on the components, averaged with the weights s_k.

    The part `component:<k>` is the projection on K_k alone.

    Args:
        explained: least share of the target gradients' variance that the components together explain.
    """
    core = core_knowledge(target_gradients, explained)
    projections = agreement(gradients, core.directions)  # (N, C)
    parts = {f"component:{k}": projections[:, k] for k in range(len(core.variances))}
    scores = Scores(projections @ core.variances / core.variances.sum(), parts)
    mark_undirected(scores, gradients)
    return scores
