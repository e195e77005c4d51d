"""Round robin: select examples for tasks, or for the queries of a target set, in turn.

A query is a row of the target set. Each task or query has a ranking of the pool's examples, by descending score for the
task or by descending similarity to the query. In its turn, a task or query selects the first example of its ranking
that is not selected yet.

Shape letters: n examples of the pool that can be selected.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import cycle

import numpy as np

from gradsift.errors import ConfigError, GradsiftError
from gradsift.features.vectors import Features, products
from gradsift.scoring.scores import Scores
from gradsift.selection.choice import Choice, best_by_direction, best_first

TASK_PART = "task:"  # prefix of the names of score table columns that are scores for one task
_AT_ONCE = 128  # number of queries compared with the pool in one pass


def round_robin(scores: Scores, size: int) -> Choice:
    """Select the best remaining example for each task in turn, in the order of the tasks' columns in the score table.

    Raises:
        ConfigError: the scorer gives no scores per task.
        GradsiftError: an example with the status `scored` has a score for a task that is NaN or infinite.
    """
    tasks = {name: np.asarray(part) for name, part in scores.parts.items() if name.startswith(TASK_PART)}
    if not tasks:
        raise ConfigError(
            "selector=round_robin takes turns between tasks, and this scorer gives no score per task; choose "
            "scorer=less, rds_plus or sbert with a target_set, or selector=topk"
        )
    ranked = best_first(scores)
    for name, part in tasks.items():
        if not np.isfinite(part[ranked]).all():
            row = int(ranked[~np.isfinite(part[ranked])].min())
            raise GradsiftError(f"{name} of the score table is not finite at position {row}, whose status is scored")
    within = min(size, len(ranked))
    rankings = [_ranking(part[ranked], ranked, within) for part in tasks.values()]
    return Choice(_take_turns(rankings, within, len(scores.score)))


def round_robin_queries(
    scores: Scores, size: int, embeddings: Features, target_embeddings: Features, *, fidelity: str
) -> Choice:
    """Select an example for each query of the target set in turn, by the cosine of embeddings (RDS+, arXiv 2503.01807).

    If the target set has several tasks, an example is selected for each task in turn, not for each query. The tasks
    take turns in the order in which they first occur in the target set. An example's similarity to a task is its
    largest cosine to the task's queries. Only examples with the status `scored` are selected, but the values of their
    scores do not matter, except that examples whose embedding is zero are selected last, by descending score. Queries
    whose embedding is zero are left out, which the paper does not mention.

    Args:
        fidelity: `original` works as the paper's published scripts do: a turn reads the next example of the query's (or
            task's) ranking, and selects nothing if this example is selected already. With `fixed`, a turn selects the
            first example of the ranking that is not selected yet, so the numbers of examples selected for two queries
            (or tasks) differ by at most 1.

    Raises:
        GradsiftError: the embeddings of all queries are zero.
    """
    directed, undirected = best_by_direction(scores, embeddings)
    queries = np.flatnonzero(target_embeddings.has_direction)
    if not len(queries):
        raise GradsiftError("no example of the target set has an embedding other than zero; look at its rows")
    pool = np.sort(directed)  # in the order on disk
    tasks = [target_embeddings.tasks[query] for query in queries] if target_embeddings.tasks else []
    within = min(size, len(pool))
    similarities = _similarities(embeddings, pool, target_embeddings, queries)
    if len(set(tasks)) > 1:
        best = {task: np.full(len(pool), -np.inf) for task in tasks}
        for task, similarity in zip(tasks, similarities, strict=True):
            best[task] = np.maximum(best[task], similarity)
        similarities = iter(best.values())
    rankings = [_ranking(similarity, pool, within) for similarity in similarities]
    turns = _take_turns(rankings, within, len(embeddings), loses_turns=fidelity == "original")
    return Choice(np.concatenate([turns, undirected[: size - within]]))


def _take_turns(rankings: Sequence[np.ndarray], size: int, count: int, *, loses_turns: bool = False) -> np.ndarray:
    """Return `size` different positions (int64), taken from the rankings in turn.

    Args:
        rankings: the first `size` positions of each ranking, best first. All rankings order the same positions.
        count: number of examples in the pool; every position is below this number.
        loses_turns: whether a turn gives no position if the ranking's next position is already taken. If False, the
            turn gives the ranking's next position that is not taken yet.
    """
    chosen: list[int] = []
    taken = np.zeros(count, dtype=bool)
    # no ranking is used beyond its first `size` positions: when all of them are taken, `size` positions are chosen
    turns = cycle([map(int, ranking) for ranking in rankings])  # lists of all integers would take five times the memory
    while len(chosen) < size:
        ranking = next(turns)
        position = next(ranking) if loses_turns else next(each for each in ranking if not taken[each])
        if not taken[position]:
            chosen.append(position)
            taken[position] = True
    return np.array(chosen, dtype=np.int64)


def _ranking(similarity: np.ndarray, positions: np.ndarray, count: int) -> np.ndarray:
    """Return the `count` of `positions` (n,) with the largest `similarity` (n,), largest first, ties in row order."""
    ranking: np.ndarray = positions[np.lexsort((positions, -similarity))[:count]]
    return ranking


def _similarities(pool: Features, positions: np.ndarray, target: Features, queries: np.ndarray) -> Iterator[np.ndarray]:
    """Yield, for each row of the target set in `queries`, its cosines (n,) to the pool's examples at `positions`."""
    for start in range(0, len(queries), _AT_ONCE):
        yield from products(pool, positions, target.vectors[queries[start : start + _AT_ONCE]]).T
