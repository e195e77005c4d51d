"""The command line: `python run.py`, or `gradsift` where it is installed.

Hydra composes the config, `load_config` checks it, and only then is anything heavy imported. A
problem that the user can mend ends as one line and exit code 2; in a sweep the other jobs go on.
"""

from __future__ import annotations

import copy
import difflib
import json
import os
import re
import signal
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from gradsift import config as config_module
from gradsift.config import Config, dump_config, load_config, register_schemas, restore_config
from gradsift.errors import ConfigError, GradsiftError
from gradsift.launch import LOST, is_launched, leads, on_all_ranks
from gradsift.overrides import require_readable
from gradsift.sweep import HOME, Sweep, begin, fix_place
from gradsift.user_conf import conf_folder

CONFIG_FILE = "config.yaml"
_WRITTEN = ("run.json", "metrics.jsonl", "selection.jsonl", "audit.json", "error.txt")
TRACE = "GRADSIFT_TRACE"  # set where the user asked for traces: jobs in other processes see it too
_DUMPER = getattr(yaml, "CSafeDumper", yaml.SafeDumper)  # ten times as fast, where PyYAML was built with it
_failed = False  # whether any job of this process failed
_sweep: Sweep | None = None  # that this process has begun
_is_first = True  # whether this process writes the folders of its runs: it is rank 0, or started rank 0
_SEEDS = (
    ("values", "seed"),
    ("values", "data", "seed"),
    ("values", "data", "corruption", "seed"),
    ("values", "scorer", "seed"),
    ("values", "selector", "seed"),
)


def main() -> None:
    """Entry point of `run.py` and of the console script."""
    os.environ.setdefault("HYDRA_MAIN_MODULE", "gradsift.cli")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TQDM_DISABLE", "1")  # other libraries' bars: ours are enough, and a log wants none
    arguments = sys.argv[1:]
    global _sweep
    _sweep = None
    os.environ[TRACE] = os.environ.get("HYDRA_FULL_ERROR", "0")
    try:
        if arguments in (["--help"], ["-h"]):
            print((conf_folder() / "help.txt").read_text(encoding="utf-8"), end="")
        elif arguments[:1] == ["--replay"]:
            replay(arguments[1:])
        else:
            require_readable(arguments, conf_folder())
            if is_launched() and os.environ["RANK"] != "0":  # Hydra makes a folder for every rank that torchrun starts
                unused = Path(tempfile.gettempdir(), "gradsift-other-ranks")
                sys.argv += [f"hydra.run.dir={unused}", f"hydra.sweep.dir={unused}"]
            _compose_and_run()
    except ConfigError as error:  # of the command line itself
        _fail(str(error))
    except (HydraException, OmegaConfBaseException) as error:  # a group, an option or a type that is not there
        if _traced():
            raise
        _fail(in_one_line(error))
    except OSError as error:
        if _traced():
            raise
        _fail(f"the folder of the run cannot be written: {error}; give another with hydra.run.dir=DIR")
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C would cut the message short
        _error("interrupted; what is finished is kept, and the same command goes on from there")
        sys.exit(130)
    if _failed:
        sys.exit(2)


def _traced() -> bool:
    """Whether the user asked for traces with HYDRA_FULL_ERROR=1."""
    return os.environ.get(TRACE) == "1"


def _compose_and_run() -> None:
    """Hydra's part: one job, or a sweep and its summary, also where the launcher gave up."""
    register_schemas()
    try:
        with _hydra_raises():
            hydra.main(version_base="1.3", config_path=str(conf_folder()), config_name="config")(_job)()
    except Exception as error:
        if _traced() or (_sweep is None and isinstance(error, HydraException | OmegaConfBaseException | OSError)):
            raise
        reason = in_one_line(error) or "no message"
        if _sweep is None:
            _fail(f"Hydra cannot compose this config: {type(error).__name__}: {reason}")
            return
        _fail(
            f"the sweep ended early with {type(error).__name__}: {reason}; "
            "what is finished is kept, and the same command goes on from there"
        )
    if _sweep is not None and _sweep.folder.is_dir() and _is_first:
        _summarise(_sweep)


def _summarise(sweep: Sweep) -> None:
    from gradsift.report.terminal import sweep_finished

    if not sweep_finished(_relative(sweep.folder), sweep.jobs):
        global _failed
        _failed = True


@contextmanager
def _hydra_raises() -> Iterator[None]:
    """Have Hydra raise its errors instead of printing several lines and leaving with code 1."""
    before = os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = before


def compose_config(overrides: Sequence[str]) -> Config:
    """Return the config of a run with these overrides, for callers in Python.

    Works inside another program's Hydra application too, and leaves its settings as they were.

    Raises:
        ConfigError: a group, an option or a value cannot be used; one line, as on the command line.
    """
    require_readable(overrides, conf_folder())
    Plugins.instance()  # the first call stores the settings of the plugins, which are to stay
    store, outer = ConfigStore.instance(), GlobalHydra.instance()
    repo, hydra_of_caller = copy.deepcopy(store.repo), outer.hydra
    outer.clear()
    try:
        register_schemas()
        with hydra.initialize_config_dir(str(conf_folder()), version_base="1.3"):
            return load_config(hydra.compose("config", overrides=list(overrides)))
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(in_one_line(error)) from None  # Hydra's own trace tells the caller nothing
    finally:
        store.repo = repo
        GlobalHydra.instance().hydra = hydra_of_caller


