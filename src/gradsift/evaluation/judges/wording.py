"""Hashes of the judges' prompts, so that replies to differently worded prompts are never mixed.

A judge's own functions render whole prompts about placeholder texts, and these prompts are hashed. So the hash changes
if any word of a prompt changes.
"""

from __future__ import annotations

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
_EXAMPLES = [
    RatingRequest(0, question, history, "Q", text, "A")
    for question in SCALES
    for text in _INPUTS
    for history in ((), (Turn("user", "U"), Turn("assistant", "V")))
]


def judge_wording(judge: str) -> str | None:
    """Return the hash of a judge's prompts about pairs; None if the judge has no prompts of its own."""
    if judge == "openai":
        return content_hash([render_prompt(request) for request in _PAIRS])[:12]
    if judge == "local":
        from gradsift.evaluation.judges import local  # here: it loads torch

        return content_hash([local.render_pair(request) for request in _PAIRS], local.PLAIN_CUE)[:12]
    return None


def rating_wording(judge: str) -> str | None:
    """Return the hash of a judge's prompts about single examples; None if the judge has none."""
    if judge == "openai":
        return content_hash([render_rating(request) for request in _EXAMPLES])[:12]
    if judge == "local":
        from gradsift.evaluation.judges import local

        return content_hash([local.render_rated(request) for request in _EXAMPLES], local.RATED_CUE)[:12]
    return None
