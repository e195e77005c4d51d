"""Compare the rankings of runs with the ranking of the first run, and with the labels if the data has labels.

    python -m experiments.agreement RUN RUN [RUN ...]

RUN is the folder of a run that has computed its scores. Prints Markdown with a line for each run, named by the options
in which the runs differ. The columns are Spearman's rank correlation with the first run, over the rows that both runs
scored, and the share of the run's top tenth that is also in the first run's top tenth. If the data has labels, as in
the embedded world, two more columns are the AUROC of spoilt against other rows (1: every spoilt row ranks below every
other row) and the spoilt share of the top tenth.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from scipy.stats import spearmanr

from gradsift.data.load import LABELS_FILE
from gradsift.data.verifiable import SPOILT
from gradsift.selection.audit import auroc

TOP = 0.1


def artifact_of(run: Path, stage: str) -> Path:
    stages = json.loads((run / "run.json").read_text(encoding="utf-8"))["stages"]
    artifacts = [Path(entry["artifact"]) for entry in stages if entry["name"] == stage]
    if not artifacts:
        raise SystemExit(f"{run} has no stage {stage}; give a run that has reached this stage")
    return artifacts[-1]


def scores_of(run: Path) -> np.ndarray:
    """Return the scores of a run, (N,) float64; NaN for a row without a score."""
    table = pq.read_table(artifact_of(run, "score") / "scores.parquet")
    scored = np.array(table["status"].to_pylist()) == "scored"
    return np.where(scored, table["score"].to_numpy(), np.nan)


def spoilt_of(run: Path) -> np.ndarray | None:
    """Return which rows are spoilt, (N,) bool, or None if the data has no labels."""
    file = artifact_of(run, "load") / LABELS_FILE
    return np.isin(pq.read_table(file)["quality"].to_pylist(), list(SPOILT)) if file.is_file() else None


def top(scores: np.ndarray) -> np.ndarray:
    """Return the positions of the top tenth; rows with equal scores keep their order, as in a selection."""
    ranked = np.argsort(np.where(np.isnan(scores), np.inf, -scores), kind="stable")
    return ranked[: max(1, int(TOP * len(scores)))]


def row_of(name: str, scores: np.ndarray, first: np.ndarray, spoilt: np.ndarray | None) -> str:
    both = ~np.isnan(scores) & ~np.isnan(first)
    shared = len(np.intersect1d(top(scores), top(first))) / len(top(first))
    cells = [name, f"{spearmanr(scores[both], first[both]).statistic:.3f}", f"{shared:.2f}"]
    if spoilt is not None:
        known = ~np.isnan(scores)
        area = auroc(scores[known & ~spoilt], scores[known & spoilt])  # None if one of the two kinds of rows is absent
        cells += ["-" if area is None else f"{area:.2f}", f"{spoilt[top(scores)].mean():.2f}"]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    runs = parser.parse_args().runs
    overrides = [set(json.loads((run / "run.json").read_text(encoding="utf-8"))["overrides"]) for run in runs]
    shared = set.intersection(*overrides)
    spoilt = spoilt_of(runs[0])
    if len({artifact_of(run, "load") for run in runs}) > 1:
        raise SystemExit("the runs have different data; give runs with the same data options")
    head = ["run", "Spearman with the first", "top tenth shared"] + (["AUROC", "spoilt"] if spoilt is not None else [])
    print("| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    first = scores_of(runs[0])
    for run, options in zip(runs, overrides, strict=True):
        name = " ".join(sorted(options - shared)) or run.name
        print(row_of(name, scores_of(run), first, spoilt_of(run)))


if __name__ == "__main__":
    main()
