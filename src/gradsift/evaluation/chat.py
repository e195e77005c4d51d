"""Prompts to any endpoint that speaks OpenAI's chat protocol; replies that are paid for once.

Every reply is kept in a `ReplyCache` before it is looked at. What can go wrong has one of three ends:

- the endpoint refuses one prompt (HTTP 400, 413, 422: its content filter, a context too long): this
  prompt has no reply, for a reason that would be the same tomorrow, and the others go on;
- a request fails for good (the network, a timeout, HTTP 408, 409, 429, 5xx, a body that is no reply,
  each after `retries`): the others go on, and the stage ends in an error that the same command
  continues from;
- nothing can come of going on (a wrong key, an unknown model, `give_up` failures in a row, a wait that
  is too long, a spending cap): no further request is sent, those under way are waited for and kept.
"""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any, Generic, TypeVar

from gradsift.evaluation.endpoint import Endpoint, Failed, Failure, Refused
from gradsift.evaluation.judges import DryRun, JudgeError, content_hash
from gradsift.evaluation.reply_cache import Completion, ReplyCache, Spent, Tokens
from gradsift.evaluation.spending import CapReached, Messages, Plan, Purse, Stopped, Terms, estimated_tokens, tokens_of

_FIRST_DELAY, _LONGEST_DELAY = 0.5, 8.0  # seconds before a retry that the endpoint gave no time for

Value = TypeVar("Value")


@dataclass(frozen=True)
class Answer(Generic[Value]):
    """The last reply to a prompt and what was read from it; None, with the reason, where nothing could be."""

    text: str
    value: Value | None
    reason: str | None = None


