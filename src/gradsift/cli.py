"""The command line: `python run.py`, or `gradsift` if it is installed.

Hydra composes the config, `load_config` checks it, and only then is anything heavy imported. An error that the user
can correct is printed as one line, and the exit code is 2. In a sweep, the other jobs still run.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from gradsift.composition import in_full, in_one_line, require_readable
from gradsift.config import Config, load_config, register_schemas, restore_config
from gradsift.errors import ConfigError, GradsiftError, first_line
from gradsift.execution import Job, execute
from gradsift.launch import is_launched, leads, on_all_ranks
from gradsift.run_folder import CONFIG_FILE
from gradsift.sweep import HOME, Sweep, begin, fix_place, take_gpus
from gradsift.user_conf import conf_folder

# an environment variable, because jobs in other processes inherit it; with 1, tracebacks are shown
TRACE = "GRADSIFT_TRACE"
_KEPT = "what is finished is kept, and the same command continues from there"
_failed = False  # whether any job of this process failed
_sweep: Sweep | None = None  # the sweep that this process has started
_is_first = True  # whether this process is rank 0 or started rank 0, and so writes the folders of its runs


def main() -> None:
    """Run the command line; the entry point of `run.py` and of the console script."""
    os.environ.setdefault("HYDRA_MAIN_MODULE", "gradsift.cli")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TQDM_DISABLE", "1")  # progress bars of other libraries would mix with gradsift's
    global _sweep
    _sweep = None
    os.environ[TRACE] = os.environ.get("HYDRA_FULL_ERROR", "0")
    try:
        arguments = sys.argv[1:] = in_full(sys.argv[1:])
        if arguments in (["--help"], ["-h"]):
            print((conf_folder() / "help.txt").read_text(encoding="utf-8"), end="")
        elif arguments[:1] == ["--replay"]:
            replay(arguments[1:])
        elif arguments[:1] == ["scores"]:
            from gradsift.report.scores import main as write_scores

            sys.exit(write_scores(arguments[1:]))
        else:
            require_readable(arguments, conf_folder())
            if is_launched() and os.environ["RANK"] != "0":  # Hydra makes a folder for every rank that torchrun starts
                unused = Path(tempfile.gettempdir(), "gradsift-other-ranks")
                sys.argv += [f"hydra.run.dir={unused}", f"hydra.sweep.dir={unused}"]
            _compose_and_run()
    except ConfigError as error:
        _fail(str(error))
    except (HydraException, OmegaConfBaseException) as error:  # an unknown group or option, or a wrong type
        if _traced():
            raise
        _fail(in_one_line(error))
    except OSError as error:
        if _traced():
            raise
        _fail(f"the folder of the run cannot be written: {error}; give another with hydra.run.dir=DIR")
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C would cut the message short
        _print_error(f"interrupted; {_KEPT}")
        sys.exit(130)
    if _failed:
        sys.exit(2)


def _compose_and_run() -> None:
    """Let Hydra run one job or a sweep, and print the sweep's summary even if its launcher raised an error."""
    register_schemas()
    try:
        with _hydra_raises():
            hydra.main(version_base="1.3", config_path=str(conf_folder()), config_name="config")(_job)()
    except Exception as error:
        if _traced() or (_sweep is None and isinstance(error, HydraException | OmegaConfBaseException | OSError)):
            raise
        reason = f"{type(error).__name__}: {in_one_line(error) or 'no message'}"
        if _sweep is None:
            _fail(f"Hydra cannot compose this config: {reason}")
            return
        _fail(f"the sweep ended early with {reason}; {_KEPT}")
    if _sweep is not None and _sweep.folder.is_dir() and _is_first:
        from gradsift.report.terminal import sweep_finished

        if not sweep_finished(_relative(_sweep.folder), _sweep.jobs):
            global _failed
            _failed = True


@contextmanager
def _hydra_raises() -> Iterator[None]:
    """Make Hydra raise its errors; otherwise it prints several lines and exits with code 1."""
    before = os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = before


