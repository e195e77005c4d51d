"""Checks of a sweep: every job is composed and validated before the first one starts.

Hydra's launchers may run jobs in other processes, on other machines and hours later. So an invalid value in any job is
reported before anything is written.
"""

from __future__ import annotations

import importlib.util
import itertools
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from hydra import compose
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from gradsift.config import Config, load_config
from gradsift.errors import ConfigError, GradsiftError

HOME = "GRADSIFT_HOME"  # environment variable of a job: the folder in which its sweep was started
GPUS = "GRADSIFT_GPUS"  # environment variable of a job: the GPUs of its sweep (see `take_gpus`)
MOST_JOBS = 10_000  # in one sweep
_ONE_MACHINE = ("JoblibLauncher", "LocalLauncher")  # launchers that run jobs side by side on this machine
_GRID = "hydra._internal.core_plugins.basic_sweeper.BasicSweeper"
_EXTRAS = {  # plugin of Hydra: the optional extra that installs it
    "hydra_joblib_launcher": "launchers",
    "hydra_submitit_launcher": "launchers",
    "hydra_optuna_sweeper": "search",
    "hydra_ray_launcher": "ray",
}
Job = tuple[str, ...]  # the overrides of one job


@dataclass(frozen=True)
class Sweep:
    """A sweep that has been checked."""

    folder: Path
    jobs: tuple[Job, ...] | None  # in the order in which they run; None for a search, which proposes them later


def begin(composed: DictConfig, describe: Callable[[Exception], str]) -> Sweep:
    """Check the sweep that Hydra is about to start, and return its folder and jobs.

    Args:
        composed: the sweep's config, with Hydra's own node.
        describe: returns an error of Hydra or OmegaConf as one line.

    Raises:
        ConfigError: some jobs cannot run; the message has a line for each different error, which names the first job
            with this error. Or a plugin is missing, or there are too many jobs.
        HydraException: the overrides cannot be parsed.
    """
    _require_plugins(composed)
    searches = composed.hydra.sweeper._target_ != _GRID
    if searches and _is_installed("optuna"):
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)  # otherwise it prints a line for every trial
    jobs = jobs_of(composed, searches)
    lines = []
    for error, wrong in _errors(composed, jobs, searches, describe).items():
        which = "a trial" if searches else f"job {jobs.index(wrong[0]) + 1} of {len(jobs)}"
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 and not searches else ""
        lines.append(f"{which} ({' '.join(wrong[0])}){more}: {error}")
    if lines:
        raise ConfigError("\n".join(lines))
    return Sweep(Path(composed.hydra.sweep.dir), None if searches else tuple(jobs))


def fix_place(composed: DictConfig) -> None:
    """Make every job write below the folder where the sweep was started.

    A launcher's worker may start in another folder. It composes its job again from the overrides and sets the job's
    environment variables. So the absolute folder of the sweep is added to the overrides, and `HOME` to the environment
    variables. For a launcher that runs several jobs at a time on this machine, `GPUS` is added too.
    """
    folder = Path(composed.hydra.sweep.dir).absolute()
    composed.hydra.sweep.dir = str(folder)
    composed.hydra.overrides.hydra += [
        f"hydra.sweep.dir={_quoted(folder)}",
        f"+hydra.job.env_set.{HOME}={_quoted(Path.cwd())}",
    ]
    if str(composed.hydra.launcher._target_).endswith(_ONE_MACHINE) and (gpus := _visible_gpus()):
        composed.hydra.overrides.hydra.append(f"+hydra.job.env_set.{GPUS}='{gpus}'")


def _visible_gpus() -> str:
    """Return the GPUs that this process may use, in the form of CUDA_VISIBLE_DEVICES; empty if there is none."""
    import torch

    numbers = ",".join(map(str, range(torch.cuda.device_count())))
    return os.environ.get("CUDA_VISIBLE_DEVICES", numbers) if numbers else ""


def take_gpus(number: int | None, devices: int) -> None:
    """Set CUDA_VISIBLE_DEVICES to `devices` of the sweep's GPUs for job `number`, counted from 1.

    Without `GPUS` (see `fix_place`), nothing is set. If there are too few GPUs, jobs share them. A worker that has
    already used a GPU keeps its GPUs, because CUDA reads the variable once per process.
    """
    if number is None or not (listed := os.environ.get(GPUS)):
        return
    import torch

    if not torch.cuda.is_initialized():
        gpus, first = listed.split(","), (number - 1) * devices
        own = [gpus[(first + place) % len(gpus)] for place in range(min(devices, len(gpus)))]
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(own)


def _quoted(path: Path) -> str:
    """Return a path in quotes for Hydra, which reads a backslash as an escape only before a quote."""
    return "'" + re.sub(r"(\\*)('|$)", lambda match: 2 * match[1] + (r"\'" if match[2] else ""), str(path)) + "'"


def _require_plugins(composed: DictConfig) -> None:
    for kind in ("launcher", "sweeper"):
        target = str(composed.hydra[kind]._target_)
        plugin = target.split(".")[1] if target.startswith("hydra_plugins.") else None
        if plugin is not None and not _is_installed(f"hydra_plugins.{plugin}"):
            choice, extra = composed.hydra.runtime.choices[f"hydra/{kind}"], _EXTRAS.get(plugin)
            remedy = f"pip install 'gradsift[{extra}]'" if extra else f"install {plugin.replace('_', '-')}"
            raise ConfigError(f"hydra/{kind}={choice} needs a plugin that is not installed; {remedy}")


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package that contains it is missing
        return False


