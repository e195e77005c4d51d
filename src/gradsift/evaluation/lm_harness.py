"""Tasks of lm-eval (EleutherAI's harness) on a model in memory; the package is an optional extra."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any

from gradsift.data.tokens import encode_prompt
from gradsift.errors import ConfigError, DataError, GradsiftError, first_line
from gradsift.evaluation.generation import generate_answers


def check_lm_eval(tasks: Sequence[str], folder: str | None) -> None:
    """Refuse tasks that cannot be run.

    Args:
        folder: a folder with YAML files of further tasks.

    Raises:
        ConfigError: lm-eval is not installed, or does not know a task.
    """
    if not tasks:
        return
    option = f"benchmark.lm_eval_tasks={list(tasks)}"
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(f"{option} needs the package lm-eval; install it with pip install -e '.[lm-eval]'")
    known = _known(_manager(tuple(tasks), folder))
    if unknown := [task for task in tasks if task not in known]:
        raise ConfigError(
            f"benchmark.lm_eval_tasks={unknown} is no task or group of lm-eval; `lm_eval ls tasks` lists them, and "
            "benchmark.lm_eval_folder names a folder with YAML files of your own"
        )


def evaluate_tasks(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    folder: str | None,
    limit: int | None,
    batch_size: int,
    template: str,
    max_new_tokens: int,
    max_tokens: int | None = None,
) -> dict[str, dict[str, float]]:
    """Return every figure that lm-eval reports for each task; a task uses its own number of few-shot examples.

    Tasks that generate (IFEval, GSM8K) are answered as the stage `generate` answers: greedily, each prompt as an
    instruction in the target's `template`. All other tasks compare log-probabilities of plain text.

    Args:
        max_new_tokens: the most tokens of an answer; a task may set a lower limit.
        max_tokens: the most tokens per batch of generated answers, padding included.

    Returns:
        `{task: {figure: value}}`; empty on all ranks except the first of a machine.

    Raises:
        ConfigError: a task needs a package that is not installed, or samples its answers.
        DataError: the data of a task is not available.
        GradsiftError: lm-eval reports no figures for a group of tasks.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    option = f"benchmark.lm_eval_tasks={list(tasks)}"
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    for kind in ("loglikelihood", "loglikelihood_rolling"):
        setattr(wrapped, kind, functools.partial(getattr(wrapped, kind), disable_tqdm=True))
    batches = {"batch_size": batch_size, "max_tokens": max_tokens}
    how: dict[str, Any] = {"template": template, "max_new_tokens": max_new_tokens, "batches": batches}
    wrapped.generate_until = functools.partial(_answers, model=model, tokenizer=tokenizer, **how)
    settings: dict[str, Any] = {"tasks": list(tasks), "limit": limit, "bootstrap_iters": 0, "log_samples": False}
    try:
        found = simple_evaluate(model=wrapped, task_manager=_manager(tuple(tasks), folder), **settings)
    except ImportError as error:
        raise ConfigError(
            f"{option}: one of them needs the package {error.name}; install it (those of ifeval come with "
            "pip install -e '.[lm-eval]')"
        ) from error
    except OSError as error:  # includes the hub's errors
        raise DataError(
            f"{option}: lm-eval cannot have the data of one of them ({first_line(error)}); that of its own tasks "
            "is on the hub: run where it can be reached, or give benchmark.lm_eval_folder"
        ) from error
    if found is None:  # on all ranks except the first of a machine, even if the model is divided among them
        return {}
    reported = {task: figures(found["results"][task]) for task in tasks}
    if bare := [task for task, values in reported.items() if not values]:
        raise GradsiftError(
            f"benchmark.lm_eval_tasks={bare}: lm-eval reports no figure of these groups; name their tasks"
        )
    return reported


def _answers(
    requests: Sequence[Any],
    *,
    model: Any,
    tokenizer: Any,
    template: str,
    max_new_tokens: int,
    batches: Mapping[str, Any],
) -> list[str]:
    """Answer lm-eval's requests (a prompt and its options); cut each answer before its first stop string."""
    by_limit: dict[int, list[int]] = {}
    for place, request in enumerate(requests):
        options = request.args[1]
        if options.get("do_sample"):
            raise ConfigError("a task of benchmark.lm_eval_tasks samples its answers; take one that answers greedily")
        by_limit.setdefault(min(max_new_tokens, options.get("max_gen_toks", max_new_tokens)), []).append(place)
    answers = [""] * len(requests)
    for limit, places in by_limit.items():
        prompts = [encode_prompt(requests[place].args[0], "", tokenizer, template) for place in places]
        texts = generate_answers(model, tokenizer, prompts, max_new_tokens=limit, **batches)
        for place, text in zip(places, texts, strict=True):
            ends = requests[place].args[1].get("until") or []
            answers[place] = until(text, [ends] if isinstance(ends, str) else ends)
    return answers


def until(text: str, ends: Sequence[str]) -> str:
    """Return `text` up to the first occurrence of any of `ends`, or the whole text if none of them occurs."""
    return text[: min((place for end in ends if end and (place := text.find(end)) >= 0), default=len(text))]


@functools.cache
def _manager(tasks: tuple[str, ...], folder: str | None) -> Any:
    """Return lm-eval's index of tasks.

    If the folder has all `tasks`, only the folder is indexed, because indexing the package's tasks takes ten seconds.
    """
    from lm_eval.tasks import TaskManager

    if folder is not None:
        own = TaskManager(include_path=folder, include_defaults=False)
        if set(tasks) <= _known(own):
            return own
    return TaskManager(include_path=folder)


def _known(manager: Any) -> set[str]:
    """Return the names of tasks and groups; tags are left out, because lm-eval reports no figures for them."""
    return {*manager.all_subtasks, *manager.all_groups}


def figures(reported: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers in lm-eval's report of one task (keys like `acc,none`), without standard errors and labels."""
    return {
        name: float(value)
        for name, value in reported.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and "," in name and "_stderr" not in name
    }