def _job(composed: DictConfig) -> float | None:
    """Run the job whose config Hydra has composed, and return the value of `attempt`."""
    if home := os.environ.get(HOME):  # a launcher's worker may have started in another folder
        os.chdir(home)
    settings = HydraConfig.get()
    # not resolved, because an interpolation such as ${oc.env:NAME} may refer to a secret
    overrides: Any = OmegaConf.to_container(settings.overrides.task, resolve=False)
    job = Job(_relative(Path(settings.runtime.output_dir)), [str(override) for override in overrides])
    if settings.mode == RunMode.MULTIRUN:
        jobs = _sweep.jobs if _sweep is not None else None
        job = replace(job, sweep=Path(settings.sweep.dir), number=int(settings.job.num) + 1, jobs=jobs)
    return attempt(lambda: load_config(composed), job)


def _relative(folder: Path) -> Path:
    """Return the path relative to the working directory if it is inside, for messages that are short and portable."""
    return folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder


def replay(arguments: list[str]) -> None:
    """Repeat a run with the config in its folder (`--replay RUN`); the repetition has a folder of its own."""
    if len(arguments) != 1:
        _fail("--replay takes one run folder, as in: python run.py --replay outputs/DATE/TIME")
        return
    source = Path(arguments[0]) / CONFIG_FILE
    if not source.is_file():
        _fail(f"--replay {arguments[0]}: there is no {CONFIG_FILE}; give the folder of a run")
        return

    def load() -> Config:
        try:
            dumped = yaml.safe_load(source.read_text(encoding="utf-8"))
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise ConfigError(f"{source} cannot be read ({first_line(error)})") from error
        if not isinstance(dumped, dict):
            raise ConfigError(f"{source} is not the config of a run")
        return restore_config(dumped)

    folder = Path("outputs", datetime.now().strftime("%Y-%m-%d/%H-%M-%S-%f"))
    folder.mkdir(parents=True)
    attempt(load, Job(folder, [f"--replay {arguments[0]}"]))


def attempt(load: Callable[[], Config], job: Job) -> float | None:
    """Run one job. Print an error as one line, write it to `run.json`, and remember it for the exit code.

    Returns:
        The value of `objective`, for a search, or None if the job failed or its run has no such value.
    """
    global _is_first
    try:
        try:
            config = load()
            take_gpus(job.number, config.compute.devices)
            _is_first = leads(config.compute)
        finally:
            if _is_first:
                job.clear()
        return execute(config, job) if config.plan else on_all_ranks(config.compute, execute, config, job)
    except GradsiftError as error:
        if _traced():
            raise
        _fail(str(error))
        reason = str(error)
    except Exception as error:
        if _traced():
            raise
        (job.folder / "error.txt").write_text(traceback.format_exc(), encoding="utf-8")
        trace, line = job.folder / "error.txt", (str(error) or "no message").splitlines()[0]
        _fail(f"unexpected {type(error).__name__}: {line} (a defect of gradsift; trace in {trace})")
        reason = f"{type(error).__name__}: {error}"
    if _is_first:
        job.failed(reason)
    return None


def _traced() -> bool:
    """Return whether the user asked for tracebacks with HYDRA_FULL_ERROR=1."""
    return os.environ.get(TRACE) == "1"


def _print_error(message: str) -> None:
    print(f"error: {message}", file=sys.stderr, flush=True)


def _fail(message: str) -> None:
    global _failed
    _failed = True
    _print_error(message)


class SweepCheck(Callback):
    """Exits before a sweep writes anything if one of its jobs cannot run; registered in conf/config.yaml."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        global _sweep
        try:
            sweep = begin(config, in_one_line)
        except Exception as error:
            problems = str(error) if isinstance(error, GradsiftError) else in_one_line(error)
            for problem in problems.splitlines():
                _fail(problem)
            _print_error("no job was started")
            raise SystemExit(2) from error  # Hydra would turn an `Exception` into a warning and start the sweep
        fix_place(config)
        _sweep = sweep
