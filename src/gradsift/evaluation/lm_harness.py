"""Tasks of lm-eval (EleutherAI's harness) on a model in memory; the package is an optional extra."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any

from gradsift.errors import ConfigError

INSTALL = "pip install -e '.[lm-eval]'"


def check_lm_eval(tasks: Sequence[str]) -> None:
    """Refuse tasks without the package that has them.

    Raises:
        ConfigError: lm-eval is not installed, or does not know a task.
    """
    if not tasks:
        return
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(f"benchmark.lm_eval_tasks={list(tasks)} needs the package lm-eval; install it with {INSTALL}")
    from lm_eval.tasks import TaskManager

    known = set(TaskManager().all_tasks)
    if unknown := [task for task in tasks if task not in known]:
        raise ConfigError(f"benchmark.lm_eval_tasks={unknown} is not known to lm-eval; `lm_eval ls tasks` lists them")


def evaluate_tasks(
    model: Any, tokenizer: Any, tasks: Sequence[str], *, limit: int | None, batch_size: int
) -> dict[str, dict[str, float]]:
    """Every figure that lm-eval reports of each task, at the task's own number of shots.

    Args:
        model: a transformers model on its device; LoRA layers may sit in it.
        limit: the first so many documents of each task; all of them when None.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    found = simple_evaluate(model=wrapped, tasks=list(tasks), limit=limit, bootstrap_iters=0, log_samples=False)
    return {task: figures(found["results"][task]) for task in tasks}


def figures(reported: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of lm-eval's report of one task (`acc,none`), without its standard errors and labels."""
    return {
        name: float(value)
        for name, value in reported.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and "," in name and "_stderr" not in name
    }
