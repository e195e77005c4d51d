"""Executes one run of the command line, and writes the run's folder: its config, record and report."""

from __future__ import annotations

import json
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from gradsift.artifacts import Store
from gradsift.config import AdaptedModelConfig, Config, dump_config
from gradsift.config.data import HubDataConfig, JsonDataConfig, MixtureDataConfig
from gradsift.data.chat_templates import file_text, is_file
from gradsift.data.files import require_files
from gradsift.launch import LOST, leads
from gradsift.manifests import content_hash
from gradsift.run_folder import CONFIG_FILE, RUN_FILE
from gradsift.tracking import group_of
from gradsift.training.pins import require_chat_template, require_model

_WRITTEN = (RUN_FILE, "metrics.jsonl", "selection.jsonl", "audit.json", "error.txt")
_DUMPER = getattr(yaml, "CSafeDumper", yaml.SafeDumper)  # ten times as fast, if PyYAML was built with it


@dataclass(frozen=True)
class Job:
    """The folder and the overrides of one run of the command line, and the run's place in a sweep."""

    folder: Path
    overrides: list[str]
    sweep: Path | None = None  # folder of the sweep that the run belongs to
    number: int | None = None  # of the run in the sweep, counted from 1
    jobs: Sequence[Sequence[str]] | None = None  # overrides of all jobs of the sweep, if they are known

    @property
    def differences(self) -> list[str]:
        """The job's overrides that not all jobs of the sweep have; if there are none, all overrides of the job."""
        shared = set(self.jobs[0]).intersection(*self.jobs) if self.jobs else set()
        return [override for override in self.overrides if override not in shared] or self.overrides

    def clear(self) -> None:
        """Delete the records and results that an earlier run wrote to the same folder (the files `_WRITTEN`)."""
        for name in _WRITTEN:
            (self.folder / name).unlink(missing_ok=True)

    def failed(self, error: str) -> None:
        """Write `run.json` for a run that failed before it wrote one.

        An existing `run.json` is kept. If its error only says that another rank was lost, `error` replaces that error.
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
    """Run one checked config, write the run's folder, and return the value of `config.objective`.

    Ranks other than 0 take part in the work of a run, but not in a plan, and write nothing to the folder. The value is
    None on these ranks, for a plan, and if the run did not measure the objective.
    """
    _require_files(config)
    from gradsift.pipeline import follow, plan, prepare, run, settings_of

    if not leads(config.compute):
        if not config.plan:
            prepare(config.compute)
            follow(config)
        return None
    from gradsift.report.terminal import RunView, report_at_end

    view = RunView(job.number, total=len(job.jobs) if job.jobs else None)
    view.starting(job.differences)
    from gradsift.disk import guarded
    from gradsift.evaluation.judges import DryRun
    from gradsift.run_record import RunRecord
    from gradsift.runtime import Runtime
    from gradsift.tracking import Tracker
    from gradsift.training.parallel import SharedStore

    prepare(config.compute, joins=not config.plan)
    view.settings(settings_of(config))
    about = _about(config, job.overrides)
    with (job.folder / CONFIG_FILE).open("w", encoding="utf-8") as stream:
        yaml.dump(dump_config(config), stream, Dumper=_DUMPER, sort_keys=False, allow_unicode=True)
    if config.plan:
        plan(config, view.display, job.folder, about)
        view.planned(job.folder)
        return None
    kind = SharedStore if config.compute.ranks > 1 else Store
    store = kind(Path(config.artifacts), view.display.say, view.stage_done, view.at_work)
    reports = config.report and job.sweep is None
    with Tracker(config.tracker, job.folder, group_of(job.sweep) if job.sweep else None, about) as tracker:
        record = RunRecord(job.folder, tracker, store, about)
        try:
            with guarded(store.root, "the run", nameless=False):
                run(config, Runtime(store, config.compute, view.display, config.seed), record)
        except DryRun as ending:
            record.values["dry_run"] = str(ending)  # the requests that would have been sent
        except BaseException as error:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C would leave run.json and W&B unfinished
            record.finish("failed" if isinstance(error, Exception) else "interrupted", str(error))
            if isinstance(error, Exception):
                signal.signal(signal.SIGINT, signal.default_int_handler)
                if reports and store.records and (report := report_at_end(job.folder, view.display)):
                    view.display.say(f"report: {report}")
            raise
        record.finish("stopped" if config.stop_after or "dry_run" in record.values else "finished")
    report = report_at_end(job.folder, view.display) if reports else None
    if config.export.push_to_hub is not None:
        from gradsift.hub_push import push

        view.display.say(f"the selection is at {push(config, job.folder)}")
    view.finished(job.folder, report)
    return record.value_of(config.objective)


def _require_files(config: Config) -> None:
    """Raise an error if a file, model, dataset or chat template is missing, or if the hub refuses the token.

    `execute` calls this before it imports `gradsift.pipeline`, which is slow.
    """
    data = config.data
    if isinstance(data, JsonDataConfig):
        require_files(data.path)
    if isinstance(data, MixtureDataConfig):
        for name, source in data.sources.items():
            if source.path is not None:
                require_files(source.path, f"data.sources.{name}")
    adapted: dict[str, AdaptedModelConfig] = {"proxy": config.proxy, "target": config.target}
    for group in adapted.values():
        if is_file(group.template):
            file_text(group.template)
    for model in config.models:
        require_model(Store(Path(config.artifacts)), model)
    for name, group in adapted.items():
        if group.template == "chat" and any(group.model is used for used in config.models):
            require_chat_template(group.model, f"{name}.template")
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
    """Return the settings by which `run.json` and the tracker identify a run."""
    name = config.scorer_name if config.scorer_name == "full" else f"{config.scorer_name}-{config.alpha:g}"
    dumped = dump_config(config)
    values = dumped["values"]
    for group in (values, values["data"], values["data"]["corruption"], values["scorer"], values["selector"]):
        group.pop("seed", None)
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
