"""One run of the command line: its folder, its record, its report."""

from __future__ import annotations

import json
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from gradsift.artifacts import Store
from gradsift.config import Config, dump_config
from gradsift.config.data import HubDataConfig, JsonDataConfig, MixtureDataConfig
from gradsift.data.chat_templates import file_text, is_file
from gradsift.data.paths import require_files
from gradsift.launch import LOST, leads
from gradsift.run_folder import CONFIG_FILE, RUN_FILE
from gradsift.tracking import group_of
from gradsift.training.pins import require_chat_template, require_model

if TYPE_CHECKING:
    from gradsift.report.terminal import RunView

_WRITTEN = (RUN_FILE, "metrics.jsonl", "selection.jsonl", "audit.json", "error.txt")
_DUMPER = getattr(yaml, "CSafeDumper", yaml.SafeDumper)  # ten times as fast, if PyYAML was built with it
_SEEDS = (("seed",), ("data", "seed"), ("data", "corruption", "seed"), ("scorer", "seed"), ("selector", "seed"))


@dataclass(frozen=True)
class Job:
    """The folder and the overrides of one run of the command line, and its place in a sweep."""

    folder: Path
    overrides: list[str]
    sweep: Path | None = None  # folder of the sweep that the run belongs to
    number: int | None = None  # of the run in the sweep, counted from 1
    jobs: Sequence[Sequence[str]] | None = None  # overrides of all jobs of the sweep, if they are known

    @property
    def differences(self) -> list[str]:
        """The job's overrides that not all jobs of the sweep have; all of its overrides if every job has them."""
        shared = set(self.jobs[0]).intersection(*self.jobs) if self.jobs else set()
        return [override for override in self.overrides if override not in shared] or self.overrides

    def clear(self) -> None:
        """Delete what an earlier run in the same folder wrote."""
        for name in _WRITTEN:
            (self.folder / name).unlink(missing_ok=True)

    def failed(self, error: str) -> None:
        """Write `run.json` for a run that failed before it wrote one.

        An existing `run.json` is kept. If its error only says that another rank was lost, `error` replaces that text.
        """
        path = self.folder / RUN_FILE
        content = {"status": "failed", "overrides": self.overrides, "stages": [], "pws": None, "error": error}
        if path.exists():
            written = json.loads(path.read_text(encoding="utf-8"))
            if LOST not in written.get("error", ""):
                return
            content = written | {"error": error}
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def execute(config: Config, job: Job) -> float | None:
    """Run one checked config and write its folder: run.json, config.yaml, metrics.jsonl, selection.jsonl.

    Ranks other than 0 take part in the work of a run, not in a plan, and write nothing to the folder.

    Returns:
        The value of `config.objective`, for a search; None without such a value, for a plan and on other ranks.
    """
    _require_files(config)
    from gradsift.pipeline import follow, plan, prepare, run, settings_of

    if not leads(config.compute):
        if not config.plan:
            prepare(config.compute)
            follow(config)
        return None
    from gradsift.report.terminal import RunView

    view = RunView(job.number, total=len(job.jobs) if job.jobs else None)
    view.starting(job.differences)
    from gradsift.disk import guarded
    from gradsift.evaluation.judges import DryRun
    from gradsift.report.automatic import report_at_end
    from gradsift.run_record import RunRecord
    from gradsift.runtime import Runtime
    from gradsift.tracking import Tracker

    prepare(config.compute, joins=not config.plan)
    view.settings(settings_of(config))
    about = _about(config, job.overrides)
    (job.folder / CONFIG_FILE).write_text(_as_yaml(config), encoding="utf-8")
    if config.plan:
        plan(config, view.display, job.folder, about)
        view.planned(job.folder, in_sweep=job.sweep is not None)
        return None
    store = _store(config, view)
    reports = config.report and job.sweep is None
    with Tracker(config.tracker, job.folder, group_of(job.sweep) if job.sweep else None, about) as tracker:
        record = RunRecord(job.folder, tracker, store, about)
        try:
            with guarded(store.root, "the run", nameless=False):
                run(config, Runtime(store, config.compute, view.display, config.seed), record)
        except DryRun as ending:
            record.dry_run(str(ending))
        except BaseException as error:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C would leave run.json and W&B unfinished
            record.finish("failed" if isinstance(error, Exception) else "interrupted", str(error))
            if isinstance(error, Exception):
                signal.signal(signal.SIGINT, signal.default_int_handler)
                if reports and store.records and (report := report_at_end(job.folder, view.display)):
                    view.display.say(f"report: {report}")
            raise
        record.finish("stopped" if config.stop_after or record.ends_early else "finished")
    report = report_at_end(job.folder, view.display) if reports else None
    if config.export.push_to_hub is not None:
        from gradsift.hub_push import push

        view.display.say(f"the selection is at {push(config, job.folder)}")
    view.finished(job.folder, report, in_sweep=job.sweep is not None)
    return record.value_of(config.objective)


def _as_yaml(config: Config) -> str:
    dumped: str = yaml.dump(dump_config(config), Dumper=_DUMPER, sort_keys=False, allow_unicode=True)
    return dumped


def _store(config: Config, view: RunView) -> Store:
    """Return the store, which reports each stage to the view."""
    from gradsift.training.shared_store import SharedStore

    kind = SharedStore if config.compute.ranks > 1 else Store
    return kind(Path(config.artifacts), view.display.say, view.stage_done, view.at_work)


def _require_files(config: Config) -> None:
    """Raise if a file, model or dataset that an option names is missing, or if the token for a push is not accepted.

    Called before the slow imports.
    """
    data = config.data
    if isinstance(data, JsonDataConfig):
        require_files(data.path)
    if isinstance(data, MixtureDataConfig):
        for name, source in data.sources.items():
            if source.path is not None:
                require_files(source.path, f"data.sources.{name}")
    for template in (config.proxy.template, config.target.template):
        if is_file(template):
            file_text(template)
    for model in config.models:
        require_model(Store(Path(config.artifacts)), model)
    shown = {
        "proxy": (config.proxy.model, config.proxy.template),
        "target": (config.target.model, config.target.template),
    }
    for name, (model, template) in shown.items():
        if template == "chat" and any(model is used for used in config.models):
            require_chat_template(model, f"{name}.template")
    if data.scores is not None:
        from gradsift.scoring.published import require_scores

        require_scores(Path(data.scores))
    if isinstance(data, HubDataConfig) and leads(config.compute):  # after the checks that need no network
        from gradsift.data.load import require_dataset

        require_dataset(Store(Path(config.artifacts)), data)
    if config.export.push_to_hub is not None and not config.plan and leads(config.compute):
        from gradsift.hub_push import require_access

        require_access(config.export.push_to_hub)


def _about(config: Config, overrides: list[str]) -> dict[str, Any]:
    """Return the settings that identify a run, in `run.json` and in the tracker."""
    from gradsift.manifests import content_hash

    name = config.scorer_name if config.scorer_name == "full" else f"{config.scorer_name}-{config.alpha:g}"
    dumped = dump_config(config)
    for *path, last in _SEEDS:
        node = dumped["values"]
        for key in path:
            node = node[key]
        node.pop(last, None)
    return {
        "name": name,
        "variant": content_hash(dumped)[:12],  # hash of the config without its seeds, equal for all repeats
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
