"""Compare G2IS's walk with the best set under the walk's agreement constraint (arXiv 2502.11062), in our reading.

    python -m experiments.walk_optimum [--rows 60] [--draws 10] [--share 0.1] [OVERRIDE ...]

From each random sub-pool of the embedded world, a share of the rows is selected for the first component K of the core
knowledge (target_set=verifiable): once by the walk, and once as the set S that solves

    max  sum over S of <g, K>    subject to  <g_i, g_j> >= 0 for all pairs in S

S is found by integer programming, so the sub-pools must be small. The walk has a second constraint: each step must keep
the direction of the sum of gradients. This constraint depends on the order of the steps, which a set does not have, so
the optimum ignores it and is an upper bound. Prints Markdown: the number of rows that the walk selected, the largest
number of rows (up to the share) that all agree, and the mean <g, K> of the walk's rows and of the best set of as many
rows.

Shape letters: n rows of a sub-pool, D features.
"""

from __future__ import annotations

import argparse

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

from experiments.composed import line_of
from gradsift.features.vectors import Features, products, read_features, squared_lengths
from gradsift.selection.core_knowledge import CoreKnowledge, core_knowledge
from gradsift.selection.gradient_walk import Walk

DEFAULTS = ("method=g2is", "stop_after=selection")


def best_set(values: np.ndarray, conflict: np.ndarray, least: int, most: int) -> np.ndarray:
    """Return the positions of the set without conflicts that has the largest sum of `values` (n,).

    Args:
        conflict: (n, n) bool, whether two rows are in conflict.
        least, most: bounds on the number of rows in the set.
    """
    count = len(values)
    pairs = np.argwhere(np.triu(conflict, 1))
    rows = np.repeat(np.arange(len(pairs)), 2)
    edges = coo_array((np.ones(2 * len(pairs)), (rows, pairs.ravel())), shape=(len(pairs), count))
    limits = [LinearConstraint(np.ones((1, count)), least, most)]
    limits += [LinearConstraint(edges.tocsr(), ub=1)] if len(pairs) else []
    solution = milp(-values, integrality=np.ones(count), bounds=Bounds(0, 1), constraints=limits)
    if not solution.success:
        raise SystemExit(f"no optimum was found: {solution.message}")
    return np.flatnonzero(solution.x > 0.5)


def compared(vectors: np.ndarray, core: CoreKnowledge, share: int, keep: float) -> tuple[int, int, float, float]:
    """Compare the walk with the best set on `vectors` (n, D).

    Returns:
        The number of rows that the walk selects, the largest number of rows that all agree (at most `share`), and the
        mean <g, K> of the walk's rows and of the best set of as many rows.
    """
    features, pool = Features(vectors), np.arange(len(vectors))
    towards, unused = products(features, pool, core.directions), np.ones(len(pool), dtype=bool)
    walk = Walk(features, pool, towards, squared_lengths(features, pool), unused)
    taken = walk.component(0, share, keep, None, lambda done: None)
    values = walk.towards[:, 0]
    conflict = np.round(vectors.astype(np.float64) @ vectors.T, 9) < 0
    most = len(best_set(np.ones(len(values)), conflict, 0, share))
    best = best_set(values, conflict, len(taken), len(taken))
    return len(taken), most, float(values[taken].mean()), float(values[best].mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=60, help="rows of a sub-pool (default %(default)s)")
    parser.add_argument("--draws", type=int, default=10, help="number of sub-pools (default %(default)s)")
    parser.add_argument(
        "--share", type=float, default=0.1, help="share of a sub-pool that is selected (default %(default)s)"
    )
    parser.add_argument("overrides", nargs="*", help="as for run.py")
    options = parser.parse_args()
    line = line_of([*DEFAULTS, *options.overrides])
    gradients, selector = read_features(line.gradients), line.config.selector
    core = core_knowledge(read_features(line.target_gradients), selector.explained)
    directed = np.flatnonzero(gradients.has_direction)
    rng = np.random.default_rng(0)
    print("| sub-pool | asked | walk took | could agree | walk's mean | optimum's |\n|---|---|---|---|---|---|")
    means = []
    for draw in range(options.draws):
        rows = np.sort(rng.choice(directed, min(options.rows, len(directed)), replace=False))
        asked = max(1, int(options.share * len(rows)))
        took, most, *mean = compared(np.asarray(gradients.vectors[rows]), core, asked, selector.keep)
        means.append(mean)
        print(f"| {draw} | {asked} | {took} | {most} | {mean[0]:.4f} | {mean[1]:.4f} |")
    walk, best = np.mean(means, axis=0)
    print(f"| all | | | | {walk:.4f} | {best:.4f} |")


if __name__ == "__main__":
    main()
