"""Does G-SNR rank in bfloat16 as in float32? The members are trained in float32; norms are computed in both types.

    python -m experiments.precision experiment=smollm2_alpaca scorer=gsnr        the command of the record
    python -m experiments.precision OVERRIDE ... [--draws 4000]

Prints Markdown. For G-SNR and its parts, it has Spearman's rank correlation and the share of the top tenth that both
types have in common, each with the 95 % interval over bootstrap draws of the rows and the share of draws that reach the
bar (.98 and .9). For the norms, it has the relative error of bfloat16, and the part of the error that differs between
members and so contributes to V_t.

Shape letters: M members, N examples.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from scipy.stats import spearmanr

from experiments.agreement import top
from experiments.composed import line_of
from gradsift.artifacts import Artifact
from gradsift.gradients.statistics import by_example, norm_of
from gradsift.line import Line
from gradsift.proxy.collection import collect_rows
from gradsift.training.backbones import backbone, load_backbone
from gradsift.training.device import TokenBudget

DEFAULTS = ("compute.precision=float32", "stop_after=statistics")
BAR = (0.98, 0.9)


def norms_in_float32(line: Line, epoch: int) -> np.ndarray:
    """Return the members' norms after an epoch, (M, N); NaN for a row without a response token."""
    return np.stack([norms_of(line, shards) for shards in line.norms(epoch)])


def norms_in_bfloat16(line: Line, epoch: int) -> np.ndarray:
    """Return the norms (M, N) of the same adapters, computed in bfloat16."""
    proxy = replace(line.config.proxy, shards=1)
    compute = replace(line.runtime.compute, precision="bfloat16")
    runtime = replace(line.runtime, compute=compute)
    model = load_backbone(backbone(runtime, proxy.model), proxy.model, compute)
    budget = TokenBudget.of(model.model, compute.tokens, runtime.display.say)
    inputs = line.proxy_inputs._replace(backbone=model, budget=budget)
    norms = []
    for member, weights in enumerate(line.adapters):
        with TemporaryDirectory() as folder:
            info = collect_rows(runtime, Path(folder), proxy, inputs, (member, epoch, weights[epoch - 1]), 0)
            norms.append(norms_of(line, [Artifact("norms", Path(folder), "", {"info": info})]))
    return np.stack(norms)


def norms_of(line: Line, shards: Sequence[Artifact]) -> np.ndarray:
    """Return a member's norms (N,) over the factors that the run's norm_scope names."""
    table = by_example(shards, ("norm_A", "norm_B"), int(line.loaded.info["rows"]))
    return norm_of(table, line.config.proxy.norm_scope, shards[0].info["size_A"], shards[0].info["size_B"])


def parts_of(early: np.ndarray, late: np.ndarray, eps: float) -> dict[str, np.ndarray]:
    """Return G-SNR (Eq. 5 of arXiv 2601.13697) and its parts, (N,) each, from norms (M, N) at both snapshots."""
    g_s, g_t, v_t = early.mean(0), late.mean(0), late.var(0)
    return {"G-SNR": (g_s - g_t) / (g_s + eps) / (v_t + eps), "V_t": v_t, "G_t": g_t, "drop G_s - G_t": g_s - g_t}


def agreement(first: np.ndarray, second: np.ndarray) -> tuple[float, float]:
    """Return the Spearman correlation of two scores (N,), and the share of a top tenth that both have in common."""
    shared = len(np.intersect1d(top(first), top(second))) / len(top(first))
    return float(spearmanr(first, second).statistic), shared


def row_of(name: str, first: np.ndarray, second: np.ndarray, draws: int) -> str:
    found = agreement(first, second)
    rng = np.random.default_rng(0)
    rows = (rng.integers(len(first), size=len(first)) for _ in range(draws))
    drawn = np.array([agreement(first[chosen], second[chosen]) for chosen in rows])
    cells = [name]
    for value, column, bar, digits in zip(found, drawn.T, BAR, (3, 2), strict=True):
        low, high = np.quantile(column, (0.025, 0.975))
        cells.append(
            f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}], {(column >= bar).mean():.0%} of the draws"
        )
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="+", help="as for run.py")
    parser.add_argument("--draws", type=int, default=4000, help="of the bootstrap")
    options = parser.parse_args()
    line = line_of([*options.overrides, *DEFAULTS])
    epochs = line.config.proxy.snapshots
    exact, rounded = (
        np.stack([norms(line, epoch) for epoch in epochs]) for norms in (norms_in_float32, norms_in_bfloat16)
    )
    known = ~np.isnan(exact).any((0, 1))
    exact, rounded = exact[:, :, known], rounded[:, :, known]
    off = rounded / exact - 1
    print(
        f"{int(known.sum())} rows, {exact.shape[1]} members: a norm is off by {np.median(abs(off)):.2%} at the median "
        f"(90 %: {np.quantile(abs(off), 0.9):.2%}), its part that differs between members by "
        f"{np.median(abs(off - off.mean(1, keepdims=True))):.2%}\n"
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
