"""The command line: `python run.py` or, after installation, `gradsift`.

Hydra composes the config, and `load_config` checks it before torch is imported, because that import is slow. An error
that the user can correct is printed as one line, and the exit code is 2. If a job of a sweep fails, the other jobs
still run.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from gradsift.composition import conf_folder, in_full, in_one_line, register_schemas, require_readable
from gradsift.config import Config, load_config, restore_config
from gradsift.errors import ConfigError, GradsiftError
from gradsift.execution import Job, execute
from gradsift.launch import is_launched, leads, on_all_ranks
from gradsift.run_folder import CONFIG_FILE, read_yaml
from gradsift.sweep import HOME, Sweep, begin, fix_place, take_gpus

# environment variable (inherited by jobs in other processes): with the value 1, tracebacks are shown
TRACE = "GRADSIFT_TRACE"
_KEPT = "finished work is kept, and the same command continues from there"
_failed = False  # whether any job of this process failed
_sweep: Sweep | None = None  # the sweep that this process has started
_is_first = True  # whether this process is rank 0 or started rank 0; only then it writes the folders of its runs


def main() -> None:
    """Run the command line. This function is the entry point of `run.py` and of the console script `gradsift`."""
    global _failed, _sweep
    _sweep = None
    os.environ.setdefault("HYDRA_MAIN_MODULE", "gradsift.cli")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TQDM_DISABLE", "1")  # progress bars of other libraries would mix with gradsift's
    os.environ[TRACE] = os.environ.get("HYDRA_FULL_ERROR", "0")
    if sys.argv[1:] in (["--help"], ["-h"]):
        print((conf_folder() / "help.txt").read_text(encoding="utf-8"), end="")
        return
    try:
        if sys.argv[1:2] == ["scores"]:
            from gradsift.report.scores import main as write_scores

            sys.exit(write_scores(sys.argv[2:]))
        elif sys.argv[1:2] == ["--replay"]:
            _replay(sys.argv[2:])
        else:
            _compose_and_run(in_full(sys.argv[1:]))
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C would cut the message short
        _print_error(f"interrupted; {_KEPT}")
        sys.exit(130)
    except Exception as error:
        if _traced() and not isinstance(error, ConfigError):
            raise
        _fail(_described(error))
    if _sweep is not None and _sweep.folder.is_dir() and _is_first:  # also after an error of the launcher
        from gradsift.report.terminal import sweep_finished

        _failed |= not sweep_finished(_relative(_sweep.folder), _sweep.jobs)
    if _failed:
        sys.exit(2)


def _compose_and_run(arguments: list[str]) -> None:
    """Pass the command-line `arguments` to Hydra, which runs one job or a sweep."""
    require_readable(arguments)
    if is_launched() and os.environ["RANK"] != "0":  # Hydra makes a folder for every rank that torchrun starts
        unused = Path(tempfile.gettempdir(), "gradsift-other-ranks")
        arguments += [f"hydra.run.dir={unused}", f"hydra.sweep.dir={unused}"]
    sys.argv[1:] = arguments
    register_schemas()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # otherwise Hydra prints its errors on several lines and exits with code 1
    try:
        hydra.main(version_base="1.3", config_path=str(conf_folder()), config_name="config")(_job)()
    finally:
        os.environ["HYDRA_FULL_ERROR"] = os.environ[TRACE]


def _described(error: Exception) -> str:
    """Return the one-line message of an error that was raised outside of the jobs."""
    if isinstance(error, ConfigError):
        return str(error)
    reason = f"{type(error).__name__}: {in_one_line(error) or 'no message'}"
    if _sweep is not None:
        return f"the sweep ended early with {reason}; {_KEPT}"
    if isinstance(error, HydraException | OmegaConfBaseException):  # an unknown group or option, or a wrong type
        return in_one_line(error)
    if isinstance(error, OSError):
        return f"the folder of the run cannot be written: {error}; give another with hydra.run.dir=DIR"
    return f"unexpected {reason} (HYDRA_FULL_ERROR=1 shows where)"


def _job(composed: DictConfig) -> float | None:
    """Run the job whose config Hydra has composed, and return what `_attempt` returns."""
    if home := os.environ.get(HOME):  # a launcher's worker may have started in another folder
        os.chdir(home)
    settings = HydraConfig.get()
    # not resolved, because an interpolation such as ${oc.env:NAME} may refer to a secret
    overrides: Any = OmegaConf.to_container(settings.overrides.task, resolve=False)
    job = Job(_relative(Path(settings.runtime.output_dir)), [str(override) for override in overrides])
    if settings.mode == RunMode.MULTIRUN:
        jobs = _sweep.jobs if _sweep is not None else None
        job = replace(job, sweep=Path(settings.sweep.dir), number=int(settings.job.num) + 1, jobs=jobs)
    return _attempt(lambda: load_config(composed), job)


def _relative(folder: Path) -> Path:
    """Return `folder` relative to the working directory if it lies in this directory, otherwise unchanged.

    Relative paths keep messages short and portable.
    """
    return folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder


def _replay(arguments: list[str]) -> None:
    """Run again with the config in the folder of a run (`--replay RUN`). The repetition writes to a new folder."""
    if len(arguments) != 1:
        raise ConfigError("--replay takes one run folder, as in: python run.py --replay outputs/DATE/TIME")
    source = Path(arguments[0]) / CONFIG_FILE
    if not source.is_file():
        raise ConfigError(f"--replay {arguments[0]}: there is no {CONFIG_FILE}; give the folder of a run")
    dumped = read_yaml(source)
    if not isinstance(dumped, dict):
        raise ConfigError(f"{source} is not the config of a run, or it is damaged; give another run, or its options")
    folder = Path("outputs", datetime.now().strftime("%Y-%m-%d/%H-%M-%S-%f"))
    folder.mkdir(parents=True)
    _attempt(lambda: restore_config(dumped), Job(folder, [f"--replay {arguments[0]}"]))


def _attempt(load: Callable[[], Config], job: Job) -> float | None:
    """Run one job.

    If the job fails, print the error as one line and write it to `run.json`; `main` then exits with code 2.

    Returns:
        The result that the option `objective` names, which a search optimises, or None if the job failed or the run
        does not compute this result.
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
    except Exception as error:
        if _traced():
            raise
        reason = str(error)
        if isinstance(error, GradsiftError):
            _fail(reason)
        else:
            trace = job.folder / "error.txt"
            trace.write_text(traceback.format_exc(), encoding="utf-8")
            name, line = type(error).__name__, (reason or "no message").splitlines()[0]
            _fail(f"unexpected {name}: {line} (a defect of gradsift; trace in {trace})")
            reason = f"{name}: {reason}"
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
    """A Hydra callback that checks the jobs of a sweep before the sweep writes anything.

    If one of the jobs cannot run, the process exits. conf/config.yaml registers this class.
    """

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        global _sweep
        try:
            sweep = begin(config)
        except Exception as error:
            problems = str(error) if isinstance(error, GradsiftError) else in_one_line(error)
            for problem in problems.splitlines():
                _fail(problem)
            _print_error("no job was started")
            raise SystemExit(2) from error  # Hydra would turn an `Exception` into a warning and start the sweep
        fix_place(config)
        _sweep = sweep
