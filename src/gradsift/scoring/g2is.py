"""Agreement with the core knowledge of a target set: G2IS (arXiv 2502.11062) without its graph, as a score.

    score(z) = sum_k s_k <row_z, K_k> / sum_k s_k

K_k are the principal components of the target gradients (see `gradsift.selection.core_knowledge`) with the sign of
their mean's projection, and s_k the share of the variance that each explains. The paper selects by a walk and defines
no score; this is our reading. `selector=gradient_walk` uses it to fill the budget
with `selector.fill=topup`, and any other selector can rank by it.
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
