"""Check the intervals and tests of the pairwise winning score (PWS) on simulated outcomes.

    python -m benchmarks.interval_coverage [--draws 1000]

Measures how often the 95 % intervals of a PWS and of the difference of two models contain the true value, and how often
the tests find a difference where there is none. For each seed and item, a normal variable is drawn and cut into win,
tie and lose at the quantiles that give their shares. The variable is the sum of an effect of the item, an effect of the
seed, and a rest with standard deviation 1. A design gives the number of seeds, and the
standard deviations of the effects of items and of seeds.
"""

from __future__ import annotations

import argparse

import numpy as np
from scipy import stats

from gradsift.evaluation.intervals import difference, holm, mean_interval, p_value

SHARES = ((0.9, 0.08, 0.02), (0.98, 0.01, 0.01), (0.3, 0.4, 0.3), (0.1, 0.8, 0.1), (0.05, 0.9, 0.05))
DESIGNS = ((1, 0.0, 0.0), (3, 0.0, 0.0), (3, 2.0, 0.0), (3, 1.0, 0.3), (5, 1.0, 0.3))  # seeds, item, seed effects


def draw(
    rng: np.random.Generator, shares: tuple[float, float, float], design: tuple[int, float, float], items: int
) -> np.ndarray:
    """Return outcomes (S seeds, N items) of -1 (lose), 0 (tie) and 1 (win)."""
    seeds, item_effect, seed_effect = design
    normal = rng.normal(size=(seeds, items))
    normal += item_effect * rng.normal(size=(1, items)) + seed_effect * rng.normal(size=(seeds, 1))
    normal /= np.sqrt(1 + item_effect**2 + seed_effect**2)
    lose, tie = stats.norm.ppf(shares[2]), stats.norm.ppf(shares[2] + shares[1])
    return np.where(normal < lose, -1, np.where(normal > tie, 1, 0))


def coverage(draws: int, rng: np.random.Generator) -> None:
    print("coverage of the 95 % interval of PWS; columns: seeds, effect of items, effect of seeds")
    print("items  win/tie/lose        " + "  ".join(f"{design!s:>14}" for design in DESIGNS))
    for items in (20, 30, 80):
        for shares in SHARES:
            truth = shares[0] - shares[2]
            cells = []
            for design in DESIGNS:
                intervals = [mean_interval(draw(rng, shares, design, items)) for _ in range(draws)]
                cells.append(np.mean([low <= truth <= high for low, high in intervals]))
            print(f"{items:5d}  {'/'.join(map(str, shares)):18}  " + "  ".join(f"{cell:14.3f}" for cell in cells))


def sweeps(draws: int, rng: np.random.Generator) -> None:
    print("sweeps of 24 equal cells, 80 items, in which some cell is called different from 1 at level .05")
    for design in DESIGNS:
        values = [[p_value(draw(rng, SHARES[2], design, 80)) for _ in range(24)] for _ in range(draws)]
        plain, corrected = (np.mean([min(rule(row)) < 0.05 for row in values]) for rule in (list, holm))
        print(f"{design!s:>16}  without correction {plain:.3f}  with Holm's {corrected:.3f}")


def differences(draws: int, rng: np.random.Generator) -> None:
    print("two equal models: coverage of the interval of their difference, and how often they are told apart")
    for items in (20, 80):
        for shares in SHARES:
            cells = []
            for seeds, *effects in DESIGNS:
                both = [draw(rng, shares, (2 * seeds, *effects), items) for _ in range(draws)]
                found = [difference(outcomes[:seeds], outcomes[seeds:]) for outcomes in both]
                covered = np.mean([each.low <= 0 <= each.high for each in found])
                cells.append(f"{covered:.3f} {np.mean([each.p_value < 0.05 for each in found]):.3f}")
            print(f"{items:5d}  {'/'.join(map(str, shares)):18}  " + "  ".join(f"{cell:>14}" for cell in cells))


def main() -> None:
    """Print three tables: coverage for PWS, false positives in sweeps, and differences of equal models."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--draws", type=int, default=1000, help="simulated cells, sweeps or pairs per figure")
    draws = parser.parse_args().draws
    for table in (coverage, sweeps, differences):
        table(draws, np.random.default_rng(0))


if __name__ == "__main__":
    main()
