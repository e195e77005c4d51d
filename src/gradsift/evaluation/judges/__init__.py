"""Judges: whatever can give two answers to one question a score each; and raters, which grade one example.

A judge sees a pair in the order in which it is shown and knows neither which model wrote what nor
what becomes of the scores; `gradsift.evaluation.judging` asks both orders and keeps the replies.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from gradsift.data.examples import Turn
from gradsift.errors import GradsiftError

Order = Literal["forward", "reverse"]
Combine = Literal["signs", "sum"]


class JudgeError(GradsiftError):
    """A judge could not be asked: a reply that will not come is never turned into a score."""


class DryRun(GradsiftError):
    """A dry run said what it would send, and ends here."""


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
    """What a judge said: its raw text, and the scores of first and second, or the reason why there are none.

    A reason beside scores says what is odd about them.
    """

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


Question = Literal["accuracy", "complexity", "quality"]


@dataclass(frozen=True)
class RatingRequest:
    """One question about one example (see `gradsift.evaluation.judges.rating`); `position` is that in the pool."""

    position: int
    question: Question
    history: tuple[Turn, ...]
    instruction: str
    input: str
    response: str


@dataclass(frozen=True)
class Rating:
    """What a rater said: its raw text, and the grade, or the reason why there is none."""

    text: str
    grade: float | None
    reason: str | None = None


class Rater(Protocol):
    """The interface of whatever can grade one example; the judges that can implement it too."""

    @property
    def name(self) -> str:
        """Names the rater."""

    def rate(self, requests: Sequence[RatingRequest]) -> Iterator[tuple[RatingRequest, Rating]]:
        """Yield one rating for each request, in any order, as they come in.

        Raises:
            JudgeError: a request failed for good; ratings that had arrived were yielded before.
            DryRun: it was to be said only what would be sent.
        """

    def rating_cost(self) -> dict[str, float | int | None]:
        """What the last `rate` came to (requests, tokens, USD; None where unknown); empty where it costs nothing."""


def content_hash(*parts: object) -> str:
    """A SHA-256 (hex) of plain values; unlike `hash`, the same in every process."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode("ascii")).hexdigest()
