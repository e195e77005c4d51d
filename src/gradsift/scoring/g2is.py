"""G2IS (arXiv 2502.11062) as a score, without its graph: agreement with the core knowledge of a target set.

    score(z) = sum_k s_k <row_z, K_k> / sum_k s_k

The core knowledge consists of principal components of the target gradients (`gradsift.selection.core_knowledge`). K_k
is the k-th of these components, with the sign for which the mean target gradient has a positive projection on K_k. s_k
is the share of the variance that K_k explains. row_z is the gradient feature of example z. The paper selects by a walk
and defines no score; this score is our reading. With `selector.fill=topup`, `selector=gradient_walk` uses this
score to fill the rest of the budget after its walks. Any other selector can rank by this score.
"""

from __future__ import annotations

from gradsift.features.vectors import Features
from gradsift.scoring.agreement import agreement, mark_undirected
from gradsift.scoring.scores import Scores
from gradsift.selection.core_knowledge import core_knowledge


def g2is(gradients: Features, target_gradients: Features, *, explained: float) -> Scores:
    """Return the variance-weighted mean projection on the components; `component:<k>` is the projection on K_k.

    Args:
        explained: least share of the target gradients' variance that the components together explain.

    Raises:
        GradsiftError: every gradient of the target set is zero.
    """
    core = core_knowledge(target_gradients, explained)
    projections = agreement(gradients, core.directions)  # (N, C)
    parts = {f"component:{k}": projections[:, k] for k in range(len(core.variances))}
    scores = Scores(projections @ core.variances / core.variances.sum(), parts)
    mark_undirected(scores, gradients)
    return scores
