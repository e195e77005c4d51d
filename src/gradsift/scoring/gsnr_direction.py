"""A variant of GRADFILTERING that uses the directions of the gradients: our reading of the paper's open question 2.

    score_i = (1/M) sum_m cos(g_i^m, g^m)               weigh=none
    score_i = rank_i x (1/M) sum_m cos(g_i^m, g^m)      weigh=gsnr

g_i^m is the gradient of example i at member m's late snapshot, and g^m is the mean of these gradients over the pool.
rank_i is the share of examples whose G-SNR (Eq. 5) is at most the G-SNR of i. The rank replaces the G-SNR itself for
two reasons: a product of two negative factors would be positive, and the largest products would come from tiny
variances.
"""

from __future__ import annotations

import numpy as np

from gradsift.gradients.statistics import Statistics
from gradsift.scoring.gsnr import gsnr
from gradsift.scoring.scores import NO_RESPONSE, UNDEFINED, Scores
from gradsift.scoring.similarity import NO_GRADIENT


def gsnr_direction(statistics: Statistics, directions: np.ndarray, *, weigh: str, eps: float) -> Scores:
    """Return the cosine of each example's gradient with the pool's mean gradient, averaged over the members.

    Args:
        directions: (M, N) cos(g_i^m, g^m) of M members and N examples; NaN if a member's gradient of an example is
            zero.
        weigh: `none`, or `gsnr` to multiply the mean cosine by rank_i (see the module's docstring).
        eps: the eps in the denominators of the G-SNR.
    """
    known = ~np.isnan(directions)
    count = known.sum(0)  # (N,) members with a gradient of the example
    undefined = np.full(len(count), np.nan)
    cosine = np.divide(np.where(known, directions, 0.0).sum(0), count, out=undefined.copy(), where=count > 0)
    squares = np.where(known, directions - cosine, 0.0) ** 2
    deviation = np.sqrt(np.divide(squares.sum(0), count, out=undefined, where=count > 0))
    ratio = gsnr(statistics, eps=eps)
    rank = shares_not_above(ratio.score)
    parts = {"cosine": cosine, "cosine_deviation": deviation, "gsnr": ratio.score, "gsnr_rank": rank}
    scores = Scores(cosine * rank if weigh == "gsnr" else cosine.copy(), parts)
    if weigh == "gsnr":
        scores.diagnostics += ratio.diagnostics
    scores.mark(np.isnan(statistics.G_t), UNDEFINED, NO_RESPONSE)
    scores.mark(count == 0, UNDEFINED, NO_GRADIENT)
    return scores


def shares_not_above(values: np.ndarray) -> np.ndarray:
    """Return for each value (N,) the share of the finite values that are not larger; NaN if the value is not finite."""
    from scipy.stats import rankdata

    finite = np.isfinite(values)
    ranks = rankdata(np.where(finite, values, np.nan), method="max", nan_policy="omit")
    return np.asarray(ranks / max(1, finite.sum()))
