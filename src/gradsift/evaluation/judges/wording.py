"""What the judges say around the texts that they are shown, as a hash: a reply belongs to one wording.

It is made of whole prompts about made-up texts, as the judges render them, so nothing that a prompt says is left out.
"""

from __future__ import annotations

from typing import Any

from gradsift.data.examples import Turn
from gradsift.evaluation.judges import JudgeRequest, RatingRequest, content_hash
from gradsift.evaluation.judges.openai import render_prompt
from gradsift.evaluation.judges.rating import SCALES, render_rating

_INPUTS = ("", "I")  # a part that is not always shown
_PAIRS = [JudgeRequest("1", "b", "forward", "Q", text, "A", "B", None) for text in _INPUTS]
_TURNS = (Turn("user", "U"), Turn("assistant", "V"))
_EXAMPLES = [
    RatingRequest(0, question, history, "Q", text, "A")
    for question in SCALES
    for text in _INPUTS
    for history in ((), _TURNS)
]


def judge_wording(judge: str) -> str | None:
    """Of the prompts about pairs; None for a judge that has none."""
    if judge == "openai":
        return _hash([render_prompt(request) for request in _PAIRS])
    if judge == "local":
        from gradsift.evaluation.judges import local

        return _hash([local.render_pair(request) for request in _PAIRS], local.PLAIN_CUE)
    return None


def rating_wording(judge: str) -> str | None:
    """Of the prompts about single examples."""
    if judge == "openai":
        return _hash([render_rating(request) for request in _EXAMPLES])
    if judge == "local":
        from gradsift.evaluation.judges import local

        return _hash([local.render_rated(request) for request in _EXAMPLES], local.RATED_CUE)
    return None


def _hash(*prompts: Any) -> str:
    return content_hash(*prompts)[:12]
