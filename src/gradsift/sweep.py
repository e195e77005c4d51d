"""A sweep as a whole: every job is composed and checked before the first one starts.

Hydra's launchers may run jobs in other processes, on other machines and hours later; a value that
does not exist shall not wait for that. Composing a config takes Hydra a tenth of a second, so jobs
that differ by plain values alone share one composition, here and when they are launched in this process, and
Hydra itself is asked again only about what seems wrong.
"""

from __future__ import annotations

import copy
import importlib.util
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any, cast

from hydra._internal.config_loader_impl import get_overrides_dirname
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from gradsift.config import Config, load_config
from gradsift.errors import ConfigError, GradsiftError

HOME = "GRADSIFT_HOME"  # in a job's environment: the folder in which its sweep was begun
Job = list[str]  # the overrides of one job
MOST_JOBS = 10_000  # of a sweep: every one is composed and checked before the first starts
_GRID = "hydra._internal.core_plugins.basic_sweeper.BasicSweeper"
_IN_THIS_PROCESS = "hydra._internal.core_plugins.basic_launcher.BasicLauncher"
_EXTRAS = {  # the optional extra that brings a plugin of Hydra
    "hydra_joblib_launcher": "launchers",
    "hydra_submitit_launcher": "launchers",
    "hydra_optuna_sweeper": "search",
    "hydra_ray_launcher": "ray",
}


@dataclass(frozen=True)
class Sweep:
    """What a sweep is about to do."""

    folder: Path
    jobs: tuple[tuple[str, ...], ...] | None  # overrides in the order of the jobs; None where a search draws them


def begin(composed: DictConfig, name: Callable[[Exception], str]) -> Sweep:
    """Check a sweep that Hydra has composed and not started; nothing is written.

    Args:
        name: says an error of Hydra or OmegaConf in one line.

    Raises:
        ConfigError: a line for each kind of error, with the first job that has it.
        HydraException: the overrides cannot be read.
    """
    _require_plugins(composed)
    searches = composed.hydra.sweeper._target_ != _GRID
    if searches:
        _quieten_optuna()
    jobs = jobs_of(composed, searches)
    if problems := _named(jobs, _errors(composed, jobs, searches, name), searches):
        raise ConfigError("\n".join(problems))
    if not searches:
        _check_once()
    if composed.hydra.launcher._target_ == _IN_THIS_PROCESS:
        _share_compositions()
    return Sweep(Path(composed.hydra.sweep.dir), None if searches else tuple(tuple(job) for job in jobs))


def fix_place(composed: DictConfig) -> None:
    """Have every job write where the sweep was begun, in whatever folder its process was started.

    A launcher's worker composes its job anew from the overrides and then changes nothing but the environment, so
    the folder of the sweep becomes absolute and this one goes along as a variable (see `HOME`).
    """
    folder = Path(composed.hydra.sweep.dir).absolute()
    composed.hydra.sweep.dir = str(folder)
    composed.hydra.overrides.hydra += [
        f"hydra.sweep.dir={_quoted(folder)}",
        f"+hydra.job.env_set.{HOME}={_quoted(Path.cwd())}",
    ]


def _quoted(path: Path) -> str:
    return "'" + str(path).replace("\\", "\\\\").replace("'", "\\'") + "'"


def _check_once() -> None:
    """Keep Hydra's grid from composing every job just to see whether it can, as `begin` has seen: 0.2 s a job."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

    BasicSweeper.validate_batch_is_legal = lambda self, batch: None  # type: ignore[method-assign]


def _share_compositions() -> None:
    """Give Hydra's launcher in this process what `_Shared` composes: else a job that finds all done mostly composes."""
    loader = _loader()
    compose = loader.load_sweep_config
    shared: list[_Shared] = []

    def load_sweep_config(master: DictConfig, overrides: Job) -> DictConfig:
        if not shared:  # only now: `fix_place` has changed the sweep's config since it was checked
            shared.append(_Shared(master, compose))
        return shared[0].compose(overrides)

    loader.load_sweep_config = load_sweep_config


def _require_plugins(composed: DictConfig) -> None:
    for kind in ("launcher", "sweeper"):
        target = str(composed.hydra[kind]._target_)
        plugin = target.split(".")[1] if target.startswith("hydra_plugins.") else None
        if plugin is not None and not _is_installed(f"hydra_plugins.{plugin}"):
            choice, extra = composed.hydra.runtime.choices[f"hydra/{kind}"], _EXTRAS.get(plugin)
            remedy = f"pip install 'gradsift[{extra}]'" if extra else f"install {plugin.replace('_', '-')}"
            raise ConfigError(f"hydra/{kind}={choice} needs a plugin that is not installed; {remedy}")