class ChatClient:
    """Asks prompts, several at a time, and reads the replies."""

    def __init__(
        self,
        *,
        model: str,
        cache: ReplyCache,
        base_url: str | None = None,
        api_key_env: str = "OPENAI_API_KEY",
        temperature: float = 0.0,
        max_tokens: int = 256,
        parameters: Mapping[str, Any] | None = None,
        timeout: float = 60.0,
        retries: int = 5,
        max_wait: float = 120.0,
        give_up: int = 10,
        concurrency: int = 4,
        terms: Terms | None = None,
        say: Callable[[str], None] | None = None,
    ) -> None:
        """Parameters as in `OpenaiJudgeConfig`; `parameters` are further ones of a request. No request is sent.

        Raises:
            ConfigError: see `Endpoint`; a dry run needs no key.
        """
        self.parameters: dict[str, Any] = {"model": model, "temperature": temperature, "max_tokens": max_tokens}
        self.parameters |= parameters or {}
        self._cache = cache
        self._terms = terms or Terms()
        self._retries = retries
        self._max_wait = max_wait
        self._give_up = give_up
        self._concurrency = concurrency
        self._say = say or (lambda text: None)
        self._endpoint = Endpoint(
            base_url=base_url,
            api_key_env=api_key_env,
            timeout=timeout,
            parameters=self.parameters,
            needs_key=not self._terms.dry_run,
        )
        self.name = self._endpoint.name
        self._pause = _Pause()

    def spent(self, scope: str) -> dict[str, float | int | None]:
        """What the requests of `scope` came to so far, as plain values."""
        spent = self._cache.spent(scope)
        usd = self._terms.usd(spent.prompt_tokens, spent.completion_tokens)
        return {
            "calls": spent.calls,
            "prompt_tokens": spent.prompt_tokens,
            "completion_tokens": spent.completion_tokens,
            "estimated_calls": spent.estimated_calls,
            "usd": usd,
        }

    def ask(
        self,
        prompts: Sequence[Messages],
        read: Callable[[int, Completion], Value | None],
        *,
        scope: str,
        unread: str,
        tries: int = 2,
    ) -> Iterator[tuple[int, Answer[Value]]]:
        """Yield the position of each prompt with its answer, as they come in. Equal prompts are asked once.

        What is about to be sent is said first; a dry run ends there.

        Args:
            read: finds the value in a reply to the prompt at a position, or None: then the prompt is asked again.
            scope: whose spending this is; the caps hold for all of it, whichever process spent it.
            unread: the reason given for a reply that cannot be read.
            tries: how often a prompt is asked until a reply can be read.

        Raises:
            JudgeError: see the head of this module; every answer that arrived was yielded before.
            DryRun: it is one; the plan was said, even if nothing would be sent.
        """
        same: dict[str, list[int]] = {}
        for position, messages in enumerate(prompts):
            same.setdefault(self._hash(messages, 1), []).append(position)
        reader = _Reader(read, unread, tries, self.parameters["max_tokens"])
        missing: list[list[int]] = []
        cached = 0
        known: list[tuple[list[int], Answer[Value]]] = []
        for positions in same.values():
            found, answer = self._look_up(positions[0], prompts[positions[0]], reader)
            cached += found
            if answer is None:
                missing.append(positions)
            else:
                known.append((positions, answer))
        plan = self._plan([prompts[positions[0]] for positions in missing], cached)
        if missing or self._terms.dry_run:
            self._say(f"  {self.name}: {plan.describe()}")
        if self._terms.dry_run:
            raise DryRun(plan.describe())
        for positions, answer in known:
            yield from ((position, answer) for position in positions)
        for positions, answer in self._send_all(prompts, missing, reader, scope, works=bool(known)):
            yield from ((position, answer) for position in positions)

    # ------------------------------------------------------------------------------ several at a time

    def _send_all(
        self, prompts: Sequence[Messages], groups: Sequence[list[int]], reader: _Reader[Value], scope: str, works: bool
    ) -> Iterator[tuple[list[int], Answer[Value]]]:
        """Answers to groups of equal prompts, as they come in.

        Args:
            works: whether the endpoint is known to answer such requests.
        """
        purse, stop = Purse(self._cache, scope, self._terms), threading.Event()

        def answer(number: int) -> Answer[Value]:
            position = groups[number][0]
            return self._answer(position, prompts[position], reader, purse, stop)

        left = set(range(len(groups)))
        streak: list[tuple[int, Failure]] = []  # failures since the last reply
        failed: list[Failure] = []
        fatal: Exception | None = None
        try:
            for result in _arrivals(answer, len(groups), self._concurrency, stop):
                if isinstance(result, Exception):
                    fatal = fatal or result  # raised once all that was under way is in
                elif isinstance(result[1], Failure):
                    streak.append((result[0], result[1]))
                    if len(streak) >= self._give_up and fatal is None:
                        stop.set()
                        fatal = JudgeError(self._explain_streak(streak))
                else:
                    yield from _refusals(streak, groups, left, failed)
                    left.discard(result[0])
                    yield groups[result[0]], result[1]
        finally:
            stop.set()
        refused_alone = all(isinstance(failure, Refused) for _, failure in streak) and not (works or purse.spent.calls)
        if fatal is None and streak and refused_alone:
            fatal = JudgeError(f"{self.name}: every prompt is refused: {streak[-1][1].said}; {streak[-1][1].remedy}")
        if fatal is None:
            yield from _refusals(streak, groups, left, failed)
        if isinstance(fatal, CapReached):
            plan = self._plan([prompts[groups[number][0]] for number in left], 0)
            raise JudgeError(self._explain_cap(fatal, purse.spent, plan))
        if isinstance(fatal, JudgeError):
            raise JudgeError(f"{fatal} ({len(groups) - len(left)} of {len(groups)} requests are answered)")
        if fatal is not None:
            raise fatal
        if failed:
            raise JudgeError(self._explain_failures(failed, len(groups)))

    def _answer(
        self, position: int, messages: Messages, reader: _Reader[Value], purse: Purse, stop: threading.Event
    ) -> Answer[Value]:
        completion = Completion("")
        for attempt in range(1, reader.tries + 1):
            key = self._hash(messages, attempt)
            with self._cache.claimed(key, stop.wait):
                found = self._cache.find(key)  # another process may have asked since
                if found is None and stop.is_set():
                    raise Stopped
                completion = found or self._send(messages, key, purse, stop)
            value = reader.read(position, completion)
            if value is not None:
                return Answer(completion.text, value)
        return reader.unread(completion)

    def _look_up(self, position: int, messages: Messages, reader: _Reader[Value]) -> tuple[int, Answer[Value] | None]:
        """How many replies the cache holds, and the answer if they suffice for one."""
        completion = Completion("")
        for attempt in range(1, reader.tries + 1):
            found = self._cache.find(self._hash(messages, attempt))
            if found is None:
                return attempt - 1, None
            completion = found
            value = reader.read(position, found)
            if value is not None:
                return attempt, Answer(found.text, value)
        return reader.tries, reader.unread(completion)

    def _hash(self, messages: Messages, attempt: int) -> str:
        """Of all that a reply depends on; two endpoints may call different models by one name."""
        return content_hash("chat", self._endpoint.base_url, self.parameters, [dict(m) for m in messages], attempt)

    def _plan(self, prompts: Sequence[Messages], cached: int) -> Plan:
        prompt_tokens = sum(map(estimated_tokens, prompts))
        completion_tokens = len(prompts) * self.parameters["max_tokens"]
        usd = self._terms.usd(prompt_tokens, completion_tokens)
        return Plan(len(prompts), cached, prompt_tokens, completion_tokens, usd)

    # ------------------------------------------------------------------------------------ one request

    def _send(self, messages: Messages, key: str, purse: Purse, stop: threading.Event) -> Completion:
        """One reply, on the disk when this returns."""
        estimate = Tokens(estimated_tokens(messages), self.parameters["max_tokens"], estimated=True)
        for retry in itertools.count():
            self._pause.wait(stop)
            number = purse.reserve(estimate, stop)
            try:
                completion, tokens = self._endpoint.request(messages)
                tokens = tokens or Tokens(estimate.prompt, tokens_of(completion.text), estimated=True)
                purse.keep(number, key, completion, tokens)
                return completion
            except Failed as failure:
                # what never reached the endpoint, or was turned away by it, costs nothing
                purse.settle(number, estimate if failure.charged else None)
                if failure.wait is not None and failure.wait > self._max_wait:
                    raise JudgeError(
                        f"{self.name}: the endpoint asks to wait {failure.wait:,.0f} s, longer than "
                        f"judge.max_wait={self._max_wait:g}; the replies so far are kept: give the same command "
                        "again then"
                    ) from None
                if retry >= self._retries:
                    raise
                self._wait(failure, retry, stop)
            except (Refused, JudgeError):  # turned away
                purse.settle(number, None)
                raise
            except BaseException:
                purse.settle(number, estimate)
                raise
        raise Stopped  # never: the loop has no end of its own

    def _wait(self, failure: Failed, retry: int, stop: threading.Event) -> None:
        """Before the next try: the time that the endpoint asks for, or exponentially longer; never in step."""
        delay = failure.wait
        if delay is None:
            delay = min(_LONGEST_DELAY, _FIRST_DELAY * 2**retry) * random.uniform(0.5, 1.0)
        else:
            self._pause.until(time.monotonic() + delay)
            delay *= random.uniform(1.0, 1.1)
        if stop.wait(delay):
            raise Stopped

    # --------------------------------------------------------------------------------------- messages

    def _explain_streak(self, streak: Sequence[tuple[int, Failure]]) -> str:
        last = streak[-1][1]
        return (
            f"{self.name}: gave up after {len(streak)} requests in a row that failed for good "
            f"(judge.give_up={self._give_up}, judge.retries={self._retries}), the last one: {last.said}; {last.remedy}"
        )

    def _explain_failures(self, failed: Sequence[Failure], requests: int) -> str:
        return (
            f"{self.name}: {len(failed)} of {requests} requests failed for good, with judge.retries={self._retries}: "
            f"{failed[-1].said}; {failed[-1].remedy}"
        )

    def _explain_cap(self, reached: CapReached, spent: Spent, left: Plan) -> str:
        terms = self._terms
        usd = terms.usd(spent.prompt_tokens, spent.completion_tokens)
        money = "" if usd is None else f" for {usd:.4g} USD"
        more = "" if left.usd is None else f" (at most about {left.usd:.4g} USD)"
        return (
            f"{self.name}: the spending cap {reached.cap} is reached: this stage has sent {spent.calls:,} "
            f"requests{money}; {left.calls:,} prompts{more} are left; raise {reached.cap.split('=')[0]} and give the "
            "same command again: the replies so far are kept and cost nothing more"
        )


