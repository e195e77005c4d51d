"""What requests to a chat model cost, before and after they are sent, and the caps on it."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gradsift.evaluation.reply_cache import ReplyCache, Spent, Tokens

_BYTES_A_TOKEN = 4  # a rule of thumb for English; about right for other scripts in UTF-8 too
_FRAME_TOKENS = 4  # around each message

Messages = Sequence[Mapping[str, str]]


@dataclass(frozen=True)
class Terms:
    """What requests cost and how many may be sent; prices in USD for a million tokens, None where unknown."""

    price_input: float | None = None
    price_output: float | None = None
    max_usd: float | None = None  # needs both prices
    max_calls: int | None = None
    dry_run: bool = False

    def usd(self, prompt_tokens: int, completion_tokens: int) -> float | None:
        """The price of so many tokens; None where it is not known."""
        if self.price_input is None or self.price_output is None:
            return None
        return (prompt_tokens * self.price_input + completion_tokens * self.price_output) / 1e6


@dataclass(frozen=True)
class Plan:
    """What asking would take; a reply that cannot be read is asked for again, which is not counted here."""

    calls: int  # requests to send
    cached: int  # replies that are there already
    prompt_tokens: int  # estimated
    completion_tokens: int  # at most
    usd: float | None  # at most, as far as the estimate goes

    def describe(self) -> str:
        price = "price unknown (judge.price_input and judge.price_output are not set)"
        if self.usd is not None:
            price = f"at most about {self.usd:.4g} USD"
        return (
            f"{self.calls:,} requests to send, {self.cached:,} replies found in the cache; about "
            f"{self.prompt_tokens:,} prompt tokens (estimate: {_BYTES_A_TOKEN} bytes a token) and at most "
            f"{self.completion_tokens:,} reply tokens; {price}"
        )


class Stopped(Exception):
    """Another thread ended the asking."""


class CapReached(Exception):
    """The next request may cost more than is allowed."""

    def __init__(self, cap: str) -> None:
        super().__init__(cap)
        self.cap = cap


class Purse:
    """The spending of a scope against its caps, this process's requests under way included at their estimate.

    Another process of the same scope counts with what it has paid, so it can pass a cap by what it has under way.
    """

    def __init__(self, cache: ReplyCache, scope: str, terms: Terms) -> None:
        self.scope = scope
        self._cache = cache
        self._terms = terms
        self._under_way = Tokens(0, 0)
        self._calls_under_way = 0
        self._changed = threading.Condition()

    @property
    def spent(self) -> Spent:
        """What the scope has come to, other processes included."""
        return self._cache.spent(self.scope)

    def reserve(self, estimate: Tokens, stop: threading.Event) -> None:
        """Set the cost of a request aside; waits for those under way where they decide whether it fits."""
        with self._changed:
            while cap := self._exceeded(estimate):
                if not self._calls_under_way:
                    raise CapReached(cap)
                if stop.is_set():
                    raise Stopped
                self._changed.wait(0.2)
            self._move(estimate, 1)

    def settle(self, estimate: Tokens) -> None:
        """Give back what was set aside, once the cache holds what it came to."""
        with self._changed:
            self._move(estimate, -1)
            self._changed.notify_all()

    def _move(self, estimate: Tokens, sign: int) -> None:
        held = self._under_way
        self._calls_under_way += sign
        self._under_way = Tokens(held.prompt + sign * estimate.prompt, held.completion + sign * estimate.completion)

    def _exceeded(self, more: Tokens) -> str | None:
        """The cap that one more request would break, as it is set."""
        terms, spent, held = self._terms, self.spent, self._under_way
        if terms.max_calls is not None and spent.calls + self._calls_under_way + 1 > terms.max_calls:
            return f"judge.max_calls={terms.max_calls}"
        usd = terms.usd(
            spent.prompt_tokens + held.prompt + more.prompt, spent.completion_tokens + held.completion + more.completion
        )
        if terms.max_usd is not None and usd is not None and usd > terms.max_usd:
            return f"judge.max_usd={terms.max_usd:g}"
        return None


def estimated_tokens(messages: Messages) -> int:
    """Tokens of a prompt, by the bytes of its text: exact counts would need every model's own tokenizer."""
    return sum(tokens_of(message["content"]) + _FRAME_TOKENS for message in messages)


def tokens_of(text: str) -> int:
    return math.ceil(len(text.encode("utf-8", "replace")) / _BYTES_A_TOKEN)
