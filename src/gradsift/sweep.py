"""Checks every job of a sweep before the first one starts, and gives each job its folder and its GPUs.

Hydra's launchers may run jobs in other processes, on other machines and hours later. So an invalid value in any job is
reported before anything is written.
"""

from __future__ import annotations

import importlib
import itertools
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra import compose
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from gradsift.composition import in_one_line, quoted
from gradsift.config import Config, load_config
from gradsift.errors import ConfigError, GradsiftError, first_line

HOME = "GRADSIFT_HOME"  # environment variable of a job: the folder in which its sweep was started
MOST_JOBS = 10_000  # in one sweep
GPUS = "GRADSIFT_GPUS"  # environment variable of a job: the GPUs of its sweep (see `take_gpus`)
_EXTRAS = {  # plugin of Hydra: the optional extra that installs it
    "hydra_joblib_launcher": "launchers",
    "hydra_submitit_launcher": "launchers",
    "hydra_optuna_sweeper": "search",
    "hydra_ray_launcher": "ray",
}
Job = tuple[str, ...]  # the overrides of one job


@dataclass(frozen=True)
class Sweep:
    """The folder and the jobs of a sweep that passed the checks of `begin`."""

    folder: Path
    jobs: list[Job] | None  # in the order in which they run; None for a search, which proposes them later


def begin(composed: DictConfig) -> Sweep:
    """Check all jobs of the sweep that Hydra is about to start.

    Args:
        composed: the config of the sweep, including Hydra's own settings (the key `hydra`).

    Raises:
        ConfigError: a plugin is missing, or some jobs cannot run. The message has a line for each different error,
            which names the first job with this error.
        HydraException: the overrides cannot be parsed.
    """
    from gradsift.runtime import Display

    _require_plugins(composed)
    searches = not composed.hydra.sweeper._target_.endswith(".BasicSweeper")
    if "optuna" in composed.hydra.sweeper._target_:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)  # otherwise Optuna prints a line for every trial
    jobs = jobs_of(composed, searches)
    errors: dict[str, list[int]] = {}  # numbers of the jobs that cannot run, by error message
    datasets: set[str] = set()  # the datasets to which earlier jobs push their selections
    before = HydraConfig.instance().cfg
    with Display().task(f"check {len(jobs):,} jobs", len(jobs)) as advance:
        for number, job in enumerate(jobs):
            try:
                config = _load(composed, job)
                if searches:
                    config.check_objective()
                if dataset := config.export.push_to_hub:
                    if dataset in datasets:
                        raise ConfigError(
                            f"export.push_to_hub={dataset} is the dataset of another job too, whose selection would be "
                            "replaced; give each its own, as in 'export.push_to_hub=OWNER/NAME-${alpha}-${seed}'"
                        )
                    datasets.add(dataset)
            except GradsiftError as error:
                errors.setdefault(str(error), []).append(number)
            except (HydraException, OmegaConfBaseException) as error:
                errors.setdefault(in_one_line(error), []).append(number)
            advance(1)
    HydraConfig.instance().cfg = before
    lines = []
    for message, numbers in errors.items():
        which = "a trial" if searches else f"job {numbers[0] + 1} of {len(jobs)}"
        more = f" and {len(numbers) - 1} more" if len(numbers) > 1 else ""
        lines.append(f"{which} ({' '.join(jobs[numbers[0]])}){more}: {message}")
    if lines:
        raise ConfigError("\n".join(lines))
    return Sweep(Path(composed.hydra.sweep.dir), None if searches else jobs)


def _require_plugins(composed: DictConfig) -> None:
    for kind in ("launcher", "sweeper"):
        package, plugin, *_ = str(composed.hydra[kind]._target_).split(".")
        if package != "hydra_plugins":
            continue
        try:
            importlib.import_module(f"hydra_plugins.{plugin}")
        except ImportError as error:
            extra = _EXTRAS.get(plugin)
            remedy = f"pip install 'gradsift[{extra}]'" if extra else f"install {plugin.replace('_', '-')}"
            choice = composed.hydra.runtime.choices[f"hydra/{kind}"]
            raise ConfigError(f"hydra/{kind}={choice} needs a plugin that is not installed; {remedy}") from error