def in_one_line(error: Exception) -> str:
    """Hydra's composition errors without where it searched, and with the likeliest spelling."""
    message = f"{error}\n{error.__cause__ or ''}"
    kept = message.split("Config search path:")[0].split("full_key:")[0]
    text = " ".join(part.strip() for part in kept.splitlines() if part.strip() and "To append" not in part)
    if match := re.search(r"Could not override '([\w.]+)'\. Key '(\w+)' not in '(\w+)'", text):
        return _unknown_option(*match.groups())
    return text


def _unknown_option(option: str, key: str, schema: str) -> str:
    """That an option is not there, and what was meant: the likeliest spelling, or the choices that have it."""
    parts = option.split(".")[: option.split(".").index(key) + 1]
    group, place = parts[0], ".".join(parts[:-1])
    text = f"{'.'.join(parts)} is no option" + (f" of the {place} that is chosen" if place else "")
    known = _options_of(getattr(config_module, schema, None))
    if close := difflib.get_close_matches(key, known, n=1):
        return f"{text}; did you mean {close[0]}?"
    if having := [f"{group}={choice}" for choice, names in _choices(group).items() if key in names and len(parts) == 2]:
        return f"{text}; it is one of {', '.join(having)}"
    return f"{text}; known: {', '.join(known)}" if known else text


def _options_of(schema: Any) -> list[str]:
    return [field.name for field in fields(schema)] if is_dataclass(schema) else []


def _choices(group: str) -> dict[str, list[str]]:
    """The options of every choice of a group, by the schema that its file names."""
    found = {}
    for file in sorted((conf_folder() / group).glob("*.yaml")):
        if match := re.search(r"/schema/\w+@_here_: (\w+)", file.read_text(encoding="utf-8")):
            found[file.stem] = _options_of(config_module.SCHEMAS[group].get(match[1]))
    return found


def _job(composed: DictConfig) -> float | None:
    """One job of Hydra; a sweep's others go on whatever becomes of it."""
    if home := os.environ.get(HOME):  # a worker of a launcher may have been started elsewhere
        os.chdir(home)
    settings = HydraConfig.get()
    folder = _relative(Path(settings.runtime.output_dir))
    sweep = Path(settings.sweep.dir) if settings.mode == RunMode.MULTIRUN else None
    number = int(settings.job.num) + 1 if sweep else None
    overrides = [str(override) for override in settings.overrides.task]
    return attempt(lambda: load_config(composed), folder, overrides, sweep, number)


def _relative(folder: Path) -> Path:
    """The folder as seen from here, where it lies below: short to read, and no machine path in what is written."""
    return folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder


def replay(arguments: list[str]) -> None:
    """`--replay RUN`: the run again, with the config that its folder holds."""
    if len(arguments) != 1:
        _fail("--replay takes one run folder, as in: python run.py --replay outputs/DATE/TIME")
        return
    source = Path(arguments[0]) / CONFIG_FILE
    if not source.is_file():
        _fail(f"--replay {arguments[0]}: there is no {CONFIG_FILE}; give the folder of a run")
        return
    now = datetime.now()
    folder = Path("outputs") / now.strftime("%Y-%m-%d") / now.strftime("%H-%M-%S-%f")
    folder.mkdir(parents=True)

    def load() -> Config:
        try:
            dumped = yaml.safe_load(source.read_text(encoding="utf-8"))
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise ConfigError(f"{source} cannot be read ({str(error).splitlines()[0]})") from error
        if not isinstance(dumped, dict):
            raise ConfigError(f"{source} is not the config of a run")
        return restore_config(dumped)

    attempt(load, folder, [f"--replay {arguments[0]}"], None, None)


def attempt(load: Any, folder: Path, overrides: list[str], sweep: Path | None, number: int | None) -> float | None:
    """Run once and report; a failure is said in one line, noted in `run.json` and remembered for the exit code.

    Returns:
        The value of `objective`, for a search; None where there is none: a failure is no number.
    """
    global _is_first
    try:
        try:
            config = load()
            _is_first = leads(config.compute)
        finally:
            for name in _WRITTEN if _is_first else ():  # left by an earlier run in the same folder
                (folder / name).unlink(missing_ok=True)
        jobs = _sweep.jobs if _sweep is not None else None
        arguments = (config, folder, overrides, sweep, number, jobs)
        return execute(*arguments) if config.plan else on_all_ranks(config.compute, execute, *arguments)
    except GradsiftError as error:
        if _traced():
            raise
        _fail(str(error))
        _note_failure(folder, overrides, str(error))
    except Exception as error:
        if _traced():
            raise
        (folder / "error.txt").write_text(traceback.format_exc(), encoding="utf-8")
        reason = (str(error) or "no message").splitlines()[0]
        _fail(f"unexpected {type(error).__name__}: {reason} (a defect of gradsift; trace in {folder / 'error.txt'})")
        _note_failure(folder, overrides, f"{type(error).__name__}: {error}")
    return None


