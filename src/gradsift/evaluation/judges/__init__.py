"""Judges score two answers to one question; raters grade one example. The openai, local and verifier judges do both.

A judge is shown two answers in one order, without the names of the models that wrote them.
`gradsift.evaluation.judgments` sends each pair in both orders.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Generic, Literal, Protocol, TypeVar

from gradsift.data.examples import Turn
from gradsift.errors import GradsiftError

Order = Literal["forward", "reverse"]
Combine = Literal["signs", "sum"]
Pair = tuple[float, float]  # scores of the first and the second answer
Cost = dict[str, float | int | None]  # requests, tokens and USD (None: price unknown); empty if it was free
Value = TypeVar("Value")


class JudgeError(GradsiftError):
    """Requests to a judge failed. A request without a reply never gets a score."""


class Unreadable(ValueError):
    """Raised if a reply cannot be read; the message is the reason that is recorded."""


class DryRun(GradsiftError):
    """Raised in a dry run, after the number of requests and their largest cost have been printed."""


@dataclass(frozen=True)
class JudgeRequest:
    """A question and two answers, of which the judge is shown `first` before `second`.

    If `order` is "forward", `first` is the model's answer; if `order` is "reverse", it is the reference model's.
    `reference` is the correct answer that the benchmark gives for the item, or None. For the second turn of a
    conversation, `earlier` holds the first turn: its question, the answer of the model that wrote `first`, and the
    answer of the model that wrote `second`.
    """

    item_id: str
    benchmark: str
    order: Order
    instruction: str
    input: str
    first: str
    second: str
    reference: str | None
    earlier: tuple[str, str, str] | None = None


def in_one_turn(request: JudgeRequest) -> JudgeRequest:
    """Return a two-turn request as a request of one turn, whose question and answers contain both turns.

    A request of one turn is returned unchanged.
    """
    if request.earlier is None:
        return request
    question, first, second = request.earlier
    return replace(
        request,
        instruction=two_turns(question, with_input(request.instruction, request.input)),
        input="",
        first=two_turns(first, request.first),
        second=two_turns(second, request.second),
        earlier=None,
    )


def two_turns(first: str, second: str) -> str:
    """Return both questions, or both answers, of a conversation as one text."""
    return f"[turn 1]\n{first}\n\n[turn 2]\n{second}"


def with_input(instruction: str, input: str) -> str:
    """Return instruction and input as one text."""
    return f"{instruction}\n\n{input}" if input else instruction


@dataclass(frozen=True)
class Reply(Generic[Value]):
    """A reply's text and the value read from it: a pair of scores, or a grade.

    If `value` is None, `reason` says why. Otherwise `reason` is a remark about the value, or None.
    """

    text: str
    value: Value | None
    reason: str | None = None


class Judge(Protocol):
    """The interface of a judge.

    `name` identifies the judge in records. `combine` says how an item's scores in both orders become one outcome:

    - "signs": sign(s1 + s2), where s1 and s2 are the signs of the two orders' score differences (arXiv 2601.13697,
      section 4).
    - "sum": the sign of the sum of the two score differences. A preference for a position cancels in this sum if it is
      equally strong in both orders. In small models this preference is larger than all differences between answers, so
      "signs" would give only ties.
    """

    name: str
    combine: Combine = "signs"

    def prompt_hash(self, request: JudgeRequest) -> str:
        """Return a hash of prompt, model and parameters, but not of the endpoint's address."""

    def judge(self, requests: Sequence[JudgeRequest]) -> Iterator[tuple[JudgeRequest, Reply[Pair]]]:
        """Yield each request with its reply, in the order in which the replies arrive.

        Raises:
            JudgeError: a request failed for good; all replies that arrived were yielded before.
        """

    def cost(self) -> Cost:
        """Return the cost of judging the pairs so far, in all processes; empty if judging is free."""
        return {}


Question = Literal["accuracy", "complexity", "quality"]


@dataclass(frozen=True)
class RatingRequest:
    """A question about one example (see `judges.rating`); `position` is the example's row in the pool."""

    position: int
    question: Question
    history: tuple[Turn, ...]
    instruction: str
    input: str
    response: str


class Rater(Protocol):
    """The interface of a rater."""

    name: str

    def rate(self, requests: Sequence[RatingRequest]) -> Iterator[tuple[RatingRequest, Reply[float]]]:
        """Yield each request with its grade, in the order in which the grades arrive.

        Raises:
            JudgeError: a request failed for good; all ratings that arrived were yielded before.
            DryRun: always raised in dry-run mode.
        """

    def rating_cost(self) -> Cost:
        """Return what the last call of `rate` cost; empty if rating is free."""
        return {}


def content_hash(*parts: object) -> str:
    """Return a SHA-256 (hex) of JSON values; unlike `hash`, it is the same in every process."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode("ascii")).hexdigest()
