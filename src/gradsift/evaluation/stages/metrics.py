"""The stages `metrics` and `lm_eval`, which evaluate a model without a judge, and the resulting forgetting.

Forgetting is the change of a model's results on general benchmarks from before to after the finetuning. lm-eval
(EleutherAI's evaluation harness, an optional extra) runs its tasks on the model in memory.
"""

from __future__ import annotations

import functools
import importlib.util
import json
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from gradsift.artifacts import Artifact
from gradsift.config import BenchmarkConfig, GeneratorConfig, TargetConfig
from gradsift.data.tokens import encode_prompt, template_identity
from gradsift.errors import ConfigError, DataError, GradsiftError, first_line
from gradsift.evaluation.benchmarks import Item
from gradsift.evaluation.generation import OUTPUTS_FILE, generate_answers, read_model_outputs
from gradsift.evaluation.stages.answers import generate, slug_and_parents
from gradsift.evaluation.stages.losses import reference_losses
from gradsift.evaluation.text_metrics import change, check_wordnet, measure, read_wordnet
from gradsift.manifests import file_hash
from gradsift.runtime import Runtime
from gradsift.training.parallel import divides
from gradsift.training.target import load_to_answer

VERSION = 1
LM_EVAL_VERSION = 2
METRICS_FILE = "metrics.json"


def check_metrics(config: BenchmarkConfig) -> None:
    """Raise an error if a metric of the run cannot be computed: a file or package is missing, or a task is unknown."""
    check_wordnet(config.wordnet_dir)
    tasks, folder = list(config.lm_eval_tasks), config.lm_eval_folder
    if folder is not None and not Path(folder).is_dir():
        raise DataError(f"benchmark.lm_eval_folder={folder} is not a folder; name a folder with tasks of lm-eval")
    if not tasks:
        return
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(
            f"benchmark.lm_eval_tasks={tasks} needs the package lm-eval; install it with pip install -e '.[lm-eval]'"
        )
    known = _known(_manager(tuple(tasks), folder))
    if unknown := [task for task in tasks if task not in known]:
        raise ConfigError(
            f"benchmark.lm_eval_tasks={unknown} is no task or group of lm-eval; take one that `lm_eval ls tasks` "
            "lists, or name a folder with tasks of your own in benchmark.lm_eval_folder"
        )


def metrics(runtime: Runtime, config: BenchmarkConfig, answers: Artifact, items: Sequence[Item]) -> Artifact | None:
    """Compute the metrics of `gradsift.evaluation.text_metrics` for a model's answers to `items`.

    Args:
        answers: the artifact of the stage `generate` that has the answers.

    Returns:
        The artifact, which `metrics_of` reads; None if no item has a reference answer.
    """
    asked = sorted({item.benchmark for item in items if item.reference is not None})
    if not asked:
        return None
    wordnet = check_wordnet(config.wordnet_dir)
    settings = {
        "match": {name: config.match_of(name) for name in asked},
        "wordnet": None if wordnet is None else [file_hash(file) for file in sorted(wordnet.glob("data.*"))],
    }

    def make(folder: Path) -> Mapping[str, Any]:
        rows = read_model_outputs(answers.file(OUTPUTS_FILE))
        with runtime.display.task(f"metrics of {len(rows):,} answers", None):
            values = measure(rows, config.match_of, None if wordnet is None else read_wordnet(wordnet))
        (folder / METRICS_FILE).write_text(json.dumps(values, indent=1, allow_nan=False), encoding="utf-8")
        return {"rows": values["pooled"]["items"]}

    slug = answers.path.name.rsplit("-", 1)[0]
    return runtime.store.obtain("metrics", slug, settings, [answers], make, version=VERSION)


def metrics_of(made: Artifact | None) -> dict[str, Any] | None:
    """Return the values in the artifact `made`, which `metrics` returned; None if `made` is None."""
    return None if made is None else json.loads(made.file(METRICS_FILE).read_text(encoding="utf-8"))


