"""Judges: whatever can give two answers to one question a score each.

A judge sees a pair in the order in which it is shown and knows neither which model wrote what nor
what becomes of the scores; `gradsift.evaluation.judging` asks both orders and keeps the replies.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from gradsift.errors import GradsiftError

Order = Literal["forward", "reverse"]
Combine = Literal["signs", "sum"]


class JudgeError(GradsiftError):
    """A judge could not be asked: a reply that will not come is never turned into a score."""


@dataclass(frozen=True)
class JudgeRequest:
    """A pair of answers in the order in which the judge sees them.

    In the order "forward" the model's answer is `first`, in "reverse" the reference model's is.
    `reference` is the benchmark's own correct answer, if it has one.
    """

    item_id: str
    benchmark: str
    order: Order
    instruction: str
    input: str
    first: str
    second: str
    reference: str | None


@dataclass(frozen=True)
class Reply:
    """What a judge said: its raw text, and the scores of first and second, or the reason why there are none."""

    text: str
    scores: tuple[float, float] | None
    reason: str | None = None


class Judge(Protocol):
    """The interface of a judge.

    `combine` says how the two orders of an item make one outcome. "signs": each order votes for the
    higher score, outcome = sign(s1 + s2) (the paper). "sum": the sign of the summed score differences;
    it cancels a preference for one place that is the same for every pair, which in a small model
    outweighs everything else and would make every vote a tie.
    """

    @property
    def name(self) -> str:
        """Names the judge in records."""

    @property
    def combine(self) -> Combine:
        """How the two orders make one outcome."""

    def prompt_hash(self, request: JudgeRequest) -> str:
        """A hash of everything that the reply depends on: prompt, model and parameters."""

    def judge(self, requests: Sequence[JudgeRequest]) -> Iterator[tuple[JudgeRequest, Reply]]:
        """Yield one reply for each request, in any order, as they come in.

        Raises:
            JudgeError: a request failed for good; replies that had arrived were yielded before.
        """


def content_hash(*parts: object) -> str:
    """A SHA-256 (hex) of plain values; unlike `hash`, the same in every process."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode("ascii")).hexdigest()
