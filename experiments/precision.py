"""Does G-SNR rank rows in bfloat16 as in float32? Members trained in float32, norms computed in both types.

    python -m experiments.precision experiment=smollm2_alpaca scorer=gsnr        the command of the record
    python -m experiments.precision OVERRIDE ... [--draws 4000]

Prints the relative error of the norms in bfloat16, and the part of the error that differs between members and so
contributes to V_t. Then prints a Markdown table for G-SNR and its parts: Spearman's rank correlation of the two types
and the shared part of their top tenths, each with the 95 % interval over bootstrap draws of the rows and the share of
draws that reach the bar (.98 and .9).

Shape letters: M members, N examples.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from scipy.stats import spearmanr

from experiments.agreement import top
from experiments.composed import line_of, norms_at, norms_of
from gradsift.artifacts import Artifact
from gradsift.line import Line
from gradsift.proxy.collection import collect_rows
from gradsift.scoring.gsnr import ratio
from gradsift.training.backbones import backbone, load_backbone
from gradsift.training.device import TokenBudget

DEFAULTS = ("compute.precision=float32", "stop_after=statistics")
BAR = (0.98, 0.9)


def norms_in_bfloat16(line: Line, epoch: int) -> np.ndarray:
    """Return the members' norms after an epoch, computed in bfloat16, (M, N)."""
    proxy = replace(line.config.proxy, shards=1)
    compute = replace(line.runtime.compute, precision="bfloat16")
    runtime = replace(line.runtime, compute=compute)
    model = load_backbone(backbone(runtime, proxy.model), proxy.model, compute)
    budget = TokenBudget.of(model.model, compute.tokens, runtime.display.say)
    inputs = line.proxy_inputs._replace(backbone=model, budget=budget)
    norms = []
    for member, weights in enumerate(line.adapters):
        with TemporaryDirectory() as folder:
            info = collect_rows(runtime, Path(folder), proxy, inputs, (member, epoch, weights[epoch - 1]), 0, "norms")
            norms.append(norms_of(line, [Artifact("norms", Path(folder), "", {"info": info})]))
    return np.stack(norms)


def parts_of(early: np.ndarray, late: np.ndarray, eps: float) -> dict[str, np.ndarray]:
    """Return G-SNR (Eq. 5 of arXiv 2601.13697) and its parts, (N,) each, from norms (M, N) at both snapshots."""
    g_s, g_t, v_t = early.mean(0), late.mean(0), late.var(0)
    return {"G-SNR": ratio(g_s, g_t, v_t, eps), "V_t": v_t, "G_t": g_t, "drop G_s - G_t": g_s - g_t}


def agreement(first: np.ndarray, second: np.ndarray) -> tuple[float, float]:
    """Return Spearman's rank correlation of two scores (N,), and the shared part of their top tenths."""
    shared = len(np.intersect1d(top(first), top(second))) / len(top(first))
    return float(spearmanr(first, second).statistic), shared


def row_of(name: str, first: np.ndarray, second: np.ndarray, draws: int) -> str:
    values = agreement(first, second)
    rng = np.random.default_rng(0)
    rows = (rng.integers(len(first), size=len(first)) for _ in range(draws))
    drawn = np.array([agreement(first[chosen], second[chosen]) for chosen in rows])
    cells = [name]
    for value, column, bar, digits in zip(values, drawn.T, BAR, (3, 2), strict=True):
        low, high = np.quantile(column, (0.025, 0.975))
        cells.append(
            f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}], {(column >= bar).mean():.0%} of the draws"
        )
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="+", help="as for run.py")
    parser.add_argument("--draws", type=int, default=4000, help="number of bootstrap draws (default 4000)")
    options = parser.parse_args()
    line = line_of([*options.overrides, *DEFAULTS])
    epochs = line.config.proxy.snapshots
    exact, rounded = (np.stack([norms(line, epoch) for epoch in epochs]) for norms in (norms_at, norms_in_bfloat16))
    known = ~np.isnan(exact).any((0, 1))
    exact, rounded = exact[:, :, known], rounded[:, :, known]
    off = rounded / exact - 1
    print(
        f"{int(known.sum())} rows, {exact.shape[1]} members: the relative error of a norm is {np.median(abs(off)):.2%} "
        f"at the median and {np.quantile(abs(off), 0.9):.2%} at the 90 % quantile; its part that differs between "
        f"members is {np.median(abs(off - off.mean(1, keepdims=True))):.2%} at the median\n"
    )
    print(
        f"| | Spearman, share of draws from {BAR[0]} | top tenth shared, share of draws from {BAR[1]} |\n|---|---|---|"
    )
    eps = float(getattr(line.config.scorer, "eps", 1e-8))
    both = (parts_of(*norms, eps) for norms in (exact, rounded))
    for (name, first), second in zip(next(both).items(), next(both).values(), strict=True):
        print(row_of(name, first, second, options.draws))


if __name__ == "__main__":
    main()
