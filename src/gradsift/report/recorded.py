"""Whether a sweep of `experiment=world` gives the table that was recorded for it.

The recorded table stands in `conf/experiment/world.recorded.json`, beside the experiment and in the installed
package: the figures of every scorer for each data seed, a hash of the settings, and the machine. It is compared with
a sweep of exactly those settings, whatever the sweep was called. Two means agree where they differ by no more than
two standard errors of their difference, which are estimated from the spread over the seeds on both sides.

To print the record of a finished sweep, for `world.recorded.json`:

    python -m gradsift.report.recorded multirun/DATE/TIME "PROCESSOR, THREADS threads"
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from gradsift.manifests import content_hash
from gradsift.report.tables import Run, flat_rows, untuned_rows
from gradsift.tracking import CONFIG_FILE
from gradsift.user_conf import conf_folder

RECORDED_FILE = Path("experiment") / "world.recorded.json"
_NAMES = {
    "pws": "PWS",
    "accuracy": "accuracy",
    "heldout_loss": "held-out loss",
    "spoilt_share": "spoilt share",
    "families": "families",
}
_DIGITS = 6  # of a recorded figure
_NO_RESULT_DEPENDS_ON = ("artifacts", "report", "tracker")  # nor on compute, but for its precision
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
Figures = Mapping[str, Mapping[str, Sequence[float | None]]]  # scorer -> measure -> a value for each data seed


def compared(files: Sequence[Path], runs: Sequence[Run]) -> list[str]:
    """Lines on how the sweep agrees with the recorded table; none where its settings are not the recorded ones.

    Args:
        files: the `run.json` of each job; its config stands beside it.
        runs: their contents.
    """
    recorded = json.loads((conf_folder() / RECORDED_FILE).read_text(encoding="utf-8"))
    # the hash reads every job's config, so a sweep of other jobs is told by cheaper means
    if _jobs(runs) != recorded["jobs"] or _settings(files) != recorded["settings"]:
        return []
    differences = list(_differences(_figures(runs), recorded["figures"]))
    if differences:
        return [f"differs from the recorded table ({recorded['machine']}): {line}" for line in differences]
    return [
        f"agrees with the recorded table ({recorded['machine']}): every figure of every scorer lies within the spread "
        "over the seeds (two standard errors)"
    ]


def _jobs(runs: Sequence[Run]) -> list[str]:
    return sorted(f"{run.get('scorer')} {run.get('alpha')} {run.get('data_seed')}" for run in runs)


def _settings(files: Sequence[Path]) -> str:
    """A hash of the configs of all jobs, of what results depend on."""
    return content_hash({"jobs": sorted(map(_settings_of_job, files))})[:16]


def _settings_of_job(file: Path) -> str:
    path = file.parent / CONFIG_FILE
    if not path.is_file():
        return "a job without a config"
    values = yaml.load(path.read_text(encoding="utf-8"), Loader=_LOADER)["values"]  # noqa: S506 - a safe loader
    kept = {name: value for name, value in values.items() if name not in _NO_RESULT_DEPENDS_ON}
    return content_hash(kept | {"compute": values["compute"]["precision"]})


def _figures(runs: Sequence[Run]) -> Figures:
    """A value for each data seed; None where a run has no such figure."""
    figures: dict[str, dict[str, list[float | None]]] = {}
    rows = [row for run in runs for row in flat_rows(run)] + untuned_rows(runs)
    for row in sorted(rows, key=lambda row: row["data_seed"]):
        for name in _NAMES:
            figures.setdefault(row["scorer"], {}).setdefault(name, []).append(row[name])
    return figures


def _differences(here: Figures, recorded: Figures) -> Iterator[str]:
    for scorer, measures in recorded.items():
        for name, expected in measures.items():
            values = here.get(scorer, {}).get(name, [])
            if (difference := _difference(values, expected)) is not None:
                yield f"{scorer}, {_NAMES[name]}: {difference}"


def _difference(values: Sequence[float | None], expected: Sequence[float | None]) -> str | None:
    """How the values of one cell differ from the recorded ones; None where they agree."""
    known, recorded = ([value for value in each if value is not None] for each in (values, expected))
    if not recorded:
        return None  # as the PWS of the full data, which is 1 by definition
    mean = statistics.fmean(recorded)
    if len(known) != len(recorded):
        return f"{len(recorded) - len(known)} of {len(recorded)} values are missing here, recorded {mean:.3f}"
    error = math.sqrt(sum(statistics.variance(each) / len(each) for each in (known, recorded)))
    allowed = 2 * error + 10**-_DIGITS  # recorded values are rounded
    if abs(statistics.fmean(known) - mean) <= allowed:
        return None
    return f"{statistics.fmean(known):.3f} here, {mean:.3f} recorded, two standard errors are {2 * error:.3f}"


def record(folder: Path, machine: str) -> dict[str, Any]:
    """What `world.recorded.json` holds for the finished sweep in `folder`."""
    files = sorted(folder.glob("*/run.json"))
    runs = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    figures = {
        scorer: {name: [None if v is None else round(v, _DIGITS) for v in values] for name, values in measures.items()}
        for scorer, measures in _figures(runs).items()
    }
    return {"machine": machine, "settings": _settings(files), "jobs": _jobs(runs), "figures": figures}


if __name__ == "__main__":
    print(json.dumps(record(Path(sys.argv[1]), sys.argv[2]), indent=1))
