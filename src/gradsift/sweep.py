"""Checks of a sweep: every job is composed and validated before the first one starts.

Hydra's launchers may run jobs in other processes, on other machines and hours later. So an invalid value in any job is
reported before anything is written.
"""

from __future__ import annotations

import importlib.util
import itertools
import math
import os
from collections.abc import Sequence
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
from gradsift.errors import ConfigError, GradsiftError

HOME = "GRADSIFT_HOME"  # environment variable of a job: the folder in which its sweep was started
GPUS = "GRADSIFT_GPUS"  # environment variable of a job: the GPUs of its sweep (see `take_gpus`)
MOST_JOBS = 10_000  # in one sweep
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


def begin(composed: DictConfig) -> Sweep:
    """Check the sweep that Hydra is about to start (its config, with Hydra's own node), and return folder and jobs.

    Raises:
        ConfigError: some jobs cannot run; the message has a line for each different error, which names the first job
            with this error. Or a plugin is missing, or there are too many jobs.
        HydraException: the overrides cannot be parsed.
    """
    _require_plugins(composed)
    searches = not composed.hydra.sweeper._target_.endswith(".BasicSweeper")
    if searches and _is_installed("optuna"):
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)  # otherwise it prints a line for every trial
    jobs = jobs_of(composed, searches)
    lines = []
    for error, wrong in _errors(composed, jobs, searches).items():
        which = "a trial" if searches else f"job {jobs.index(wrong[0]) + 1} of {len(jobs)}"
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 and not searches else ""
        lines.append(f"{which} ({' '.join(wrong[0])}){more}: {error}")
    if lines:
        raise ConfigError("\n".join(lines))
    return Sweep(Path(composed.hydra.sweep.dir), None if searches else tuple(jobs))


def fix_place(composed: DictConfig) -> None:
    """Make every job write below the folder where the sweep was started.

    A launcher's worker may start in another folder, where it composes its job again from the overrides and sets the
    job's environment variables: `HOME`, and `GPUS` if the launcher runs jobs side by side on this machine.
    """
    folder = Path(composed.hydra.sweep.dir).absolute()
    composed.hydra.sweep.dir = str(folder)
    composed.hydra.overrides.hydra += [
        f"hydra.sweep.dir={quoted(str(folder))}",
        f"+hydra.job.env_set.{HOME}={quoted(str(Path.cwd()))}",
    ]
    side_by_side = str(composed.hydra.launcher._target_).endswith(("JoblibLauncher", "LocalLauncher"))
    if side_by_side and (gpus := _visible_gpus()):
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


def _require_plugins(composed: DictConfig) -> None:
    for kind in ("launcher", "sweeper"):
        package, plugin, *_ = str(composed.hydra[kind]._target_).split(".")
        if package == "hydra_plugins" and not _is_installed(f"hydra_plugins.{plugin}"):
            choice, extra = composed.hydra.runtime.choices[f"hydra/{kind}"], _EXTRAS.get(plugin)
            remedy = f"pip install 'gradsift[{extra}]'" if extra else f"install {plugin.replace('_', '-')}"
            raise ConfigError(f"hydra/{kind}={choice} needs a plugin that is not installed; {remedy}")


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package that contains it is missing
        return False


def jobs_of(composed: DictConfig, searches: bool) -> list[Job]:
    """Return the jobs of a grid; for a search one job for each listed value and each end of an interval.

    In a job of a search, all other options have their first value.

    Raises:
        ConfigError: there are more than `MOST_JOBS` jobs, which is found without listing them.
    """
    # not resolved: an override may contain `${hydra:job.num}`, which only a job has
    params: Any = OmegaConf.to_container(composed.hydra.sweeper.get("params") or OmegaConf.create({}), resolve=False)
    task: Any = OmegaConf.to_container(composed.hydra.overrides.task, resolve=False)
    lines = [*(f"{key}={value}" for key, value in params.items()), *task]
    parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
    choices = {}
    # if several overrides set one option, the last one counts; those of the command line come last
    for override in parser.parse_overrides(lines):
        key = override.get_key_element()
        choices[key] = [f"{key}={value}" for value in values_of(override)]
    counts = [len(values) for values in choices.values()]
    if (jobs := sum(counts) if searches else math.prod(counts)) > MOST_JOBS:
        largest = max(choices, key=lambda key: len(choices[key]))
        kind, remedy = ("search", "an interval") if searches else ("sweep", "fewer values, or several sweeps")
        raise ConfigError(
            f"this {kind} has at least {jobs:,} jobs, and at most {MOST_JOBS:,} are checked before the first one; "
            f"{largest} has the most values, so give {remedy}"
        )
    if not searches:
        return list(itertools.product(*choices.values()))
    first = {key: values[0] for key, values in choices.items()}
    tried = [tuple((first | {key: value}).values()) for key, values in choices.items() for value in values]
    return list(dict.fromkeys(tried))


def values_of(override: Override) -> list[str]:
    """Return as text the values that an override names, at most `MOST_JOBS` + 1, or the two ends of its interval.

    Raises:
        ConfigError: a range has no end.
    """
    value: Any = override.value()
    if isinstance(value, IntervalSweep):
        return [str(value.start), str(value.end)]
    if not override.is_sweep_override():
        return [override.get_value_element_as_str()]
    try:
        # Hydra's iterator would list all values of a shuffled range
        values = map(str, value.range()) if isinstance(value, RangeSweep) else override.sweep_string_iterator()
        return list(itertools.islice(values, MOST_JOBS + 1))
    except (ValueError, ArithmeticError, HydraException) as error:
        raise ConfigError(f"{override.input_line} has no end; give finite numbers, and a step other than 0") from error


def _errors(composed: DictConfig, jobs: Sequence[Job], searches: bool) -> dict[str, list[Job]]:
    """Return the jobs that cannot run, by error message."""
    from gradsift.runtime import Display

    errors: dict[str, list[Job]] = {}
    pushed: set[str | None] = set()  # the datasets to which earlier jobs send their selections
    before = HydraConfig.instance().cfg
    with Display().task(f"check {len(jobs):,} jobs", len(jobs)) as advance:
        for job in jobs:
            try:
                config = _load(composed, job)
                if searches:
                    config.check_objective()
                dataset = config.export.push_to_hub
                if dataset is not None and dataset in pushed:
                    raise ConfigError(
                        f"export.push_to_hub={dataset} is the dataset of another job too, whose selection would be "
                        "replaced; give each its own, as in 'export.push_to_hub=OWNER/NAME-${alpha}-${seed}'"
                    )
                pushed.add(dataset)
            except GradsiftError as error:
                errors.setdefault(str(error), []).append(job)
            except (HydraException, OmegaConfBaseException) as error:
                errors.setdefault(in_one_line(error), []).append(job)
            advance(1)
    HydraConfig.instance().cfg = before
    return errors


def _load(composed: DictConfig, job: Job) -> Config:
    """Return the config that a job will have, composed as by Hydra, except that the job's number is 0."""
    overrides = [*composed.hydra.overrides.hydra, *job]
    config = compose(composed.hydra.job.config_name, overrides, return_hydra_config=True)
    OmegaConf.set_struct(config, False)
    config.hydra.job.num = config.hydra.job.id = 0
    config.hydra.runtime.output_dir = str(Path(config.hydra.sweep.dir).absolute() / "0")
    HydraConfig.instance().set_config(config)  # for values such as ${hydra:job.num}
    del config["hydra"]
    return load_config(config)
