"""What requests to a chat model cost, before and after they are sent, and the caps on it."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gradsift.evaluation.reply_cache import Completion, ReplyCache, Spent, Tokens

_BYTES_A_TOKEN = 4  # a rule of thumb for English; about right for other scripts in UTF-8 too
_FRAME_TOKENS = 4  # around each message
_POLL = 0.1  # seconds between looks at whether requests under way have left room

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
    """The spending of a scope against its caps, over all processes; requests under way count at their estimate."""

    def __init__(self, cache: ReplyCache, scope: str, terms: Terms) -> None:
        self._cache = cache
        self._scope = scope
        self._terms = terms

    @property
    def spent(self) -> Spent:
        """What the scope has come to, other processes included."""
        return self._cache.spent(self._scope)

    def reserve(self, estimate: Tokens, stop: threading.Event) -> int:
        """Set the cost of a request aside before it is sent; waits for those under way where they decide.

        Returns:
            The number under which it is to be kept or settled.

        Raises:
            CapReached: it does not fit, and nothing is under way that may come to less than its estimate.
            Stopped: `stop` was set meanwhile.
        """
        while True:
            with self._cache.ledger(self._scope) as ledger:
                under_way = ledger.under_way
                cap = self._exceeded(ledger.spent, under_way, estimate)
                if cap is None:
                    return ledger.set_aside(estimate)
            if not under_way.calls:
                raise CapReached(cap)
            if stop.wait(_POLL):
                raise Stopped

    def keep(self, number: int, key: str, completion: Completion, tokens: Tokens) -> None:
        """Commit a reply under `key`, with what it cost, in the place of what was set aside."""
        self._cache.keep(key, completion, self._scope, tokens, number)

    def settle(self, number: int, tokens: Tokens | None) -> None:
        """Put what a request without a reply may be charged with in the place of what was set aside; None: nothing."""
        self._cache.settle(self._scope, tokens, number)

    def _exceeded(self, spent: Spent, held: Spent, more: Tokens) -> str | None:
        """The cap that one more request would break, as it is set."""
        terms = self._terms
        if terms.max_calls is not None and spent.calls + held.calls + 1 > terms.max_calls:
            return f"judge.max_calls={terms.max_calls}"
        usd = terms.usd(
            spent.prompt_tokens + held.prompt_tokens + more.prompt,
            spent.completion_tokens + held.completion_tokens + more.completion,
        )
        if terms.max_usd is not None and usd is not None and usd > terms.max_usd:
            return f"judge.max_usd={terms.max_usd:g}"
        return None


def estimated_tokens(messages: Messages) -> int:
    """Tokens of a prompt, by the bytes of its text: exact counts would need every model's own tokenizer."""
    return sum(tokens_of(message["content"]) + _FRAME_TOKENS for message in messages)


def tokens_of(text: str) -> int:
    return math.ceil(len(text.encode("utf-8", "replace")) / _BYTES_A_TOKEN)
