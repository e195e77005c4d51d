"""Influence on a target set, estimated by gradient similarity (LESS, arXiv 2402.04333).

    score(z) = max over tasks of  mean over the task's rows z' of  sum_c w_c cos(Gamma_c(z), g_c(z'))

The sum over c, the checkpoints of the warm-up training, is the inner product of the feature rows of z and z';
`gradsift.features.gradients` explains these rows and the symbols. The mean over z' is computed as the inner product
with the mean of the task's feature rows. Target rows whose gradient is zero have no cosine and do not count in the
mean.
"""

from __future__ import annotations

import numpy as np

from gradsift.diagnostics import Diagnostic
from gradsift.errors import GradsiftError
from gradsift.features.vectors import Features
from gradsift.scoring.scores import Scores
from gradsift.scoring.similarity import agreement, mark_undirected, rows_by_task


def less(gradients: Features, target_gradients: Features) -> Scores:
    """Return each example's mean similarity to the rows of the task for which this mean is largest.

    The part `task:<name>` is the mean similarity to the rows of that task.

    Raises:
        GradsiftError: every gradient of the target set is zero.
    """
    tasks = rows_by_task(target_gradients)
    means = {
        task: target_gradients.vectors[rows].mean(0, dtype=np.float64) for task, rows in tasks.items() if len(rows)
    }
    if not means:
        raise GradsiftError("every gradient of the target set is zero; look at its rows and at features.warmup")
    similarity = agreement(gradients, np.stack(list(means.values())))  # (N, tasks)
    scores = Scores(similarity.max(1), {f"task:{task}": similarity[:, k] for k, task in enumerate(means)})
    if missing := [task for task in tasks if task not in means]:
        message = f"no row of {', '.join(missing)} has a gradient, so nothing is selected towards it"
        values: dict[str, float | None] = {"tasks_without_gradient": len(missing)}
        scores.diagnostics.append(Diagnostic("target_tasks", "warning", values, f"{message}; check its responses"))
    mark_undirected(scores, gradients)
    return scores