@dataclass(frozen=True)
class _Reader(Generic[Value]):
    """How replies are read."""

    read: Callable[[int, Completion], Value | None]
    problem: str
    tries: int
    max_tokens: float

    def unread(self, completion: Completion) -> Answer[Value]:
        """The answer of a prompt whose every reply could not be read."""
        problem = self.problem if completion.text.strip() else "the reply is empty"
        cut = f", cut at judge.max_tokens={self.max_tokens}" if completion.finish == "length" else ""
        asked = f" (asked {'twice' if self.tries == 2 else f'{self.tries} times'})" if self.tries > 1 else ""
        return Answer(completion.text, None, f"{problem}{cut}{asked}")


class _Pause:
    """The time until which an endpoint wants to be left alone, by every thread."""

    def __init__(self) -> None:
        self._until = 0.0

    def until(self, moment: float) -> None:
        self._until = max(self._until, moment)

    def wait(self, stop: threading.Event) -> None:
        while (delay := self._until - time.monotonic()) > 0:
            if stop.wait(delay):
                raise Stopped


def _arrivals(
    answer: Callable[[int], Answer[Value]], count: int, threads: int, stop: threading.Event
) -> Iterator[tuple[int, Answer[Value] | Failure] | Exception]:
    """What becomes of the numbers below `count`, as it comes in, until all threads have ended."""
    waiting: SimpleQueue[int] = SimpleQueue()
    for number in range(count):
        waiting.put(number)
    arrived: SimpleQueue[tuple[int, Answer[Value] | Failure] | Exception | None] = SimpleQueue()
    workers = min(threads, count)
    for _ in range(workers):
        # daemons, unlike a thread pool's: Ctrl-C must not wait for requests that hang
        threading.Thread(target=_work, args=(answer, waiting, arrived, stop), daemon=True).start()
    while workers:
        result = arrived.get()
        if result is None:
            workers -= 1
        else:
            yield result


