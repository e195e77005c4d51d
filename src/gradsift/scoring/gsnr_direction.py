"""A direction-aware variant of GRADFILTERING (the paper's open question 2), in our reading.

    score_i = (1/M) sum_m cos(g_i^m, g^m)               weigh=none
    score_i = rank_i x (1/M) sum_m cos(g_i^m, g^m)      weigh=gsnr

g^m is the mean gradient of the pool at member m's late snapshot, and rank_i the share of examples whose G-SNR (Eq. 5)
is at most the G-SNR of i. A product with the G-SNR itself would be positive if both factors are negative, and its
largest values would come from tiny variances. With the rank, a cosine of either sign counts more if the example's G-SNR
is high.

Shape letters: M members, N examples.
"""

from __future__ import annotations

import numpy as np

from gradsift.gradients.statistics import Statistics
from gradsift.scoring.agreement import NO_GRADIENT
from gradsift.scoring.gsnr import gsnr
from gradsift.scoring.scores import NO_RESPONSE, UNDEFINED, Scores


def gsnr_direction(statistics: Statistics, directions: np.ndarray, *, weigh: str, eps: float) -> Scores:
    """Return each example's mean cosine with the pool's mean gradient over the members, weighted as `weigh` says.

    Args:
        directions: (M, N) cosines; NaN, which the mean leaves out, if a member's gradient of an example is zero.
        weigh: `none`, or `gsnr` to multiply the mean cosine by the rank of the G-SNR.
        eps: the eps in the denominators of the G-SNR.
    """
    known = ~np.isnan(directions)  # (M, N)
    count = known.sum(0)  # (N,) members with a gradient
    total = np.where(known, directions, 0.0).sum(0)
    cosine = np.divide(total, count, out=np.full(directions.shape[1], np.nan), where=count > 0)
    squares = np.where(known, directions - cosine, 0.0) ** 2
    deviation = np.sqrt(np.divide(squares.sum(0), count, out=np.full(len(cosine), np.nan), where=count > 0))
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

    shares = np.full(len(values), np.nan)
    finite = np.isfinite(values)
    shares[finite] = rankdata(values[finite], method="max") / max(1, finite.sum())
    return shares
