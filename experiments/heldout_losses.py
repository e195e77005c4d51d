"""Compare the finetuned targets of several runs by their losses on held-out rows, with paired intervals.

    python -m experiments.heldout_losses RUN RUN ... [--rows FILE.json] [--limit 200]

RUN is the folder of a run that has finetuned its target and whose store exists. Without --rows, the held-out rows are
those that the runs' `data.holdout` set aside. FILE is a JSON list of rows with `instruction`, `input` and `output`;
rows whose prompt is in a run's data or in an earlier row are dropped.

Prints Markdown: for each run the mean loss in nats per response token (the mean over rows of the mean over tokens), the
difference from the first run, and the 95 % confidence interval of the mean difference (t distribution over the rows'
differences). The interval covers the variation over rows alone, not the variation over seeds of the finetuning or draws
of the training rows.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from scipy import stats

from experiments.composed import line_of
from gradsift.artifacts import Artifact
from gradsift.data.examples import Example, make_example
from gradsift.data.load import heldout_of
from gradsift.evaluation.stages.losses import example_losses
from gradsift.line import Line
from gradsift.scoring.stage import score
from gradsift.training.target import load_tuned


def prompt_of(example: Example) -> tuple[str, str]:
    return example.instruction.strip(), example.input.strip()


def unseen_rows(rows: Iterable[dict[str, str]], seen: Iterable[Example], limit: int) -> list[Example]:
    """Return the first `limit` rows, as examples, whose prompt is neither in `seen` nor in an earlier row."""
    known = {prompt_of(example) for example in seen}
    examples: list[Example] = []
    for number, row in enumerate(rows):
        example = make_example(number, (), row["instruction"], row.get("input", ""), row["output"], {}, Counter())
        if prompt_of(example) not in known and len(examples) < limit:
            known.add(prompt_of(example))
            examples.append(example)
    return examples


def require_known(run: Path, artifact: Artifact) -> None:
    """Exit unless the run has made or reused the artifact, that is, unless defaults and data are still the same."""
    stages = json.loads((run / "run.json").read_text())["stages"]
    if artifact.fingerprint not in {stage["fingerprint"] for stage in stages}:
        raise SystemExit(
            f"{run} has not made {artifact.path.name}: the defaults or the data have changed since; check out the "
            "run's commit"
        )


def losses_of(run: Path, line: Line, examples: Sequence[Example]) -> np.ndarray:
    """Return each example's mean loss under the run's finetuned target, (N,); NaN without a response token."""
    scored = score(line.runtime, line.scorer, line.loaded, line.sources, line.diagnose)
    require_known(run, scored)
    tuned = line.finetune(line.select(scored))
    require_known(run, tuned)
    model = load_tuned(line.runtime, line.config.target, line.target, tuned)
    losses = np.full(len(examples), np.nan)
    with tempfile.TemporaryDirectory() as folder:
        passes = example_losses(
            line.runtime, line.config.target, model, examples, Path(folder), "held-out losses", "held-out rows"
        )
    for rows, values in passes:
        losses[rows.numpy()] = values.numpy()
    return losses


def row_of(name: str, losses: np.ndarray, first: np.ndarray) -> str:
    """Return a line of the table; both (N,), without NaN."""
    difference = losses - first
    cell = "-"
    if difference.any() and len(difference) > 1:
        low, high = stats.t.interval(0.95, len(difference) - 1, difference.mean(), stats.sem(difference))
        cell = f"{difference.mean():+.3f} [{low:+.3f}, {high:+.3f}]"
    return f"| {name} | {losses.mean():.3f} | {cell} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("--rows", type=Path, metavar="FILE.json")
    parser.add_argument("--limit", type=int, default=200, help="largest number of rows from FILE (default 200)")
    options = parser.parse_args()
    lines = {run: line_of(json.loads((run / "run.json").read_text())["overrides"]) for run in options.runs}
    first = next(iter(lines.values()))
    examples = heldout_of(first.loaded)
    if options.rows is not None:
        seen = [example for line in lines.values() for example in (*line.pool, *heldout_of(line.loaded))]
        examples = unseen_rows(json.loads(options.rows.read_text()), seen, options.limit)
    elif any(line.loaded.path != first.loaded.path for line in lines.values()):
        raise SystemExit("the runs have different data and so different held-out rows; give --rows FILE.json")
    if not examples:
        raise SystemExit("there are no held-out rows; give runs with data.holdout, or --rows FILE.json")
    losses = {run: losses_of(run, line, examples) for run, line in lines.items()}
    known = ~np.isnan(np.stack(list(losses.values()))).any(0)
    print(f"{known.sum()} rows\n\n| run | loss | difference from the first |\n|---|---|---|")
    for run, values in losses.items():
        print(row_of(run.name, values[known], losses[options.runs[0]][known]))


if __name__ == "__main__":
    main()
