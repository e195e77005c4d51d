"""Check whether a sweep of `experiment=world` reproduces the results that are recorded in this repository.

`conf/experiment/world.recorded.json` has the figures (PWS, accuracy and others) of every scorer for each data seed, a
hash of the settings, and a description of the machine. When a sweep with exactly these settings ends, its figures are
compared with the recorded ones. A figure agrees if a t test finds no difference between its mean over the data seeds
and the recorded mean. The tests use Bonferroni's correction for the number of figures.

To print the content of `world.recorded.json` for a finished sweep:

    python -m gradsift.report.recorded multirun/DATE/TIME "PROCESSOR, THREADS threads"
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gradsift.composition import conf_folder
from gradsift.manifests import content_hash
from gradsift.report.run_tables import Run, all_rows
from gradsift.run_folder import RUN_FILE, config_values

RECORDED_FILE = Path("experiment") / "world.recorded.json"
_NAMES = {
    "pws": "PWS",
    "accuracy": "accuracy",
    "heldout_loss": "held-out loss",
    "spoilt_share": "spoilt share",
    "families": "families",
}
_LEVEL = 0.05  # significance level of all t tests together
_DIGITS = 6  # decimals of a recorded figure
# options on which no result depends; of `compute`, results depend on `precision` alone
_IRRELEVANT = ("export", "artifacts", "report", "tracker")
Figures = Mapping[str, Mapping[str, Sequence[float | None]]]  # scorer -> measure -> a value for each data seed


def compared(files: Sequence[Path], runs: Sequence[Run]) -> list[str]:
    """Return lines on whether the results agree with the recorded results; no lines if jobs or settings differ.

    Args:
        files: the paths of the jobs' `run.json` files, which have the jobs' `config.yaml` files beside them.
        runs: the contents of `files`.
    """
    recorded = json.loads((conf_folder() / RECORDED_FILE).read_text(encoding="utf-8"))
    # the jobs first, because the hash of the settings takes time: it reads the config of every job
    if _jobs(runs) != recorded["jobs"] or _settings(files) != recorded["settings"]:
        return []
    here = _figures(runs)
    count = sum(len(measures) for measures in recorded["figures"].values())
    differences = []
    for scorer, measures in recorded["figures"].items():
        for name, expected in measures.items():
            if difference := _difference(here.get(scorer, {}).get(name, []), expected, count):
                differences.append(f"{scorer}, {_NAMES[name]}: {difference}")
    if differences:
        return [f"differs from the recorded table ({recorded['machine']}): {line}" for line in differences]
    return [
        f"agrees with the recorded table ({recorded['machine']}): no figure differs by more than the seeds explain (t "
        f"tests, level {_LEVEL:g} for all {count} together)"
    ]


def _jobs(runs: Sequence[Run]) -> list[str]:
    return sorted(f"{run.get('scorer')} {run.get('alpha')} {run.get('data_seed')}" for run in runs)


def _settings(files: Sequence[Path]) -> str:
    """Return a hash of the options that affect the jobs' results; if a config is lost, a text that equals no hash."""
    hashes = []
    for file in files:
        if not (values := config_values(file.parent)):
            return "a job without a config"
        relevant = {name: value for name, value in values.items() if name not in _IRRELEVANT}
        hashes.append(content_hash(relevant | {"compute": values["compute"]["precision"]}))
    return content_hash({"jobs": sorted(hashes)})[:16]


def _figures(runs: Sequence[Run]) -> Figures:
    """Return each scorer's values of each measure, in the order of the data seeds; None where a run lacks the value."""
    figures: dict[str, dict[str, list[float | None]]] = {}
    for row in sorted(all_rows(runs), key=lambda row: row["data_seed"]):
        for name in _NAMES:
            figures.setdefault(row["scorer"], {}).setdefault(name, []).append(row[name])
    return figures


def _difference(values: Sequence[float | None], expected: Sequence[float | None], cells: int) -> str | None:
    """Compare the values of one measure of one scorer with the recorded values, by a t test.

    Returns the difference as text, or None if the test finds no difference. Missing values count as a difference.
    `cells` is the number of all such tests, for Bonferroni's correction.
    """
    from scipy import stats

    known, recorded = ([value for value in each if value is not None] for each in (values, expected))
    if not recorded:
        return None  # for example the PWS of the full data, which is 1 by definition and not recorded
    mean = statistics.fmean(recorded)
    if len(known) != len(recorded):
        return f"{len(recorded) - len(known)} of {len(recorded)} values are missing here, recorded {mean:.3f}"
    error = math.sqrt(sum(statistics.variance(each) / len(each) for each in (known, recorded)))
    allowed = error * float(stats.t.ppf(1 - _LEVEL / (2 * cells), len(known) + len(recorded) - 2))
    if abs(statistics.fmean(known) - mean) <= allowed + 10**-_DIGITS:  # recorded values are rounded
        return None
    return f"{statistics.fmean(known):.3f} here, {mean:.3f} recorded; the seeds explain {allowed:.3f}"


def record(folder: Path, machine: str) -> dict[str, Any]:
    """Return the content of `world.recorded.json` for the finished sweep in `folder`."""
    files = sorted(folder.glob(f"*/{RUN_FILE}"))
    runs = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    figures = {
        scorer: {name: [None if v is None else round(v, _DIGITS) for v in values] for name, values in measures.items()}
        for scorer, measures in _figures(runs).items()
    }
    return {"machine": machine, "settings": _settings(files), "jobs": _jobs(runs), "figures": figures}


if __name__ == "__main__":
    print(json.dumps(record(Path(sys.argv[1]), sys.argv[2]), indent=1))
