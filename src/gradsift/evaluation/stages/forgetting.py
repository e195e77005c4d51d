"""Measure what a model forgets in a finetune, by its results on general sets and lm-eval's tasks before and after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from gradsift.artifacts import Artifact
from gradsift.config import BenchmarkConfig, GeneratorConfig, TargetConfig
from gradsift.data.tokens import template_identity
from gradsift.evaluation.benchmarks import Item
from gradsift.evaluation.lm_harness import evaluate_tasks
from gradsift.evaluation.stages.answers import generate, slug_of
from gradsift.evaluation.stages.losses import reference_losses
from gradsift.evaluation.stages.metrics import metrics, metrics_of
from gradsift.evaluation.text_metrics import change
from gradsift.manifests import file_hash
from gradsift.runtime import Runtime
from gradsift.training.divided import divides
from gradsift.training.merging import load_to_answer

LM_EVAL_VERSION = 2


class General(NamedTuple):
    """A model's results on general sets and lm-eval's tasks. Results that the config does not ask for are None.

    `metrics` is also None if no item has a reference answer.
    """

    metrics: Artifact | None
    losses: Artifact | None
    tasks: Artifact | None


def forgetting(
    runtime: Runtime,
    config: BenchmarkConfig,
    target_config: TargetConfig,
    target: Artifact,
    tuned: Artifact,
    items: Sequence[Item],
    generator: GeneratorConfig | None = None,
) -> tuple[General, General]:
    """Return the target's results on general sets and lm-eval's tasks, before and after the finetune.

    Args:
        items: the items of the sets in `benchmark.general`.
        generator: names the endpoint that computes the answers (see `generate`).
    """

    def state(model: Artifact | None) -> General:
        measured = losses = tasks = None
        if items:
            answers = generate(runtime, config, target_config, target, model, items, generator)
            measured = metrics(runtime, config, answers, items)
            losses = reference_losses(runtime, target_config, target, model, items)
        if config.lm_eval_tasks:
            tasks = _lm_eval(runtime, config, target_config, target, model)
        return General(measured, losses, tasks)

    return state(None), state(tuned)


def forgetting_of(states: tuple[General, General]) -> dict[str, Any]:
    """Return the results of `forgetting` as JSON values.

    Returns:
        `{set: {"before", "after", "change"}}`. Each of the three has the metrics and, where available, `loss`: the mean
        over items of the mean NLL per token of the reference answer (nats). The results of a task of lm-eval are under
        the key `lm_eval/<task>`.
    """

    def values_of(state: General) -> dict[str, dict[str, Any]]:
        measured = metrics_of(state.metrics) or {"benchmarks": {}}
        losses = {} if state.losses is None else state.losses.info["losses"]
        sets = {name: {**values, "loss": losses.get(name)} for name, values in measured["benchmarks"].items()}
        tasks = {} if state.tasks is None else state.tasks.info["tasks"]
        return sets | {f"lm_eval/{task}": values for task, values in tasks.items()}

    before, after = (values_of(state) for state in states)
    return {
        name: {"before": before[name], "after": after[name], "change": change(before[name], after[name])}
        for name in before
    }


def _lm_eval(
    runtime: Runtime, config: BenchmarkConfig, target_config: TargetConfig, target: Artifact, tuned: Artifact | None
) -> Artifact:
    settings: dict[str, Any] = {"tasks": list(config.lm_eval_tasks), "limit": config.limit}
    settings |= {"template": template_identity(target_config.template), "max_new_tokens": config.max_new_tokens}
    settings["package"] = metadata.version("lm-eval")  # tasks change from release to release
    if config.lm_eval_folder is not None:
        files = sorted(file for file in Path(config.lm_eval_folder).rglob("*") if file.is_file())
        settings["folder"] = {str(file.relative_to(config.lm_eval_folder)): file_hash(file) for file in files}

    def make(folder: Path) -> Mapping[str, Any]:
        model = load_to_answer(runtime, target_config, target, tuned)
        plain: Any = model.model
        plain = plain.get_base_model() if hasattr(plain, "get_base_model") else plain  # it includes the LoRA layers
        options: dict[str, Any] = {"folder": config.lm_eval_folder, "limit": config.limit}
        options |= {"template": target_config.template, "max_new_tokens": config.max_new_tokens}
        options["max_tokens"] = runtime.compute.tokens
        tasks = evaluate_tasks(plain, model.tokenizer, config.lm_eval_tasks, batch_size=config.batch_size, **options)
        return {"rows": len(tasks), "tasks": tasks}

    parents, slug = [target, *([tuned] if tuned else [])], slug_of(target_config, tuned)
    # in a divided model a forward pass needs all ranks, and lm-eval divides no requests, so every rank runs all
    unit = ("lm_eval", slug, settings, parents, make)
    return runtime.store.obtain(*unit, version=LM_EVAL_VERSION, divided=divides(runtime.compute))