def jobs_of(composed: DictConfig, searches: bool) -> list[Job]:
    """Return the jobs of a grid, or for a search the jobs to be checked.

    For a search there is one job for each listed value and for each end of an interval; all other options have their
    first value.

    Raises:
        ConfigError: there are more than `MOST_JOBS` jobs; their number is computed without listing them.
    """
    # not resolved: an override may contain `${hydra:job.num}`, which only a job has
    params: Any = OmegaConf.to_container(composed.hydra.sweeper.get("params") or OmegaConf.create({}), resolve=False)
    task: Any = OmegaConf.to_container(composed.hydra.overrides.task, resolve=False)
    lines = [*(f"{key}={value}" for key, value in params.items()), *task]
    parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
    overrides = parser.parse_overrides(lines)
    _require_few(overrides, searches)
    choices = {}
    for override in overrides:  # if several overrides set one option, the last counts; the command line's come last
        key = override.get_key_element()
        choices[key] = [f"{key}={value}" for value in values_of(override)]
    if not searches:
        return list(itertools.product(*choices.values()))
    first = {key: values[0] for key, values in choices.items()}
    tried = [tuple((first | {key: value}).values()) for key, values in choices.items() for value in values]
    return list(dict.fromkeys(tried))


def _require_few(overrides: Sequence[Override], searches: bool) -> None:
    counts = {override.get_key_element(): _count(override) for override in overrides}
    jobs = sum(counts.values()) if searches else math.prod(counts.values())
    if jobs > MOST_JOBS:
        largest = max(counts, key=lambda key: counts[key])
        size = f"search names {_spelt(jobs)} values" if searches else f"sweep has {_spelt(jobs)} jobs"
        remedy = "an interval" if searches else "fewer values, or several sweeps over the same store"
        raise ConfigError(
            f"this {size}, and {largest} has {_spelt(counts[largest])} values; at most {MOST_JOBS:,} are checked "
            f"before the first job, so give {remedy}"
        )


def _spelt(count: int) -> str:
    return f"{count:,}" if count < 10**15 else "more than 10^15"


def _count(override: Override) -> int:
    """Return the number of values that an override names; 2 for an interval, because its two ends are checked."""
    value = override.value()
    if not isinstance(value, RangeSweep):
        return len(list(values_of(override)))
    bounds = value.start or 0, value.stop or 0, value.step
    if not all(-math.inf < bound < math.inf for bound in bounds) or not value.step:
        raise ConfigError(f"{override.input_line} has no end; give finite numbers, and a step other than 0")
    start, stop, step = map(Fraction, bounds)
    return max(0, math.ceil((stop - start) / step))


def values_of(override: Override) -> Iterator[str]:
    """Yield as text the values that an override names, or the two ends of its interval."""
    value: Any = override.value()
    if isinstance(value, IntervalSweep):
        yield from (str(value.start), str(value.end))
    elif override.is_sweep_override():
        yield from override.sweep_string_iterator()
    else:
        yield override.get_value_element_as_str()


def _errors(
    composed: DictConfig, jobs: Sequence[Job], searches: bool, describe: Callable[[Exception], str]
) -> dict[str, list[Job]]:
    """Return the jobs that cannot run, by error message."""
    from gradsift.runtime import Display

    errors: dict[str, list[Job]] = {}
    pushed: dict[str, Job] = {}
    before = HydraConfig.instance().cfg
    with Display().task(f"check {len(jobs):,} jobs", len(jobs)) as advance:
        for job in jobs:
            try:
                config = _load(composed, job)
                if searches:
                    config.check_objective()
                _require_own_dataset(config, job, pushed)
            except GradsiftError as error:
                errors.setdefault(str(error), []).append(job)
            except (HydraException, OmegaConfBaseException) as error:
                errors.setdefault(describe(error), []).append(job)
            advance(1)
    HydraConfig.instance().cfg = before
    return errors


def _require_own_dataset(config: Config, job: Job, pushed: dict[str, Job]) -> None:
    """Raise ConfigError if a job in `pushed` sends its selection to the same dataset; add this job to `pushed`."""
    dataset = config.export.push_to_hub
    if dataset is not None and pushed.setdefault(dataset, job) != job:
        raise ConfigError(
            f"export.push_to_hub={dataset} is the dataset of another job too, whose selection would be replaced; give "
            "each its own, as in 'export.push_to_hub=OWNER/NAME-${alpha}-${seed}'"
        )


def _load(composed: DictConfig, job: Job) -> Config:
    """Return the config that a job will have, composed as by Hydra, except that the job's number is 0."""
    overrides = [*composed.hydra.overrides.hydra, *job]
    config = compose(composed.hydra.job.config_name, overrides, return_hydra_config=True)
    with open_dict(config):
        config.hydra.job.num = config.hydra.job.id = 0
        config.hydra.runtime.output_dir = str(Path(config.hydra.sweep.dir).absolute() / "0")
    HydraConfig.instance().set_config(config)  # for values such as ${hydra:job.num}
    with open_dict(config):
        del config["hydra"]
    return load_config(config)
