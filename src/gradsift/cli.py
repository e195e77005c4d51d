"""The command line: `python run.py`, or `gradsift` where it is installed.

Hydra composes the config, `load_config` checks it, and only then is anything heavy imported. A
problem that the user can mend ends as one line and exit code 2; in a sweep the other jobs go on.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from datetime import datetime
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from gradsift.config import Config, dump_config, load_config, register_schemas, restore_config
from gradsift.errors import ConfigError, GradsiftError

CONFIG_FILE = "config.yaml"
_failed = False  # whether any job of this process failed


def conf_folder() -> Path:
    """`conf/` inside an installed package, or beside `src/` in a checkout."""
    inside = Path(__file__).parent / "conf"
    return inside if inside.is_dir() else Path(__file__).parents[2] / "conf"


def main() -> None:
    """Entry point of `run.py` and of the console script."""
    os.environ.setdefault("HYDRA_MAIN_MODULE", "gradsift.cli")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    register_schemas()
    arguments = sys.argv[1:]
    try:
        if arguments in (["--help"], ["-h"]):
            print((conf_folder() / "help.txt").read_text(encoding="utf-8"), end="")
        elif arguments[:1] == ["--replay"]:
            replay(arguments[1:])
        else:
            hydra.main(version_base="1.3", config_path=str(conf_folder()), config_name="config")(_job)()
    except KeyboardInterrupt:
        _error("interrupted; what is finished is kept, and the same command goes on from there")
        sys.exit(130)
    if _failed:
        sys.exit(2)


def _job(composed: DictConfig) -> float | None:
    """One job of Hydra; a sweep's others go on whatever becomes of it."""
    settings = HydraConfig.get()
    folder = _relative(Path(settings.runtime.output_dir))
    sweep = Path(settings.sweep.dir).name if settings.mode == RunMode.MULTIRUN else None
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
        dumped = OmegaConf.to_container(OmegaConf.load(source))
        if not isinstance(dumped, dict):
            raise ConfigError(f"{source} is not the config of a run")
        return restore_config(dumped)  # type: ignore[arg-type]

    attempt(load, folder, [f"--replay {arguments[0]}"], None, None)


def attempt(load: Any, folder: Path, overrides: list[str], sweep: str | None, number: int | None) -> float | None:
    """Run once and report; a failure is said in one line, noted in `run.json` and remembered for the exit code.

    Returns:
        The pooled PWS, for Hydra's sweepers that search; None where there is none.
    """
    try:
        config = load()
        return execute(config, folder, overrides, sweep, number)
    except GradsiftError as error:
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        _fail(str(error))
        _note_failure(folder, overrides, str(error))
    except Exception as error:
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        (folder / "error.txt").write_text(traceback.format_exc(), encoding="utf-8")
        _fail(f"unexpected {type(error).__name__}: {error} (a defect of gradsift; trace in {folder / 'error.txt'})")
        _note_failure(folder, overrides, f"{type(error).__name__}: {error}")
    return None


def execute(config: Config, folder: Path, overrides: list[str], sweep: str | None, number: int | None) -> float | None:
    """Run one checked config and write its folder: run.json, config.yaml, metrics.jsonl, selection.jsonl."""
    from gradsift.report.terminal import RunView

    view = RunView(number)
    view.starting(overrides)
    from gradsift.artifacts import Store
    from gradsift.pipeline import plan_of, prepare, run
    from gradsift.report.results import Results
    from gradsift.runtime import Runtime
    from gradsift.tracking import Tracker

    prepare(config)
    view.plan(plan_of(config))
    (folder / CONFIG_FILE).write_text(OmegaConf.to_yaml(OmegaConf.create(dump_config(config))), encoding="utf-8")
    store = Store(Path(config.artifacts), view.display.say, view.stage_done)
    results = Results(folder)
    about = _about(config, overrides)
    started = time.perf_counter()
    with Tracker(config.tracker, folder, sweep, about) as tracker:
        try:
            run(config, Runtime(store, config.compute, view.display, config.seed), results)
        except BaseException as error:
            about["seconds"] = round(time.perf_counter() - started, 3)
            status = "failed" if isinstance(error, Exception) else "interrupted"
            results.write(status, store, about, str(error) or type(error).__name__)
            raise
        about["seconds"] = round(time.perf_counter() - started, 3)
        results.write("stopped" if config.stop_after else "finished", store, about)
        results.track(tracker)
    view.finished(folder, in_sweep=sweep is not None)
    pws = results.values.get("pws")
    return None if pws is None else float(pws)


def _about(config: Config, overrides: list[str]) -> dict[str, Any]:
    name = config.scorer_name if config.scorer_name == "full" else f"{config.scorer_name}-{config.alpha:g}"
    return {
        "name": name,
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
    """A `run.json` for a run that failed before it could write its own."""
    path = folder / "run.json"
    if not path.exists():
        content = {"status": "failed", "overrides": overrides, "stages": [], "pws": None, "error": error}
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _error(message: str) -> None:
    print(f"error: {message}", file=sys.stderr, flush=True)


def _fail(message: str) -> None:
    global _failed
    _failed = True
    _error(message)


class SweepSummary(Callback):
    """Ends a sweep with one table over its jobs, and a non-zero exit code if one of them failed."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        from gradsift.report.terminal import sweep_finished

        folder = _relative(Path(config.hydra.sweep.dir))
        if not sweep_finished(folder):
            global _failed
            _failed = True