def jobs_of(composed: DictConfig, searches: bool) -> list[Job]:
    """Return the jobs to check: all jobs of a grid or, for a search, a few jobs that cover the search space.

    Every listed value of an option, and both ends of every interval, occur in at least one of the jobs of a search.

    Raises:
        ConfigError: an option has no values, or there are more than `MOST_JOBS` jobs. The jobs are counted before they
            are listed, because a list of all of them might not fit in memory.
    """
    # not resolved: an override may contain `${hydra:job.num}`, which only a job has
    params: Any = OmegaConf.to_container(composed.hydra.sweeper.get("params") or OmegaConf.create({}), resolve=False)
    task: Any = OmegaConf.to_container(composed.hydra.overrides.task, resolve=False)
    parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
    choices = {}
    # if several overrides set one option, the last one counts; those of the command line come last
    for override in parser.parse_overrides([*(f"{key}={value}" for key, value in params.items()), *task]):
        key = override.get_key_element()
        try:
            choices[key] = [f"{key}={value}" for value in _values_of(override)]
        except (ValueError, ArithmeticError, HydraException) as error:
            raise ConfigError(
                f"{override.input_line} cannot be listed ({first_line(error)}); in a range, give finite numbers and a "
                "step other than 0"
            ) from error
        if not choices[key]:
            raise ConfigError(f"{override.input_line} has no values; give at least one")
    counts = [len(values) for values in choices.values()]
    longest = max(counts, default=0)
    if (number := longest if searches else math.prod(counts)) > MOST_JOBS:
        largest = max(choices, key=lambda key: len(choices[key]))
        raise ConfigError(
            f"this sweep has at least {number:,} jobs to check, and at most {MOST_JOBS:,} are possible; {largest} has "
            "the most values, so give fewer values, or several sweeps"
        )
    if not searches:
        return list(itertools.product(*choices.values()))
    return [tuple(values[number % len(values)] for values in choices.values()) for number in range(longest)]


def _values_of(override: Override) -> list[str]:
    """Return the values of an override as text; of an interval, its two ends.

    At most `MOST_JOBS` + 1 values are listed, which is enough to see that there are too many.
    """
    value: Any = override.value()
    if isinstance(value, IntervalSweep):
        return [str(value.start), str(value.end)]
    if not override.is_sweep_override():
        return [override.get_value_element_as_str()]
    # Hydra's own iterator would list all values of a shuffled range
    values = map(str, value.range()) if isinstance(value, RangeSweep) else override.sweep_string_iterator()
    return list(itertools.islice(values, MOST_JOBS + 1))


def _load(composed: DictConfig, job: Job) -> Config:
    """Return the config of a job, composed as Hydra will compose it, except that the job's number is 0."""
    overrides = [*composed.hydra.overrides.hydra, *job]
    config = compose(composed.hydra.job.config_name, overrides, return_hydra_config=True)
    OmegaConf.set_struct(config, False)
    config.hydra.job.num = config.hydra.job.id = 0
    config.hydra.runtime.output_dir = str(Path(config.hydra.sweep.dir).absolute() / "0")
    HydraConfig.instance().set_config(config)  # for values such as ${hydra:job.num}
    del config["hydra"]
    return load_config(config)


def fix_place(composed: DictConfig) -> None:
    """Make every job write to the sweep's folder, even if its process starts in another working directory.

    A launcher's worker process composes its job again from the overrides. So the absolute path of the sweep's folder is
    added to the overrides. Further overrides set environment variables of the job: GRADSIFT_HOME is the folder in which
    the sweep was started. If the launcher runs jobs side by side on this machine, GRADSIFT_GPUS lists the GPUs of the
    sweep.
    """
    folder = Path(composed.hydra.sweep.dir).absolute()
    composed.hydra.sweep.dir = str(folder)
    composed.hydra.overrides.hydra += [
        f"hydra.sweep.dir={quoted(str(folder))}",
        f"+hydra.job.env_set.{HOME}={quoted(str(Path.cwd()))}",
    ]
    if str(composed.hydra.launcher._target_).endswith(("JoblibLauncher", "LocalLauncher")):
        import torch

        if count := torch.cuda.device_count():
            gpus = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count))))
            composed.hydra.overrides.hydra.append(f"+hydra.job.env_set.{GPUS}='{gpus}'")


def take_gpus(number: int | None, devices: int) -> None:
    """Give a job its own GPUs among those of the sweep, by setting CUDA_VISIBLE_DEVICES.

    If the environment variable GRADSIFT_GPUS (see `fix_place`) is not set, nothing is changed. If there are too few
    GPUs, jobs share them. A worker process that has already used a GPU keeps its GPUs for later jobs, because CUDA
    reads CUDA_VISIBLE_DEVICES once per process.

    Args:
        number: the number of the job, counted from 1; if None, nothing is changed.
        devices: number of GPUs for the job.
    """
    if number is None or not (listed := os.environ.get(GPUS)):
        return
    import torch

    if not torch.cuda.is_initialized():
        gpus, first = listed.split(","), (number - 1) * devices
        own = [gpus[(first + place) % len(gpus)] for place in range(min(devices, len(gpus)))]
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(own)