def _work(
    answer: Callable[[int], Answer[Value]],
    waiting: SimpleQueue[int],
    arrived: SimpleQueue[tuple[int, Answer[Value] | Failure] | Exception | None],
    stop: threading.Event,
) -> None:
    """One thread: puts into `arrived` what becomes of each number, an exception that ends all, and None at its end."""
    try:
        while not stop.is_set():
            number = waiting.get_nowait()
            try:
                arrived.put((number, answer(number)))
            except Failure as failure:
                arrived.put((number, failure))
    except (Empty, Stopped):
        pass
    except Exception as error:  # noqa: BLE001 - raised again in the caller's thread
        stop.set()
        arrived.put(error)
    finally:
        arrived.put(None)


def _refusals(
    streak: list[tuple[int, Failure]], groups: Sequence[list[int]], left: set[int], failed: list[Failure]
) -> Iterator[tuple[list[int], Answer[Any]]]:
    """Empty the streak: refused prompts are answered so, others are kept for the error at the end.

    Held back until a reply shows that the endpoint works: were every prompt refused for one wrong
    option, all would be recorded as invalid.
    """
    for number, failure in streak:
        if isinstance(failure, Refused):
            left.discard(number)
            yield groups[number], Answer(failure.said, None, failure.reason)
        else:
            failed.append(failure)
    streak.clear()
