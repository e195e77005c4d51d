"""Is V_t correlated with the held-out loss? An open question of GRADFILTERING (arXiv 2601.13697), in our reading.

    python -m experiments.heldout_variance [OVERRIDE ...]        the embedded world, ten bootstrap members

A bootstrap member trains on a resample that lacks about 37 % of the rows. The held-out loss of a row is the mean loss,
at the late snapshot, of the members that did not train on the row. V_t and G_t are computed twice: over these members
only, and over all members. Prints Markdown: Spearman's rank correlation of V_t and of G_t with the held-out loss, over
the rows that at least two members did not train on.

Shape letters: M members, N examples.
"""

from __future__ import annotations

import argparse

import numpy as np
from scipy.stats import spearmanr

from experiments.composed import line_of, losses_at, norms_at
from gradsift.proxy.ensemble import resample

DEFAULTS = ("proxy.ensemble=bootstrap", "proxy.members=10", "scorer=gsnr", "stop_after=statistics")


def over_members(values: np.ndarray, which: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and population variance (N,) of values (M, N) over the members in `which` (M, N) bool.

    Both are NaN for a row with fewer than two such members.
    """
    chosen = np.where(which & (which.sum(0) >= 2), values, np.nan)
    known = ~np.isnan(chosen).all(0)
    mean, variance = np.full((2, values.shape[1]), np.nan)
    mean[known], variance[known] = np.nanmean(chosen[:, known], 0), np.nanvar(chosen[:, known], 0)
    return mean, variance


def left_out_rows(seed: int, losses: np.ndarray) -> np.ndarray:
    """Return whether a bootstrap member's resample lacks a row, (M, N) bool.

    Args:
        losses: (M, N), NaN for a row without a response token. Such a row is in no resample and is not marked.
    """
    trained = np.flatnonzero(~np.isnan(losses[0]))  # the resamples are drawn from the rows with a response token
    left_out = np.zeros(losses.shape, dtype=bool)
    for member in range(len(losses)):
        left_out[member, np.delete(trained, resample(seed, member, len(trained)))] = True
    return left_out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="as for run.py")
    line = line_of([*DEFAULTS, *parser.parse_args().overrides])
    if line.config.proxy.ensemble != "bootstrap":
        raise SystemExit("members leave rows out only with proxy.ensemble=bootstrap; omit proxy.ensemble")
    late = line.config.proxy.snapshots[1]
    norms, losses = norms_at(line, late), losses_at(line, late)
    left_out = left_out_rows(line.config.seed, losses)
    heldout, _ = over_members(losses, left_out)
    seen, _ = over_members(losses, ~left_out)
    known = ~np.isnan(heldout)
    print(f"{int(known.sum()):,} of {len(known):,} rows were left out by at least two of {len(losses)} members;")
    print(f"mean loss {heldout[known].mean():.3f} where they were left out, {np.nanmean(seen):.3f} where not\n")
    print("| Spearman with the held-out loss | V_t | G_t |\n|---|---|---|")
    for name, which in (("members that left the row out", left_out), ("all members", np.ones_like(left_out))):
        mean, variance = over_members(norms, which)
        cells = [f"{spearmanr(values[known], heldout[known]).statistic:.3f}" for values in (variance, mean)]
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