def _quieten_optuna() -> None:
    """It would print a line for every trial, between those of the runs."""
    if _is_installed("optuna"):
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # not even the package around it
        return False


def jobs_of(composed: DictConfig, searches: bool) -> list[Job]:
    """The jobs of a grid; of a search jobs with every listed value and both ends of every interval, one at a time."""
    # as they stand: an override may speak of `${hydra:job.num}`, which only a job has
    grid = OmegaConf.to_container(composed.hydra.sweeper.get("params") or OmegaConf.create({}), resolve=False)
    task = OmegaConf.to_container(composed.hydra.overrides.task, resolve=False)
    given = [*(f"{key}={value}" for key, value in cast(dict[str, Any], grid).items()), *cast(list[str], task)]
    parsed = OverridesParser.create(config_loader=_loader()).parse_overrides(given)
    _require_few(parsed, searches)
    choices: dict[str, Job] = {}
    for override in parsed:  # the command line comes last and wins
        key = override.get_key_element()
        choices[key] = [f"{key}={value}" for value in values_of(override)]
    if not searches:
        return [list(job) for job in itertools.product(*choices.values())]
    first = {key: values[0] for key, values in choices.items()}
    tried = [list((first | {key: value}).values()) for key, values in choices.items() for value in values]
    return [list(job) for job in dict.fromkeys(map(tuple, tried))]


def _require_few(parsed: Sequence[Override], searches: bool) -> None:
    """Count the jobs before any is spelt out."""
    counts = {override.get_key_element(): _count(override) for override in parsed}
    jobs = sum(counts.values()) if searches else math.prod(counts.values())
    if jobs > MOST_JOBS:
        largest = max(counts, key=lambda key: counts[key])
        what = f"search names {_spelt(jobs)} values" if searches else f"sweep has {_spelt(jobs)} jobs"
        remedy = "an interval" if searches else "fewer values, or several sweeps over the same store"
        raise ConfigError(
            f"this {what}, and {largest} has {_spelt(counts[largest])} values; at most {MOST_JOBS:,} are checked "
            f"before the first job, so give {remedy}"
        )


def _spelt(count: int) -> str:
    return f"{count:,}" if count < 10**15 else "more than 10^15"


def _count(override: Override) -> int:
    """How many values an override names; an interval has its two ends."""
    value = override.value()
    if isinstance(value, RangeSweep):
        bounds = value.start or 0, value.stop or 0, value.step
        if not all(-math.inf < bound < math.inf for bound in bounds) or not value.step:
            raise ConfigError(f"{override.input_line} has no end; give finite numbers, and a step other than 0")
        start, stop, step = map(Fraction, bounds)
        return max(0, math.ceil((stop - start) / step))
    if isinstance(value, IntervalSweep):
        return 2
    return len(list(values_of(override)))


def values_of(override: Override) -> Iterator[str]:
    """The values that an override names, of an interval its ends, as they are written."""
    if not override.is_sweep_override():
        yield override.get_value_element_as_str()
    elif override.is_discrete_sweep():
        yield from override.sweep_string_iterator()
    else:
        interval: Any = override.value()
        yield from (str(interval.start), str(interval.end))


def _errors(
    composed: DictConfig, jobs: Sequence[Job], searches: bool, name: Callable[[Exception], str]
) -> list[str | None]:
    """What is wrong with each job; None where nothing is."""

    def error_of(load: Callable[[], Config]) -> str | None:
        try:
            config = load()
            if searches:
                config.check_objective()
        except GradsiftError as error:
            return str(error)
        except (HydraException, OmegaConfBaseException) as error:
            return name(error)
        return None

    before = HydraConfig.instance().cfg
    shared = _Shared(composed, _loader().load_sweep_config)
    confirmed: dict[str, str] = {}  # errors that Hydra had too, and how it says them
    errors: list[str | None] = []
    try:
        for job in jobs:
            error = error_of(partial(shared.load, job))
            if error is not None and error not in confirmed:  # Hydra has the last word, if this was not its own
                heard = error_of(partial(_loaded, composed, job)) if shared.set_values else error
                if heard is not None:
                    confirmed[error] = heard
            errors.append(None if error is None else confirmed.get(error))
    finally:
        HydraConfig.instance().cfg = before
    return errors


