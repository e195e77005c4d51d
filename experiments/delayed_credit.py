"""Which scores rank rows high that can be learnt only after other rows? Open question 4 of GRADFILTERING.

    python -m experiments.delayed_credit [OVERRIDE ...]        the embedded world; a fifth of the tasks are delayed

Compares several scores with a baseline that does not depend on when a row is learnt. The baseline divides a row's
progress in an epoch by the mean absolute progress of all rows in this epoch. Its score is the value of the best epoch:

    score_i = max_e (L_i^{e-1} - L_i^e) / mean_j |L_j^{e-1} - L_j^e|        e = 2 ... E, L the members' mean loss

Delayed rows can be learnt only after the defining rows. Prints Markdown with a row for each score: the AUROC of the
delayed and of the defining clean rows against the other clean rows (above .5: the score prefers the delayed or defining
rows), and the shares of delayed, defining and spoilt rows in the selected tenth.

Shape letters: E epochs, N examples.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import numpy as np

from experiments.composed import CONTRAST, line_of, losses_at, norms_at
from gradsift.data.load import SPOILT, labels_of
from gradsift.data.verifiable import DEFINING, DELAYED
from gradsift.line import Line
from gradsift.proxy.member_tables import read_answer_losses
from gradsift.scoring.contrast import contrast
from gradsift.scoring.gsnr import ratio
from gradsift.selection.audit import CLEAN, auroc
from gradsift.selection.budget import budget

EPOCHS, ALPHA = 4, 0.1
DEFAULTS = ("data.delayed=0.2", "proxy.snapshots=[1,4]", "scorer=gsnr", "stop_after=statistics")


def best_epoch(losses: np.ndarray) -> np.ndarray:
    """Return each row's progress in its best epoch, (N,), from mean losses (E, N)."""
    progress = losses[:-1] - losses[1:]
    best: np.ndarray = (progress / np.nanmean(np.abs(progress), 1, keepdims=True)).max(0)
    return best


def scores_of(line: Line) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the name and the values (N,) of each score."""
    epochs = range(1, EPOCHS + 1)
    norms = np.stack([norms_at(line, epoch) for epoch in epochs])  # (E, M, N)
    means, loss = norms.mean(1), np.stack([losses_at(line, epoch).mean(0) for epoch in epochs])  # (E, N)
    for early, late in ((1, 2), (2, 4)):
        drop = (means[early - 1], means[late - 1], norms[late - 1].var(0))
        yield f"gsnr, snapshots {early}, {late}", ratio(*drop, 1e-8)
        yield f"loss drop, snapshots {early}, {late}", loss[early - 1] - loss[late - 1]
    yield "progress in the best epoch", best_epoch(loss)
    yield f"late loss, snapshot {EPOCHS}", -loss[-1]
    options = {name: value for name, value in vars(CONTRAST).items() if name not in ("_target_", "name")}
    options["saturation"] = 0.0
    answers = read_answer_losses(line.answer_losses, line.rows)
    yield f"contrast, snapshot {EPOCHS}, not saturated", contrast(answers, line.pool, **options).score


def row_of(name: str, scores: np.ndarray, quality: np.ndarray, family: np.ndarray) -> str:
    """Return a line of the Markdown table; all arrays (N,)."""
    ranked = np.where(np.isnan(scores), -np.inf, scores)
    groups = [(quality == CLEAN) & (family == name) for name in (DELAYED, DEFINING)]
    others = (quality == CLEAN) & ~np.isin(family, (DELAYED, DEFINING))
    top = np.argsort(-ranked, kind="stable")[: budget(ALPHA, len(ranked))]
    areas = [auroc(ranked[group], ranked[others]) for group in groups]
    shares = [*(group[top].mean() for group in groups), np.isin(quality, SPOILT)[top].mean()]
    cells = ["-" if area is None else f"{area:.2f}" for area in areas] + [f"{share:.3f}" for share in shares]
    return f"| {name} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="as for run.py")
    line = line_of([*DEFAULTS, *parser.parse_args().overrides])
    labels = labels_of(line.loaded)
    if labels is None or labels.family is None:
        raise SystemExit("only the embedded world has delayed rows; omit data=")
    quality, family = np.array(labels.quality), np.array(labels.family)
    clean = quality == CLEAN
    shares = [(clean & (family == name)).mean() for name in (DELAYED, DEFINING)]
    print(f"{line.rows:,} rows: {shares[0]:.3f} delayed and clean, {shares[1]:.3f} defining and clean\n")
    titles = ["score", "AUROC delayed", "AUROC defining", "share delayed", "share defining", "spoilt"]
    print(f"| {' | '.join(titles)} |\n|{'---|' * len(titles)}")
    for name, scores in scores_of(line):
        print(row_of(name, scores, quality, family))


if __name__ == "__main__":
    main()
