"""Intervals of PWS: coverage by exact enumeration, known special cases, and comparisons of two models."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from scipy import stats

from gradsift.evaluation.intervals import (
    difference,
    holm,
    independent_items,
    mean_interval,
    p_value,
    score_interval,
    variance_of_mean,
)

NORMAL = 1.959963984540054


@pytest.mark.parametrize("shares", [(0.9, 0.08, 0.02), (0.98, 0.01, 0.01), (0.3, 0.4, 0.3), (0.1, 0.8, 0.1)])
def test_the_interval_covers_the_true_mean_in_93_percent_of_all_samples_of_20_items(
    shares: tuple[float, float, float],
) -> None:
    items, truth = 20, shares[0] - shares[2]
    covered = 0.0
    for win in range(items + 1):
        for lose in range(items + 1 - win):
            low, high = score_interval(win / items, lose / items, items, NORMAL)
            if low - 1e-9 <= truth <= high + 1e-9:
                covered += float(stats.multinomial.pmf([win, items - win - lose, lose], items, shares))
    assert covered >= 0.93


def test_the_interval_has_a_width_if_all_items_have_the_same_outcome() -> None:
    low, high = mean_interval(np.ones((1, 10)))
    assert high == 1
    assert low == pytest.approx(1 - 2 * NORMAL**2 / (10 + NORMAL**2))  # Wilson's interval of 10 wins of 10
    low, high = mean_interval(np.zeros((1, 10)))
    assert low == pytest.approx(-high)
    assert high == pytest.approx(NORMAL**2 / (10 + NORMAL**2))


def test_without_ties_the_interval_is_wilsons() -> None:
    outcomes = np.repeat([1, -1], [14, 6])[None]
    wilson = stats.binomtest(14, 20).proportion_ci(method="wilson")
    assert mean_interval(outcomes) == pytest.approx((2 * wilson.low - 1, 2 * wilson.high - 1))


def test_swapping_the_models_mirrors_the_interval() -> None:
    outcomes = np.random.default_rng(0).choice([-1, 0, 1], size=(3, 30), p=[0.2, 0.3, 0.5])
    low, high = mean_interval(outcomes)
    assert mean_interval(-outcomes) == pytest.approx((-high, -low))


def test_the_p_value_of_one_seed_is_that_of_the_exact_sign_test() -> None:
    outcomes = np.repeat([1, 0, -1], [14, 10, 4])[None]
    flips = stats.binom(18, 0.5)
    assert p_value(outcomes) == pytest.approx(flips.cdf(4) + flips.sf(13))
    mcnemar = float(stats.chi2.sf((14 - 4) ** 2 / (14 + 4), 1))
    assert p_value(outcomes) > mcnemar
    low, _ = mean_interval(outcomes, 1 - mcnemar)  # the score interval ends at 0 at the level of the score test
    assert low == pytest.approx(0, abs=1e-6)
    assert p_value(np.zeros((2, 5))) == p_value(np.zeros((1, 5))) == 1


@pytest.mark.parametrize(("items", "decided"), [(26, 1.0), (20, 0.6), (80, 0.6), (80, 0.9)])
def test_at_most_5_percent_of_all_sweeps_of_24_equal_cells_call_one_different(items: int, decided: float) -> None:
    """Enumerates the wins and losses of a cell. For 26 items without ties, the score test would give 5.8 %."""
    claimed = 0.0  # probability that the p-value of a cell is below Holm's first bound
    for count in range(1, items + 1):
        wins = 0  # the smallest number of wins that is not called different
        while 2 * wins < count and p_value(np.repeat([1, -1], [wins, count - wins])[None]) < 0.05 / 24:
            wins += 1
        claimed += stats.binom.pmf(count, items, decided) * 2 * stats.binom.cdf(wins - 1, count, 0.5)
    assert 0 < 1 - (1 - claimed) ** 24 <= 0.05


def test_equal_seeds_add_no_items_and_independent_ones_do() -> None:
    rng = np.random.default_rng(1)
    one = rng.choice([-1, 0, 1], size=(1, 200))
    assert independent_items(np.repeat(one, 3, axis=0))[0] == pytest.approx(200, rel=0.01)
    apart = rng.choice([-1, 0, 1], size=(3, 200))
    assert 300 < independent_items(apart)[0] <= 600


def test_the_variance_is_that_of_the_two_way_model() -> None:
    """In simulations with effects of seeds, items and both, the mean estimate equals the variance of the means."""
    rng = np.random.default_rng(2)
    means, variances = [], []
    for _ in range(2000):
        values = rng.normal(size=(4, 1)) * 0.5 + rng.normal(size=(1, 6)) + rng.normal(size=(4, 6)) * 0.7
        means.append(values.mean())
        variances.append(variance_of_mean(values)[0])
    truth = 0.5**2 / 4 + 1 / 6 + 0.7**2 / 24
    assert np.var(means) == pytest.approx(truth, rel=0.1)
    assert np.mean(variances) == pytest.approx(truth, rel=0.1)


def test_a_difference_of_two_models_uses_the_pairing_of_the_items() -> None:
    rng = np.random.default_rng(3)
    easy = rng.choice([-1, 1], size=(1, 60))  # both models have the same outcome on an item
    first, second = easy.copy(), easy.copy()
    first[0, :6] = 1
    second[0, :6] = -1
    paired = difference(first, second)
    shuffled = difference(first, second[:, rng.permutation(60)])
    assert paired.difference == shuffled.difference == 0.2
    assert paired.low > 0 > shuffled.low
    assert paired.p_value == pytest.approx(2 / 2**6)  # six items differ, all in one direction
    mirrored = difference(second, first)
    assert (mirrored.low, mirrored.high) == pytest.approx((-paired.high, -paired.low))


def test_the_difference_of_several_seeds_counts_their_spread() -> None:
    items = np.random.default_rng(4).choice([-1, 0, 1], size=(1, 100))
    steady = np.repeat(items, 3, axis=0)
    shifted = steady.copy()
    shifted[0, :60] = 1  # a single seed is far better
    assert difference(shifted, steady).p_value > 0.05
    everywhere = steady.copy()
    everywhere[:, :60] = 1
    assert difference(everywhere, steady).p_value < 1e-6


def test_equal_models_do_not_differ() -> None:
    outcomes = np.random.default_rng(5).choice([-1, 0, 1], size=(2, 20))
    same = difference(outcomes, outcomes)
    assert (same.difference, same.p_value) == (0, 1)
    least = NORMAL**2 / (20 + NORMAL**2)  # the bound for 20 ties
    assert (same.low, same.high) == pytest.approx((-least, least))
    certain = difference(np.ones((1, 20)), -np.ones((1, 20)))
    assert certain.high == 2 and certain.low < 1.9


def test_holm_by_hand_and_its_family_wise_error() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([]) == []
    rng = np.random.default_rng(6)
    assert np.mean([min(holm(rng.uniform(size=24))) < 0.05 for _ in range(2000)]) < 0.065


def test_the_sign_flip_test_equals_the_enumeration() -> None:
    first, second = np.array([[1, 1, 0, 1, -1, 1]]), np.array([[-1, 0, 0, 1, 1, -1]])
    gaps = (first - second)[0]
    sums = [abs(sum(gaps * signs)) for signs in product((1, -1), repeat=6)]
    assert difference(first, second).p_value == pytest.approx(np.mean(np.array(sums) >= abs(gaps.sum())))
