"""Hashes of the judges' prompts, so that replies to differently worded prompts are never mixed.

A hash covers complete prompts about made-up texts, rendered by the judges' own functions, so it changes with any word
of a prompt.
"""

from __future__ import annotations

from typing import Any

from gradsift.data.examples import Turn
from gradsift.evaluation.judges import JudgeRequest, RatingRequest, content_hash
from gradsift.evaluation.judges.openai import render_prompt
from gradsift.evaluation.judges.rating import SCALES, render_rating

_INPUTS = ("", "I")  # prompts without and with an input differ
_PAIRS = [
    JudgeRequest("1", "b", "forward", "Q", text, "A", "B", None, earlier)
    for text in _INPUTS
    for earlier in (None, ("P", "C", "D"))
]
_HISTORIES = ((), (Turn("user", "U"), Turn("assistant", "V")))
_EXAMPLES = [
    RatingRequest(0, question, history, "Q", text, "A")
    for question in SCALES
    for text in _INPUTS
    for history in _HISTORIES
]


def judge_wording(judge: str) -> str | None:
    """Return the hash of a judge's prompts about pairs; None if the judge has no prompts of its own."""
    prompts: list[Any] = []
    if judge == "openai":
        prompts = [[render_prompt(request) for request in _PAIRS]]
    if judge == "local":
        from gradsift.evaluation.judges import local

        prompts = [[local.render_pair(request) for request in _PAIRS], local.PLAIN_CUE]
    return content_hash(*prompts)[:12] if prompts else None


def rating_wording(judge: str) -> str | None:
    """Return the hash of a judge's prompts about single examples; None if the judge has no such prompts."""
    prompts: list[Any] = []
    if judge == "openai":
        prompts = [[render_rating(request) for request in _EXAMPLES]]
    if judge == "local":
        from gradsift.evaluation.judges import local

        prompts = [[local.render_rated(request) for request in _EXAMPLES], local.RATED_CUE]
    return content_hash(*prompts)[:12] if prompts else None
