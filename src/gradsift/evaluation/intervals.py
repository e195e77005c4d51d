"""Confidence intervals and tests of the pairwise winning score (PWS), over items and over seeds of the finetuning.

An item's outcome is win (+1), tie (0) or lose (-1), and PWS - 1 is the mean outcome. The confidence interval of the
mean outcome is Tango's score interval for the difference between two paired proportions (Statistics in Medicine 17,
1998). The interval contains the values t for which a test does not reject the hypothesis that the mean is t; the test
uses the variance under this hypothesis. Unlike the interval of a percentile bootstrap, it has a width above 0 even if
every item has the same outcome. It stays within [-1, 1].

Runs with different seeds answer the same items, so their outcomes are not independent. A random effects model with the
factors seed and item gives the variance of the mean. The interval is then computed for an effective number of items:
the number of independent items whose mean would have this variance. In the embedded world (`data=verifiable`), each
data seed has its own questions under the same item ids, so the random effects model treats unrelated questions as one
item. The estimated variance of the mean is still unbiased, except that the lower bound in `variance_of_mean` can
increase it. `benchmarks/interval_coverage.py` measures the coverage.

Outcomes are arrays (S, N) of -1, 0 and 1, with S seeds and N items; `confidence` is the coverage, between 0 and 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


def mean_interval(outcomes: np.ndarray, confidence: float = 0.95) -> tuple[float, float]:
    """Return the confidence interval of the mean of `outcomes` (S, N) over seeds and items."""
    from scipy import stats

    outcomes = np.asarray(outcomes, dtype=float)
    size, freedom = independent_items(outcomes)
    critical = float(stats.t.ppf((1 + confidence) / 2, freedom))
    return score_interval(float((outcomes > 0).mean()), float((outcomes < 0).mean()), size, critical)


def independent_items(outcomes: np.ndarray) -> tuple[float, float]:
    """Return the effective number of items (see the top of this module) and the variance's degrees of freedom.

    The variance is that of the mean outcome. The effective number is at most S N. With one seed, or if the variance is
    0, the result is N and infinity.
    """
    seeds, items = outcomes.shape
    variance, freedom = variance_of_mean(outcomes)
    if seeds == 1 or variance == 0:
        return items, math.inf
    of_one = float((outcomes**2).mean() - outcomes.mean() ** 2)  # variance of one item's outcome
    return min(outcomes.size, of_one / variance), freedom


def variance_of_mean(values: np.ndarray) -> tuple[float, float]:
    """Return the variance of the mean of `values` (S, N), and its degrees of freedom (Satterthwaite).

    In a two-way random effects model with the mean squares of items (MS_i), of seeds (MS_s) and of the residual (MS_e),
    the variance is (MS_i + MS_s - MS_e) / (S N). If the variance is below the largest of these mean squares divided by
    S N, this lower bound is returned instead. With one seed the variance is MS_i / N.
    """
    seeds, items = values.shape
    mean = values.mean()
    of_items = values.mean(0) - mean
    if seeds == 1:
        return float((of_items**2).sum() / max(1, items - 1) / items), max(1, items - 1)
    of_seeds = values.mean(1) - mean
    rest = values - mean - of_items - of_seeds[:, None]
    freedoms = (max(1, items - 1), seeds - 1, max(1, (items - 1) * (seeds - 1)))
    squares = (seeds * (of_items**2).sum(), items * (of_seeds**2).sum(), (rest**2).sum())
    means = [float(square) / freedom for square, freedom in zip(squares, freedoms, strict=True)]
    combined, largest = means[0] + means[1] - means[2], max(means)
    if combined < largest or largest == 0:
        return largest / values.size, freedoms[means.index(largest)]
    spread = sum(square**2 / freedom for square, freedom in zip(means, freedoms, strict=True))
    return combined / values.size, max(1.0, combined**2 / spread)


def score_interval(win: float, lose: float, size: float, critical: float) -> tuple[float, float]:
    """Return the bounds of Tango's score interval for `win - lose`.

    Args:
        win, lose: shares of items that are won and lost.
        size: number of independent items; may be fractional.
        critical: quantile of the normal or t distribution, such as 1.96 for a coverage of 95 %.
    """
    mean = win - lose

    def is_rejected(value: float) -> bool:
        # expected_lose: maximum likelihood estimate of the share of lost items if the mean is `value`
        linear = -win - lose + (2 - mean) * value
        root = math.sqrt(max(0.0, linear**2 + 8 * lose * value * (1 - value)))
        expected_lose = (root - linear) / 4
        variance = max(0.0, 2 * expected_lose + value - value**2) / size
        return abs(mean - value) > critical * math.sqrt(variance)

    def bound(end: float) -> float:
        inside, outside = mean, end
        if not is_rejected(end):
            return end
        for _ in range(50):
            middle = (inside + outside) / 2
            inside, outside = (inside, middle) if is_rejected(middle) else (middle, outside)
        return inside

    return bound(-1.0), bound(1.0)


def p_value(outcomes: np.ndarray) -> float:
    """Return the two-sided p-value of the hypothesis that the mean outcome is 0.

    For one seed, it is the p-value of the exact sign test on the items that are not ties; however few items there are,
    this test rejects a true hypothesis no more often than its level allows. For several seeds, it is the larger p-value
    of two tests: the score test (McNemar) with the variance from `variance_of_mean`, and the t test over the means of
    the seeds. The score test alone rejects too often if there are few seeds whose means agree by chance. If all
    outcomes are ties, the p-value is 1.
    """
    from scipy import stats

    outcomes = np.asarray(outcomes, dtype=float)
    decided = float((outcomes != 0).mean())
    if decided == 0:
        return 1.0
    if len(outcomes) == 1:
        return float(stats.binomtest(int((outcomes > 0).sum()), int((outcomes != 0).sum())).pvalue)
    size, freedom = independent_items(outcomes)
    statistic = abs(float(outcomes.mean())) / math.sqrt(decided / size)
    return max(float(2 * stats.t.sf(statistic, freedom)), _seeds_p_value(outcomes))


def _seeds_p_value(values: np.ndarray) -> float:
    """Return the p-value of the t test over the means of the seeds.

    If there is one seed or the means are equal, the test is not defined, and the result is 0. This has no effect,
    because callers take the larger of two p-values.
    """
    from scipy import stats

    means = values.mean(1)
    if len(means) == 1 or np.ptp(means) < 1e-12:
        return 0.0
    return float(2 * stats.t.sf(abs(means.mean()) / (means.std(ddof=1) / math.sqrt(len(means))), len(means) - 1))


@dataclass(frozen=True)
class Difference:
    """The difference of two mean outcomes over the same items and seeds, with its interval and p-value."""

    difference: float
    low: float
    high: float
    p_value: float


def difference(first: np.ndarray, second: np.ndarray, confidence: float = 0.95) -> Difference:
    """Compare the outcomes (S, N) of two models against the same reference, on the same items and with the same seeds.

    The interval combines the score intervals of the two models with the correlation of their means (method of variance
    estimates recovery, MOVER; Zou and Donner, Statistics in Medicine 27, 2008). Its width is above 0 even if all items
    have the same difference. For one seed, or if the variance of the difference is 0, the p-value is that of the exact
    sign-flip test over items. Otherwise it is the larger p-value of two t tests: one with the variance from
    `variance_of_mean`, and one over the means of the seeds.
    """
    from scipy import stats

    first, second = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    gap = first - second
    mean = float(gap.mean())
    variance, freedom = variance_of_mean(gap)
    of_first, of_second = variance_of_mean(first)[0], variance_of_mean(second)[0]
    product = 2 * math.sqrt(of_first * of_second)
    correlation = 0.0 if product == 0 else min(1.0, max(-1.0, (of_first + of_second - variance) / product))
    (low_1, high_1), (low_2, high_2) = mean_interval(first, confidence), mean_interval(second, confidence)
    below, above = float(first.mean()) - low_1, high_1 - float(first.mean())
    below_2, above_2 = float(second.mean()) - low_2, high_2 - float(second.mean())
    # The interval is at least as wide as the t interval of the mean difference, because the correlation is an estimate.
    # It is also at least as wide as the interval for outcomes that are all ties, because models that do not differ on
    # these items may differ on others.
    of_gaps = float(stats.t.ppf((1 + confidence) / 2, freedom)) * math.sqrt(variance)
    least = max(of_gaps, mean_interval(np.zeros_like(gap), confidence)[1])
    low = mean - max(least, math.sqrt(max(0.0, below**2 - 2 * correlation * below * above_2 + above_2**2)))
    high = mean + max(least, math.sqrt(max(0.0, above**2 - 2 * correlation * above * below_2 + below_2**2)))
    if len(gap) == 1 or variance == 0:
        probability = _sign_flip_p_value(gap.mean(0))
    else:
        of_items = float(2 * stats.t.sf(abs(mean) / math.sqrt(variance), freedom))
        probability = max(of_items, _seeds_p_value(gap))
    return Difference(mean, max(-2.0, low), min(2.0, high), probability)


def _sign_flip_p_value(gaps: np.ndarray) -> float:
    """Return the p-value of the exact sign-flip test on `gaps` (N,).

    The p-value is the share of the 2^N possible choices of the signs of `gaps` for which the sum is, in absolute value,
    at least |sum(gaps)|.
    """
    from scipy import stats

    sums, shares = np.zeros(1), np.ones(1)
    for size, count in zip(*np.unique(np.abs(gaps[gaps != 0]), return_counts=True), strict=True):
        positive = np.arange(count + 1)
        sums = np.add.outer(sums, size * (2 * positive - count)).ravel()
        shares = np.multiply.outer(shares, stats.binom.pmf(positive, count, 0.5)).ravel()
    return min(1.0, float(shares[np.abs(sums) >= abs(gaps.sum()) - 1e-9].sum()))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return Holm's adjusted p-values, in the order of `p_values`.

    If all hypotheses with an adjusted p-value below a level are rejected, the probability of any false rejection is at
    most this level.
    """
    values = np.asarray(p_values, dtype=float)
    order = np.argsort(values, kind="stable")
    adjusted = np.empty_like(values)
    adjusted[order] = np.maximum.accumulate(np.arange(len(values), 0, -1) * values[order]).clip(max=1.0)
    return [float(value) for value in adjusted]