def _loaded(composed: DictConfig, job: Job) -> Config:
    """The config of a job, composed by Hydra and as the job will see it but for its number."""
    config = _loader().load_sweep_config(composed, list(job))
    _hide_hydra(config)
    return load_config(config)


def _hide_hydra(job: DictConfig) -> None:
    """Take Hydra's own node away, and let `${hydra:...}` find it all the same."""
    with open_dict(job):
        job.hydra.job.num = job.hydra.job.id = 0
        job.hydra.runtime.output_dir = str(Path(job.hydra.sweep.dir).absolute() / "0")
    HydraConfig.instance().set_config(job)
    with open_dict(job):
        del job["hydra"]


class _Shared:
    """Compositions that jobs share: jobs with the same keys set their values in one, as Hydra does after composing."""

    def __init__(self, composed: DictConfig, compose: Callable[[DictConfig, Job], DictConfig]) -> None:
        """
        Args:
            composed: of the sweep.
            compose: Hydra's own way to a job's config.
        """
        self._composed = composed
        self._compose = compose
        self._wholes: dict[tuple[str, ...], DictConfig] = {}
        self._bases: dict[tuple[tuple[str, ...], tuple[str, ...]], DictConfig] = {}
        self._groups: dict[str, bool] = {}
        self.set_values = False  # whether the last job was more than what Hydra composed

    def compose(self, job: Job) -> DictConfig:
        """What Hydra composes for the job, to the last value."""
        plain, others = self._parted(job)
        config = copy.deepcopy(self._whole(others))
        _set(config, plain)
        config.hydra.overrides.task = list(job)
        naming = config.hydra.job.config.override_dirname
        parsed = OverridesParser.create().parse_overrides(job)
        config.hydra.job.override_dirname = get_overrides_dirname(
            parsed, naming.exclude_keys, naming.item_sep, naming.kv_sep
        )
        return config

    def load(self, job: Job) -> Config:
        """The job's config, as the job will see it but for its number."""
        self.set_values = False
        plain, others = self._parted(job)
        self.set_values = bool(plain)
        keys = tuple(override.key_or_group for override in plain)
        if (others, keys) not in self._bases:
            self._bases[others, keys] = self._base(others, keys)
        base = self._bases[others, keys]
        _set(base, plain)
        return load_config(base)

    def _parted(self, job: Job) -> tuple[list[Override], tuple[str, ...]]:
        """The overrides that replace one value, and the lines of the others."""
        parsed = OverridesParser.create().parse_overrides(job)
        plain = [override for override in parsed if self._is_plain(override)]
        return plain, tuple(line for line, override in zip(job, parsed, strict=True) if override not in plain)

    def _whole(self, others: tuple[str, ...]) -> DictConfig:
        if others not in self._wholes:
            self._wholes[others] = self._compose(self._composed, list(others))
        return self._wholes[others]

    def _base(self, others: tuple[str, ...], keys: Sequence[str]) -> DictConfig:
        base = copy.deepcopy(self._whole(others))
        _hide_hydra(base)
        if not any(key.startswith("benchmark") for key in keys):
            OmegaConf.resolve(base.benchmark)  # its catalogue holds most of all interpolations
        return base

    def _is_plain(self, override: Override) -> bool:
        """Whether it replaces one value: no choice of a group, nothing added, removed or merged."""
        key = override.key_or_group
        if key not in self._groups:
            self._groups[key] = bool(_loader().get_group_options(key))
        changes = override.type is not None and override.type.name == "CHANGE" and not self._groups[key]
        return changes and not isinstance(override.value(), dict)


def _set(config: DictConfig, values: Sequence[Override]) -> None:
    for override in values:
        OmegaConf.update(config, override.key_or_group, override.value(), merge=True)


def _loader() -> Any:
    hydra = GlobalHydra.instance().hydra
    if hydra is None:
        raise RuntimeError("a sweep is checked inside of Hydra alone")
    return hydra.config_loader


def _named(jobs: Sequence[Job], errors: Sequence[str | None], searches: bool) -> list[str]:
    """A line for each kind of error, with the first job that has it."""
    wrong: dict[str, list[int]] = {}
    for number, error in enumerate(errors):
        if error is not None:
            wrong.setdefault(error, []).append(number)
    lines = []
    for error, numbers in wrong.items():
        which = "a trial" if searches else f"job {numbers[0] + 1} of {len(jobs)}"
        more = f" and {len(numbers) - 1} more" if len(numbers) > 1 and not searches else ""
        lines.append(f"{which} ({' '.join(jobs[numbers[0]])}){more}: {error}")
    return lines
