"""Ratings of each example by a judge model (AlpaGasus, arXiv 2307.08701; DEITA, arXiv 2312.15685).

    alpagasus   score = one grade, 0-5, for accuracy and helpfulness
    deita       score = complexity of the instruction, 1-6, x quality of the response, 1-6, asked separately

In a conversation the last exchange is rated, and the judge sees the earlier turns. An example without a valid grade is
`undefined`. docs/methods.md says how the scorer differs from its sources.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from gradsift.data.examples import Example
from gradsift.diagnostics import Diagnostic
from gradsift.evaluation.judges import Question, Rater, RatingRequest
from gradsift.runtime import Task
from gradsift.scoring.scores import UNDEFINED, Scores

QUESTIONS: dict[str, tuple[Question, ...]] = {"alpagasus": ("accuracy",), "deita": ("complexity", "quality")}
_UNRATED_LIMIT = 0.05  # share of examples without a grade above which a warning is given


def llm_rating(
    examples: Sequence[Example], rater: Rater, task: Task, *, style: Literal["alpagasus", "deita"]
) -> Scores:
    """Return the judge's grade of each example, or the product of its grades if the style asks two questions.

    The grades for each question are a part of the scores, (N,).

    Args:
        rater: the judge.
        task: shows the progress.
        style: which questions are asked (`QUESTIONS`).
    """
    questions = QUESTIONS[style]
    # both questions of an example in sequence, so that an interrupted run has complete examples
    requests = [
        RatingRequest(position, question, e.history, e.instruction, e.input, e.output)
        for position, e in enumerate(examples)
        for question in questions
    ]
    grades: dict[str, np.ndarray] = {question: np.full(len(examples), np.nan) for question in questions}
    unrated: dict[str, list[int]] = {}  # positions by reason
    with task(f"rate with {rater.name}", len(requests)) as advance:
        for request, rating in rater.rate(requests):
            if rating.value is None:
                unrated.setdefault(f"no grade for {request.question}: {rating.reason}", []).append(request.position)
            else:
                grades[request.question][request.position] = rating.value
            advance(1)
    # one grade that is NaN makes the product NaN: a score needs all grades
    scores = Scores(np.prod([grades[question] for question in questions], axis=0), grades)
    for reason, positions in sorted(unrated.items()):
        scores.mark(np.isin(np.arange(len(examples)), positions), UNDEFINED, reason)
    share = float(np.isnan(scores.score).mean())
    diagnostic = Diagnostic.judged(
        "unrated_share",
        share > _UNRATED_LIMIT,
        {"unrated_share": share, **rater.rating_cost()},
        f"{share:.1%} of the examples have no valid rating by {rater.name}",
        "the reasons in scores.parquet, judge.parse and judge.max_tokens",
    )
    scores.diagnostics.append(diagnostic)
    return scores
