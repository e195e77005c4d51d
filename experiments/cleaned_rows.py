"""Measure how runs on a pool of `experiments.real_pool` rank the rows that human cleaners edited or removed.

    python -m experiments.cleaned_rows RUN [RUN ...]          folders of runs that have computed their scores

Prints Markdown with a row for each run. A cleaned row is a row that the cleaners edited or removed, in its state before
cleaning, unless it was corrupted on purpose too. The columns are

- AUROC of the cleaned rows against all other uncorrupted rows (1: every other row ranks above every cleaned row);
- the recall: the share of the cleaned rows that are in the lower half of the ranking, with the 95 % interval of Clopper
  and Pearson;
- the share of cleaned rows in the best tenth;
- the median number of words of the best tenth's answers;
- Spearman's correlation of the score with the number of words.

Rows without a score rank last.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from scipy.stats import binomtest, spearmanr

from experiments.agreement import artifact_of, scores_of
from gradsift.data.examples import read_examples
from gradsift.data.load import EXAMPLES_FILE, LABELS_FILE
from gradsift.selection.audit import CLEAN, auroc

TOP = 0.1


def row_of(name: str, scores: np.ndarray, cleaned: np.ndarray, others: np.ndarray, words: np.ndarray) -> str:
    """Return a line of the table.

    Args:
        scores: (N,), NaN for a row without a score.
        cleaned, others: (N,) bool, the cleaned rows and the rows that they are compared with.
        words: (N,) number of words of each answer.
    """
    known = ~np.isnan(scores)
    ranked = np.where(known, scores, -np.inf)
    order = np.argsort(-ranked, kind="stable")
    rejected, best = order[len(order) // 2 :], order[: max(1, int(TOP * len(order)))]
    count, total = int(cleaned[rejected].sum()), int(cleaned.sum())
    interval = binomtest(count, total).proportion_ci(method="exact")
    cells = [name, f"{auroc(ranked[others], ranked[cleaned]):.3f}"]
    cells += [f"{count / total:.2f} [{interval.low:.2f}, {interval.high:.2f}]", f"{cleaned[best].mean():.3f}"]
    cells += [f"{np.median(words[best]):g}", f"{spearmanr(scores[known], words[known]).statistic:.2f}"]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    runs = parser.parse_args().runs
    loaded = artifact_of(runs[0], "load")
    if any(artifact_of(run, "load") != loaded for run in runs):
        raise SystemExit("the runs have different data; give runs with the same data options")
    examples = read_examples(loaded / EXAMPLES_FILE)
    has_label = np.array([bool(example.original.get("cleaning")) for example in examples])
    clean = np.ones(len(examples), dtype=bool)
    if (labels := loaded / LABELS_FILE).is_file():
        clean = np.array(pq.read_table(labels)["quality"].to_pylist()) == CLEAN
    if not (has_label & clean).any():
        raise SystemExit(
            f"no row of {runs[0]} has a label in the column `cleaning`; make the data with experiments.real_pool"
        )
    words = np.array([len(example.output.split()) for example in examples])
    print(f"{len(examples):,} rows, {(has_label & clean).sum()} cleaned, median words {np.median(words):g}\n")
    titles = [
        "scorer",
        "AUROC",
        "recall in the rejected half",
        "share of the best tenth",
        "words",
        "Spearman with words",
    ]
    print(f"| {' | '.join(titles)} |\n|{'---|' * len(titles)}")
    for run in runs:
        scorer = json.loads((run / "run.json").read_text(encoding="utf-8"))["scorer"]
        print(row_of(scorer, scores_of(run), has_label & clean, ~has_label & clean, words))


if __name__ == "__main__":
    main()