class General(NamedTuple):
    """Artifacts with a model's metrics and losses on general benchmarks, and with its results on tasks of lm-eval.

    An artifact is None if it was not computed.
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
    generator: GeneratorConfig,
) -> tuple[General, General]:
    """Return the results of the model before the finetuning (`target`) and after the finetuning (`tuned`).

    `items` are the questions of the benchmarks in `benchmark.general`.
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
    """Return `{name: {"before", "after", "change"}}` for each benchmark and, as `lm_eval/<task>`, for each task.

    `before`, `after` and `change` are mappings from the names of figures to values. The figures of a benchmark are its
    metrics and `loss`: the mean over items of the mean negative log-likelihood per token of the reference answer, in
    nats. `change` has the value after minus the value before, without figures that are missing or None before or after.
    """

    def values_of(state: General) -> dict[str, dict[str, Any]]:
        measured = metrics_of(state.metrics) or {"benchmarks": {}}
        losses = {} if state.losses is None else state.losses.info["losses"]
        sets = {name: {**values, "loss": losses.get(name)} for name, values in measured["benchmarks"].items()}
        tasks = {} if state.tasks is None else state.tasks.info["tasks"]
        return sets | {f"lm_eval/{task}": values for task, values in tasks.items()}

    before, after = map(values_of, states)
    return {
        name: {"before": before[name], "after": after[name], "change": change(before[name], after[name])}
        for name in before
    }


def _lm_eval(
    runtime: Runtime, config: BenchmarkConfig, target_config: TargetConfig, target: Artifact, tuned: Artifact | None
) -> Artifact:
    settings: dict[str, Any] = {
        "tasks": list(config.lm_eval_tasks),
        "limit": config.limit,
        "template": template_identity(target_config.template),
        "max_new_tokens": config.max_new_tokens,
        "package": metadata.version("lm-eval"),  # tasks can change with each release
    }
    if config.lm_eval_folder is not None:
        files = sorted(file for file in Path(config.lm_eval_folder).rglob("*") if file.is_file())
        settings["folder"] = {str(file.relative_to(config.lm_eval_folder)): file_hash(file) for file in files}

    def make(folder: Path) -> Mapping[str, Any]:
        loaded = load_to_answer(runtime, target_config, target, tuned)
        model: Any = loaded.model
        plain = model.get_base_model() if hasattr(model, "get_base_model") else model  # still has the LoRA layers
        tasks = evaluate_tasks(plain, loaded.tokenizer, config, target_config.template, runtime.compute.tokens)
        return {"rows": len(tasks), "tasks": tasks}

    slug, parents = slug_and_parents(target_config, target, tuned)
    # a forward pass of a divided model needs all ranks, so every rank runs all requests
    divided = divides(runtime.compute)
    return runtime.store.obtain("lm_eval", slug, settings, parents, make, version=LM_EVAL_VERSION, divided=divided)


