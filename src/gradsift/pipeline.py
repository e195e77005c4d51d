"""The stages of a run, in the order of the paper (GRADFILTERING, arXiv 2601.13697).

    examples -> proxy ensemble -> gradient statistics -> scores -> selection
             -> finetune -> answers -> judgments in both orders -> pairwise winning score (PWS)

`run` calls the stages in this order. A stage finds its artifact in the store or makes it. The ensemble, the statistics
and other inputs of a scorer are computed only if the chosen scorer asks for them.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

from rich.console import Console

from gradsift.artifacts import NotMade
from gradsift.config import ComputeConfig, Config, VerifiableDataConfig
from gradsift.disk import guarded
from gradsift.evaluation.stages.judging import judge, pws
from gradsift.forecast import forecast
from gradsift.line import Line
from gradsift.planning import Planner
from gradsift.report.plans import write_plan
from gradsift.run_record import RunRecord
from gradsift.runtime import Display, Runtime
from gradsift.scoring.stage import score
from gradsift.training.backbones import quieten
from gradsift.training.device import device_of
from gradsift.training.numerics import dtype_of, rounds_to_tf32, set_kernels, set_threads, threads_in_words
from gradsift.training.parallel import RunEnded, SharedStore, join


def run(config: Config, runtime: Runtime, record: RunRecord) -> None:
    """Run the stages up to `config.stop_after`, and add the results of each stage to `record`."""
    line = Line(config, runtime)
    record.loaded(line.loaded)
    if config.stop_after == "load":
        return
    line.check()
    if config.stop_after == "statistics":
        # the statistics need the norms of all shards, so a job that collects one shard ends without them
        if config.proxy.shard is None:
            _ = line.statistics
        else:
            record.collected(config.proxy, line.collect_shard())
        record.ensemble(line.adapters)
        return
    scored = score(runtime, line.scorer, line.loaded, line.sources, line.diagnose)
    record.scored(scored)
    record.refused("proxy", line.refused)
    # `line.adapters` would train an ensemble that the scorer did not ask for
    if line.has_ensemble:
        record.ensemble(line.adapters)
    if config.stop_after == "scores":
        return
    selection = line.select(scored)
    record.selected(selection, line.loaded)
    record.exported(partial(line.export, selection))
    if config.audit.enabled:
        record.audited(line.audit(scored))
    if config.stop_after == "selection":
        return
    tuned = line.finetune(selection)
    record.finetuned(tuned, line.heldout_loss(tuned))
    if config.export.merged:
        record.exported(partial(line.merge, tuned))
    if config.stop_after == "finetune":
        return
    answers = line.answers(tuned)
    record.answered(line.metrics(answers))
    if config.benchmark.general or config.benchmark.lm_eval_tasks:
        record.forgot(line.forgetting(tuned))
    if config.stop_after == "generate":
        return
    if line.keeps_all:  # the model is the full-data reference itself, so its PWS is 1 by definition
        record.is_reference()
    else:
        reference = line.finetune(line.everything())
        reference_answers = line.answers(reference)
        judged = judge(runtime, config.judge, config.benchmark, answers, reference_answers)
        record.judged(pws(runtime, config.judge, judged, answers, reference_answers), judged)
        record.compared("reference", line.heldout_loss(reference), line.metrics(reference_answers))
    # the untuned target shows whether the finetunes helped at all
    checkable = any(item.reference is not None for item in line.items)
    record.compared("untuned", line.heldout_loss(None), line.metrics(line.answers(None)) if checkable else None)


class _NoRecord:
    """Stands in for the `RunRecord` of a run that is not recorded: every method does nothing."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *values: None


def plan(config: Config, display: Display, folder: Path, about: Mapping[str, Any]) -> None:
    """Walk through the stages without a change to the store; list finished and missing units of work in `run.json`."""
    planner = Planner(Path(config.artifacts), display.say)
    runtime = Runtime(planner, config.compute, display, config.seed)
    ends = None
    try:
        with guarded(planner.store, "the plan", nameless=False):
            walk(config, runtime)
    except NotMade as missing:
        ends = str(missing)
    finetunes = forecast(Line(config, runtime)) if config.reaches("finetune") else None
    write_plan(folder, about, planner, ends, finetunes)


def walk(config: Config, runtime: Runtime) -> None:
    """Run the stages without a record, so that the store is asked for every unit of the run."""
    run(config, runtime, cast(RunRecord, _NoRecord()))


def follow(config: Config) -> None:
    """Run the stages on a rank other than 0.

    The rank takes part in the stages that divide their work among the ranks.
    """
    with Path(os.devnull).open("w") as nowhere:
        display = Display(Console(file=nowhere))
        with contextlib.suppress(RunEnded):
            # All ranks must ask this store for the same units in the same order. If a rank asks for another unit, the
            # store raises an error, because a collective call that only some ranks enter never returns.
            store = SharedStore(Path(config.artifacts), display.say)
            walk(config, Runtime(store, config.compute, display, config.seed))


def prepare(compute: ComputeConfig, *, joins: bool = True) -> None:
    """Set up torch and transformers for this process, and let it join the other ranks if `joins` (False for a plan)."""
    quieten()
    set_threads(compute)
    set_kernels(compute)
    device_of(compute)  # raises if the device does not exist
    if joins:
        join(compute)


def settings_of(config: Config) -> list[tuple[str, str]]:
    """Return the settings to print when a run starts, as (name, value).

    The settings of stages that the run does not reach are left out.
    """
    proxy, target, data = config.proxy, config.target, config.data
    rows = f", {data.size:,} rows" if isinstance(data, VerifiableDataConfig) else ""
    length = f"{target.steps} steps" if target.steps else f"{target.epochs} epochs"
    snapshots = ",".join(map(str, proxy.snapshots))
    members = f"{proxy.members} members by {proxy.ensemble}"
    general = [*config.benchmark.general, *(f"lm_eval/{task}" for task in config.benchmark.lm_eval_tasks)]
    exports = [*config.export.formats, *(["merged"] if config.export.merged else [])]
    exports += [f"to the hub as {config.export.push_to_hub}"] if config.export.push_to_hub else []
    precision = str(dtype_of(config.compute)).removeprefix("torch.")
    precision += " (TF32 for what stays float32)" if rounds_to_tf32(config.compute) else ""
    settings = {
        "data": f"{data.name}{rows}" + (f", at most {data.limit:,}" if data.limit else ""),
        "scorer": config.scorer_name,
        "proxy": f"{proxy.name}, {members}, snapshots {snapshots}, collect={proxy.collect}",
        "selection": "all rows" if config.scorer_name == "full" else f"{config.alpha:g} of the rows",
        "target": f"{target.name}, LoRA rank {target.lora.rank}, {length}" if config.reaches("finetune") else None,
        "benchmark": ", ".join(config.benchmark.sets) if config.reaches("generate") else None,
        "forgetting": ", ".join(general) if config.reaches("generate") else None,
        "export": ", ".join(exports),
        "judge": config.judge.name if config.reaches("judge") or config.has_rater else None,
        "compute": f"{device_of(config.compute)}, {precision}, {threads_in_words(config.compute)}",
        "artifacts": config.artifacts,
        "stop after": config.stop_after,
    }
    return [(name, value) for name, value in settings.items() if value]
