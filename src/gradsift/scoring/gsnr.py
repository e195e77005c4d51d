"""Gradient Signal-to-Noise Ratio and its ablations (GRADFILTERING, arXiv 2601.13697, Eq. 5 and Table 2).

    GSNR_i = (G_i^s - G_i^t) / (G_i^s + eps)  x  1 / (V_i^t + eps)

G^s and G^t are the ensemble's mean gradient norms at the early and the late snapshot; V^t is the variance of the late
norms over the members. If the norm rises from s to t, the drop G^s - G^t (the part `drop`) is negative. Dividing a
negative drop by V^t favours a high variance, although the score is meant to favour a low variance.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gradsift.gradients.ensemble_checks import eps_share
from gradsift.gradients.statistics import Statistics
from gradsift.scoring.scores import NO_RESPONSE, UNDEFINED, Scores


def ratio(G_s: np.ndarray, G_t: np.ndarray, V_t: np.ndarray, eps: float) -> np.ndarray:
    """Return Eq. 5: the normalised drop divided by the late variance; arguments and result are (N,) float64."""
    # the same eps is added to a norm and to a squared norm, so an eps that is small beside G_s may outweigh V_t
    value: np.ndarray = (G_s - G_t) / (G_s + eps) / (V_t + eps)
    return value


def gsnr(statistics: Statistics, *, eps: float) -> Scores:
    """Return the G-SNR (Eq. 5) of each example: the normalised drop divided by the late variance."""
    score = ratio(statistics.G_s, statistics.G_t, statistics.V_t, eps)
    return _scores(statistics, score, eps, ("G_s", "V_t"))


def gsnr_raw_drop(statistics: Statistics, *, eps: float) -> Scores:
    """Return the scores of the paper's ablation 1: G_s - G_t.

    `eps` has no effect; it is a parameter so that one sweep can set `scorer.eps` for all four scorers of this module.
    """
    return _scores(statistics, statistics.G_s - statistics.G_t, eps, ())


def gsnr_normalized_drop(statistics: Statistics, *, eps: float) -> Scores:
    """Return the scores of ablation 2: the normalised drop (G_s - G_t) / (G_s + eps), the first factor of Eq. 5."""
    return _scores(statistics, (statistics.G_s - statistics.G_t) / (statistics.G_s + eps), eps, ("G_s",))


def gsnr_variance_normalized(statistics: Statistics, *, eps: float) -> Scores:
    """Return the scores of ablation 3, in our reading of the paper: (G_s - G_t) / (V_t + eps)."""
    return _scores(statistics, (statistics.G_s - statistics.G_t) / (statistics.V_t + eps), eps, ("V_t",))


def _scores(statistics: Statistics, score: np.ndarray, eps: float, denominators: Sequence[str]) -> Scores:
    """Return `Scores` with G_s, G_t, V_t and the drop as parts.

    Args:
        denominators: names of the parts to which eps was added; the diagnostic `eps_share` compares eps with them.
    """
    parts = {"G_s": statistics.G_s, "G_t": statistics.G_t, "V_t": statistics.V_t}
    parts["drop"] = statistics.G_s - statistics.G_t
    diagnostics = [eps_share(eps, {name: parts[name] for name in denominators})] if denominators else []
    scores = Scores(score, parts, diagnostics)
    scores.mark(np.isnan(statistics.G_t), UNDEFINED, NO_RESPONSE)
    return scores