def evaluate_tasks(
    model: Any, tokenizer: Any, config: BenchmarkConfig, template: str, max_tokens: int | None
) -> dict[str, dict[str, float]]:
    """Return every figure that lm-eval reports for each task.

    The number of few-shot examples is the one in the task's definition. In tasks with generated answers (IFEval,
    GSM8K), the model answers as in the stage `generate`: greedily, with each prompt as an instruction in the target's
    `template`. All other tasks compare log-probabilities of plain text.

    Args:
        config: names the tasks, and limits the number of items per task and the number of tokens per answer. A task can
            set a lower limit for the tokens of its answers.
        max_tokens: the largest number of tokens per batch of generated answers, including padding.

    Returns:
        `{task: {figure: value}}` on the first rank of each machine; an empty dict on all other ranks.

    Raises:
        GradsiftError: a task needs a missing package or missing data, samples its answers or has no figures.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    tasks = list(config.lm_eval_tasks)
    option = f"benchmark.lm_eval_tasks={tasks}"
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=config.batch_size)
    for kind in ("loglikelihood", "loglikelihood_rolling"):
        setattr(wrapped, kind, functools.partial(getattr(wrapped, kind), disable_tqdm=True))
    wrapped.generate_until = functools.partial(_answers, model, tokenizer, config, template, max_tokens)
    settings: dict[str, Any] = {"limit": config.limit, "bootstrap_iters": 0, "log_samples": False}
    try:
        manager = _manager(tuple(tasks), config.lm_eval_folder)
        report = simple_evaluate(model=wrapped, tasks=tasks, task_manager=manager, **settings)
    except ImportError as error:
        raise ConfigError(
            f"{option}: a task needs the package {error.name}; install it (pip install -e '.[lm-eval]' installs those "
            "of ifeval)"
        ) from error
    except OSError as error:  # includes the hub's errors
        raise DataError(
            f"{option}: lm-eval cannot load the data of a task ({first_line(error)}); its own tasks download "
            "their data from the hub: run where the hub can be reached, or name a folder with tasks and their data in "
            "benchmark.lm_eval_folder"
        ) from error
    if report is None:  # on all ranks except the first of each machine
        return {}
    reported = {task: figures(report["results"][task]) for task in tasks}
    if bare := [task for task, values in reported.items() if not values]:
        raise GradsiftError(
            f"benchmark.lm_eval_tasks={bare}: lm-eval reports no figure for these groups; name their tasks"
        )
    return reported


def _answers(
    model: Any,
    tokenizer: Any,
    config: BenchmarkConfig,
    template: str,
    max_tokens: int | None,
    requests: Sequence[Any],
) -> list[str]:
    """Return the answers to lm-eval's requests, in their order. A request consists of a prompt and options.

    Each answer is cut before the first stop string that the options of its request name.
    """
    by_limit: dict[int, list[int]] = {}
    for place, request in enumerate(requests):
        options = request.args[1]
        if options.get("do_sample"):
            raise ConfigError("a task of benchmark.lm_eval_tasks samples its answers; take a task with greedy answers")
        limit = min(config.max_new_tokens, options.get("max_gen_toks", config.max_new_tokens))
        by_limit.setdefault(limit, []).append(place)
    answers = [""] * len(requests)
    for limit, places in by_limit.items():
        prompts = [encode_prompt(requests[place].args[0], "", tokenizer, template) for place in places]
        texts = generate_answers(
            model, tokenizer, prompts, max_new_tokens=limit, batch_size=config.batch_size, max_tokens=max_tokens
        )
        for place, text in zip(places, texts, strict=True):
            ends = requests[place].args[1].get("until") or []
            answers[place] = until(text, [ends] if isinstance(ends, str) else ends)
    return answers


def until(text: str, ends: Sequence[str]) -> str:
    """Return `text` up to the first occurrence of any of `ends`, or the whole text if none of them occurs."""
    return text[: min((place for end in ends if end and (place := text.find(end)) >= 0), default=len(text))]


@functools.cache
def _manager(tasks: tuple[str, ...], folder: str | None) -> Any:
    """Return lm-eval's index of its own tasks and of the tasks in `folder`.

    If `folder` has all `tasks`, only `folder` is indexed, because indexing lm-eval's own tasks takes ten seconds.
    """
    from lm_eval.tasks import TaskManager

    if folder is not None:
        own = TaskManager(include_path=folder, include_defaults=False)
        if set(tasks) <= _known(own):
            return own
    return TaskManager(include_path=folder)


def _known(manager: Any) -> set[str]:
    """Return the names of all tasks and groups of tasks. Tags are omitted: lm-eval reports no figures for a tag."""
    return {*manager.all_subtasks, *manager.all_groups}


def figures(reported: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers in lm-eval's report of one task, by keys like `acc,none`; standard errors are left out."""
    return {
        name: float(value)
        for name, value in reported.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and "," in name and "_stderr" not in name
    }
