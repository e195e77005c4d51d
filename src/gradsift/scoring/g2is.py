"""Agreement with the core knowledge of a target set: G2IS (arXiv 2502.11062) without its graph, as a score.

    score(z) = sum_k s_k <row_z, K_k> / sum_k s_k

K_k is the k-th principal component of the target gradients, its sign chosen so that their mean has a positive
projection on it; s_k is the share of the variance that it explains; row_z is the gradient of example z (see
`gradsift.selection.core_knowledge` and `gradsift.scoring.agreement`). The paper selects by a walk and defines no score;
this is our reading. With `selector.fill=topup`, `selector=gradient_walk` fills what its walks leave of the budget by
this score. Any other selector can rank by it.
"""

from __future__ import annotations

from gradsift.features.vectors import Features
from gradsift.scoring.agreement import agreement, mark_undirected
from gradsift.scoring.scores import Scores
from gradsift.selection.core_knowledge import core_knowledge


def g2is(gradients: Features, target_gradients: Features, *, explained: float) -> Scores:
    """Return the mean projection on the components, weighted by variance; part `component:<k>` has each projection.

    Args:
        explained: share of the target gradients' variance that the components explain.

    Raises:
        GradsiftError: every gradient of the target set is zero.
    """
    core = core_knowledge(target_gradients, explained)
    projections = agreement(gradients, core.directions)  # (N, C)
    parts = {f"component:{k}": projections[:, k] for k in range(len(core.variances))}
    scores = Scores(projections @ core.variances / core.variances.sum(), parts)
    mark_undirected(scores, gradients)
    return scores
