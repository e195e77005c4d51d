"""Store the norms and losses of an ensemble in one small file, from which scores can be computed again in seconds.

    python -m experiments.norm_tables write FILE.npz OVERRIDE ...     from the store; missing artifacts are made
    python -m experiments.norm_tables read FILE.npz                   scores of the first 2, 3 ... members

The file contains the gradient norms at both snapshots, the losses of the answers at the late snapshot (bodies, ends,
and bodies after other prompts), each member's contrasts without the gain term (`scoring/contrast.py`, with the default
options), the lengths of the answers and the labels, but no text of the data.

`read` prints Markdown with a row for each score, and for each of several eps for G-SNR: the spoilt share of the
selection and the AUROC of clean rows against spoilt rows and against each kind of spoilt rows.

Shape letters: M members, N examples.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from experiments.composed import CONTRAST, line_of, norms_at
from gradsift.data.load import SPOILT, labels_of
from gradsift.line import Line
from gradsift.proxy.member_tables import read_answer_losses
from gradsift.scoring.contrast import gain_term, member_contrasts, saturated
from gradsift.scoring.gsnr import ratio
from gradsift.selection.audit import CLEAN, auroc
from gradsift.selection.budget import budget

ALPHAS = (0.05, 0.1, 0.15)
EPS = (1e-8, 1e-6, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)


def table_of(line: Line) -> dict[str, np.ndarray]:
    """Return the arrays of the file: (M, N) float32 each, and the quality of each example, (N,) strings."""
    labels = labels_of(line.loaded)
    if labels is None:
        raise SystemExit("the data has no labels; corrupt rows with data.corruption.share")
    early, late = (norms_at(line, epoch) for epoch in line.config.proxy.snapshots)
    losses = read_answer_losses(line.answer_losses, line.rows)
    contrasts = member_contrasts(losses, line.pool, CONTRAST.neighbours, CONTRAST.end_share)
    values = {"early": early, "late": late, **vars(losses), "contrast": contrasts}
    columns = {name: value.astype(np.float32) for name, value in values.items()}
    lengths = np.array([len(example.output) for example in line.pool], dtype=np.int32)
    return {**columns, "length": lengths, "quality": np.array(labels.quality)}


def scores_of(table: dict[str, np.ndarray], members: int) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the name and the values (N,) of each score, computed from the first `members` members."""
    early, late, contrasts = (table[name][:members].astype(np.float64) for name in ("early", "late", "contrast"))
    # the gains depend on the chosen members, so they are not stored; files of earlier versions lack their losses
    if "other" in table:
        body, other = (table[name][:members].astype(np.float64) for name in ("body", "other"))
        contrasts += CONTRAST.prompt_weight * gain_term(body, other, table["length"], CONTRAST.like_length)
    G_s, G_t, V_t = early.mean(0), late.mean(0), late.var(0)
    for eps in EPS:
        yield f"gsnr, eps {eps:g}", ratio(G_s, G_t, V_t, eps)
    yield "gsnr_raw_drop", G_s - G_t
    yield "gsnr_normalized_drop", (G_s - G_t) / G_s
    yield "late norm, lowest first", -G_t
    yield "V_t, lowest first", -V_t
    yield "V_t / G_t^2, lowest first", -V_t / G_t**2
    for caution in (0, 1, 2):
        yield f"contrast, caution {caution}, not saturated", contrasts.mean(0) - caution * contrasts.std(0)
    bound = contrasts.mean(0) - contrasts.std(0)
    yield "contrast", saturated(bound, 0.2, seed=0)


def row_of(name: str, members: int, scores: np.ndarray, quality: np.ndarray) -> str:
    """Return a line of the Markdown table."""
    spoilt = np.isin(quality, SPOILT)
    ranked = np.where(np.isnan(scores), -np.inf, scores)
    order = np.argsort(-ranked, kind="stable")
    shares = [f"{spoilt[order[: budget(alpha, len(quality))]].mean():.3f}" for alpha in ALPHAS]
    areas = [auroc(ranked[quality == CLEAN], ranked[group]) for group in (spoilt, *groups_of(quality).values())]
    cells = [name, str(members), " / ".join(shares), *("-" if area is None else f"{area:.3f}" for area in areas)]
    return f"| {' | '.join(cells)} |"


def groups_of(quality: np.ndarray) -> dict[str, np.ndarray]:
    """Return a mask (N,) bool for each kind of spoilt rows that occurs."""
    return {kind: quality == kind for kind in SPOILT if (quality == kind).any()}


def read(file: Path) -> None:
    with np.load(file, allow_pickle=False) as stored:
        table = dict(stored)
    count = len(table["early"])
    spoilt = np.isin(table["quality"], SPOILT).mean()
    print(f"{len(table['quality']):,} rows, spoilt share {spoilt:.3f}, {count} members\n")
    alphas = " / ".join(f"{alpha:.0%}" for alpha in ALPHAS)
    titles = ["score", "members", f"spoilt at {alphas}", "AUROC", *groups_of(table["quality"])]
    print(f"| {' | '.join(titles)} |\n|{'---|' * len(titles)}")
    for members in range(2, count + 1):
        for name, scores in scores_of(table, members):
            print(row_of(name, members, scores, table["quality"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("write", "read"))
    parser.add_argument("file", type=Path)
    parser.add_argument("overrides", nargs="*", help="as for run.py; for write")
    options = parser.parse_args()
    if options.action == "write":
        np.savez_compressed(options.file, **table_of(line_of(options.overrides)))
        print(f"{options.file}: {options.file.stat().st_size:,} bytes", file=sys.stderr)
    else:
        read(options.file)


if __name__ == "__main__":
    main()