def execute(
    config: Config,
    folder: Path,
    overrides: list[str],
    sweep: Path | None,
    number: int | None,
    jobs: Sequence[Sequence[str]] | None,
) -> float | None:
    """Run one checked config and write its folder: run.json, config.yaml, metrics.jsonl, selection.jsonl.

    A rank that is not rank 0 takes part in the work and writes nothing.
    """
    from gradsift.pipeline import follow, plan, prepare, run, settings_of

    if not leads(config.compute):
        prepare(config)
        follow(config)
        return None
    from gradsift.report.terminal import RunView

    view = RunView(number, total=len(jobs) if jobs else None)
    view.starting(_own(overrides, jobs))
    from gradsift.artifacts import Store
    from gradsift.disk import guarded
    from gradsift.evaluation.judges import DryRun
    from gradsift.report.automatic import report_at_end
    from gradsift.run_record import RunRecord
    from gradsift.runtime import Runtime
    from gradsift.tracking import Tracker, group_of
    from gradsift.training.shared_store import SharedStore

    prepare(config)
    view.settings(settings_of(config))
    dumped = yaml.dump(dump_config(config), Dumper=_DUMPER, sort_keys=False, allow_unicode=True)
    (folder / CONFIG_FILE).write_text(dumped, encoding="utf-8")
    if config.plan:
        plan(config, view.display, folder, _about(config, overrides))
        view.planned(folder, in_sweep=sweep is not None)
        return None
    kind = SharedStore if config.compute.ranks > 1 else Store
    store = kind(Path(config.artifacts), view.display.say, view.stage_done, view.at_work)
    reports = config.report and sweep is None
    about = _about(config, overrides)
    group = group_of(sweep) if sweep else None
    with Tracker(config.tracker, folder, group, about) as tracker:
        record = RunRecord(folder, tracker, store, about)
        try:
            with guarded(store.root, "the run", nameless=False):
                run(config, Runtime(store, config.compute, view.display, config.seed), record)
        except DryRun as said:
            record.dry_run(str(said))
        except BaseException as error:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C would leave run.json and W&B half closed
            record.finish("failed" if isinstance(error, Exception) else "interrupted", str(error))
            if isinstance(error, Exception):
                signal.signal(signal.SIGINT, signal.default_int_handler)
                if reports and store.records and (report := report_at_end(folder, view.display)):
                    view.display.say(f"report: {report}")
            raise
        record.finish("stopped" if config.stop_after or record.ends_early else "finished")
    report = report_at_end(folder, view.display) if reports else None
    view.finished(folder, report, in_sweep=sweep is not None)
    return record.value_of(config.objective)


def _own(overrides: list[str], jobs: Sequence[Sequence[str]] | None) -> list[str]:
    """What tells a job from the others; all of it where the others are not known, or do not differ."""
    shared = set(jobs[0]).intersection(*jobs) if jobs else set()
    return [override for override in overrides if override not in shared] or overrides


def _about(config: Config, overrides: list[str]) -> dict[str, Any]:
    from gradsift.manifests import content_hash

    name = config.scorer_name if config.scorer_name == "full" else f"{config.scorer_name}-{config.alpha:g}"
    dumped = dump_config(config)
    for *path, last in _SEEDS:
        node = dumped
        for key in path:
            node = node[key]
        node.pop(last, None)
    return {
        "name": name,
        "variant": content_hash(dumped)[:12],  # the whole config but its seeds: what repeats share
        "overrides": overrides,
        "scorer": config.scorer_name,
        "alpha": config.alpha,
        "seed": config.seed,
        "data_seed": config.data.seed,
        "dataset": config.data.name,
        "proxy": config.proxy.name,
        "members": config.proxy.members,
        "snapshots": list(config.proxy.snapshots),
        "target": config.target.name,
        "judge": config.judge.name,
        "benchmark_sets": list(config.benchmark.sets),
    }


def _note_failure(folder: Path, overrides: list[str], error: str) -> None:
    """Write the `run.json` of a run that failed before it could, and the reason into one that another rank ended."""
    if not _is_first:
        return
    path = folder / "run.json"
    content = {"status": "failed", "overrides": overrides, "stages": [], "pws": None, "error": error}
    if path.exists():
        written = json.loads(path.read_text(encoding="utf-8"))
        if LOST not in written.get("error", ""):
            return
        content = written | {"error": error}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _error(message: str) -> None:
    print(f"error: {message}", file=sys.stderr, flush=True)


def _fail(message: str) -> None:
    global _failed
    _failed = True
    _error(message)


class SweepCheck(Callback):
    """Refuses a sweep with a job that cannot run, before anything is written."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        global _sweep
        try:
            sweep = begin(config, in_one_line)
        except Exception as error:
            problems = str(error) if isinstance(error, GradsiftError) else in_one_line(error)
            for problem in problems.splitlines():
                _fail(problem)
            _error("no job was started")
            raise SystemExit(2) from error  # Hydra makes a warning of every exception here, and begins the sweep
        fix_place(config)
        _sweep = sweep
