"""Send prompts to any endpoint that speaks OpenAI's protocol. Replies are stored, so each is paid for once.

A request can fail in three ways (`Failure.kind`):

    refused   HTTP 400, 413, 422 (content filter, prompt too long). The other prompts are still sent.
    passing   A network error, a timeout, HTTP 408, 409, 429 or 5xx, or a reply that is cut off. The request is retried
              up to `retries` times. If it still fails, the other prompts are still sent, and then `ask` raises
              JudgeError. The same command, given again, sends only the prompts without a reply.
    final     A wrong key, an unknown model, no credit, a web page as reply, a Retry-After above `max_wait` seconds. No
              further request is sent, and `ask` raises JudgeError. The same happens after `give_up` failed prompts in
              a row, after `give_up_unreadable` unreadable replies in a row, and at a spending cap.

The requests run in the event loop of one background thread. A request is sent only if the estimate of its largest cost
stays within the spending caps. The openai package is not used: it loads in 0.5 s (httpx2: 0.03 s),
the caps would not count its retries, and its timeouts do not limit the time of a whole request.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Generic

from gradsift.config.evaluation import EndpointOptions
from gradsift.evaluation.endpoint import (
    BYTES_PER_TOKEN,
    Endpoint,
    Failure,
    Messages,
    estimated_tokens,
    tokens_of,
    without_system,
)
from gradsift.evaluation.judges import Cost, DryRun, JudgeError, Reply, Unreadable, Value, content_hash
from gradsift.evaluation.replies import CUT, REPLIES_FILE, CapReached, Completion, Replies, Terms, Usage
from gradsift.runtime import Runtime

if TYPE_CHECKING:
    from httpx2 import AsyncClient

_FIRST_DELAY, _LONGEST_DELAY = 0.5, 8.0  # seconds before a retry, if the endpoint names no time
_POLL = 0.05  # seconds between checks of the stop signal and of other processes' requests
_MOST_SHOWN = 300  # characters of an unreadable reply in an error
_GO_ON = "the replies so far are kept: give the same command again to go on"


@dataclass(kw_only=True, eq=False, repr=False)
class ChatClient:
    """Sends prompts, several at a time, and reads the replies.

    The fields are options of `OpenaiJudgeConfig`, except these:

        replies: where replies are stored.
        terms: prices, spending caps, and whether this is a dry run.
        group: the config group whose options the error messages name.
        known_as: replaces the address in the hash under which a reply is stored, for a server whose port changes.
        say: called before the first request with a text: the number of requests and their largest cost.

    Raises:
        ConfigError: the key or another environment variable is missing, or OPENAI_BASE_URL is not an address.
    """

    model: str
    replies: Replies
    base_url: str | None = None
    api_key_env: str = "OPENAI_API_KEY"
    temperature: float | None = 0.0
    max_tokens: int = 256
    token_parameter: str = "max_tokens"  # noqa: S105 - the name of a parameter
    system_role: bool = True
    extra_body: Mapping[str, Any] | None = None
    extra_headers: Mapping[str, str] | None = None
    extra_query: Mapping[str, str] | None = None
    timeout: float = 60.0
    retries: int = 5
    max_wait: float = 120.0
    give_up: int = 10
    give_up_unreadable: int | None = 10
    concurrency: int = 4
    terms: Terms = field(default_factory=Terms)
    group: str = "judge"
    known_as: str | None = None
    say: Callable[[str], None] = lambda text: None

    def __post_init__(self) -> None:
        self.name = f"openai/{self.model}"
        body = {"model": self.model, "temperature": self.temperature, self.token_parameter: self.max_tokens}
        body |= self.extra_body or {}
        self.parameters: dict[str, Any] = {name: value for name, value in body.items() if value is not None}
        own = {"extra_headers": self.extra_headers, "extra_query": self.extra_query}
        # what a reply depends on besides address and messages; secrets are included as env:NAME, not as their values
        self.identity = self.parameters | {name: values for name, values in own.items() if values}
        if not self.system_role:
            self.identity["system_role"] = False
        address = (self.base_url, self.api_key_env, self.extra_headers, self.extra_query)
        self.endpoint = Endpoint(*address, needs_key=not self.terms.dry_run, group=self.group)

    def named(self, text: str) -> str:
        """Return an error message in which option names begin with the client's config group instead of `judge`."""
        return text.replace("judge.", f"{self.group}.")

    def spent(self, scope: str) -> Cost:
        """Return what all processes have spent under `scope` so far."""
        spent = self.replies.spent(scope)
        return {**asdict(spent), "usd": self.terms.usd(spent.prompt_tokens, spent.completion_tokens)}

    def ask(
        self,
        prompts: Sequence[Messages],
        read: Callable[[int, Completion], Value | None],
        *,
        scope: str,
        unread: str,
        tries: int = 2,
    ) -> Iterator[tuple[int, Reply[Value]]]:
        """Yield each prompt's position and the `Reply` to it: stored replies first, refused prompts last.

        Between the stored replies and the refused prompts, the other replies are yielded in the order of their arrival.
        Equal prompts are sent once. Before the first request, `say` is called with the number of requests and their
        largest cost.

        Args:
            read: called with the position of a prompt and a reply to this prompt; returns the value in the reply. If
                `read` returns None or raises `Unreadable`, the prompt is sent again.
            scope: name under which the spending of all processes is added up; the caps limit this sum.
            unread: the reason that is recorded if `read` returns None.
            tries: how often a prompt is sent at most, if its replies cannot be read.

        Raises:
            JudgeError: requests failed (see the top of this module); all answers that had arrived were yielded before.
            DryRun: always raised in dry-run mode, after the number of requests and their largest cost are printed.
        """
        same: dict[str, _Prompt] = {}
        for position, given in enumerate(prompts):
            messages = given if self.system_role else without_system(given)
            same.setdefault(self.key_of(messages, 1), _Prompt(messages, [])).positions.append(position)
        asking = _Asking(self, read, scope, unread, tries)
        answers = [(prompt, asking.answer_to(prompt)) for prompt in same.values()]
        missing = [prompt for prompt, answer in answers if not isinstance(answer, Reply)]
        stored = f"{len(answers) - len(missing):,} replies found in the cache"
        plan = f"{len(missing):,} requests to send, {stored}; {self.cost_of(missing)}"
        if missing or self.terms.dry_run:
            self.say(self.named(f"  {self.name}: {plan}"))
        if self.terms.dry_run:
            raise DryRun(plan)
        for prompt, answer in answers:
            if isinstance(answer, Reply):
                asking.note(answer)
                yield from ((position, answer) for position in prompt.positions)
        if missing:
            for prompt, reply in asking.send(missing, len(answers)):
                yield from ((position, reply) for position in prompt.positions)

    def cost_of(self, prompts: Iterable[_Prompt]) -> str:
        """Return a text about the largest possible cost of the prompts if each is sent once."""
        sizes = [estimated_tokens(prompt.messages) for prompt in prompts]
        reply_tokens = len(sizes) * self.max_tokens
        usd = self.terms.usd(sum(sizes), reply_tokens)
        unknown = "price unknown (judge.price_input and judge.price_output are not set)"
        price = unknown if usd is None else f"at most about {usd:.4g} USD"
        return (
            f"about {sum(sizes):,} prompt tokens (estimate: {BYTES_PER_TOKEN} bytes per token) and at most "
            f"{reply_tokens:,} reply tokens; {price}"
        )

    def key_of(self, messages: Messages, attempt: int) -> str:
        """Return the key of the stored reply to try number `attempt`: a hash of all that the reply depends on."""
        # the address too: two endpoints may have different models under the same name
        address = self.known_as or self.endpoint.address
        return content_hash("chat", address, self.identity, [dict(message) for message in messages], attempt)


def client_of(runtime: Runtime, config: EndpointOptions, *, price: float | None = None, **own: Any) -> ChatClient:
    """Return a client that keeps its replies in the store, where all runs share them.

    Args:
        price: price of prompt tokens and of reply tokens (USD per million), used if `config` gives no prices.
        own: fields of the client that replace options of `config`.
    """
    names = {each.name for each in fields(ChatClient)} & {each.name for each in fields(config)}
    options = {name: getattr(config, name) for name in names} | own
    prices = (price, price) if config.price_input is None else (config.price_input, config.price_output)
    terms = Terms(*prices, config.max_usd, config.max_calls, getattr(config, "dry_run", False))
    say = runtime.display.say
    return ChatClient(replies=Replies(runtime.store.root / REPLIES_FILE, say), terms=terms, say=say, **options)


@dataclass(eq=False)
class _Prompt:
    """A prompt, and the positions at which it was given to `ask`."""

    messages: Messages
    positions: list[int]


class _StoppedError(Exception):
    """Raised in place of sending a request, if no further request may be sent."""


@dataclass(eq=False)
class _Asking(Generic[Value]):
    """One call of `ChatClient.ask`: its replies and failures so far, which the background thread of `send` updates."""

    chat: ChatClient
    read: Callable[[int, Completion], Value | None]
    scope: str
    unread: str
    tries: int
    # answered prompts; None: no more will follow
    arrived: SimpleQueue[tuple[_Prompt, Reply[Value]] | None] = field(default_factory=SimpleQueue)
    stop: threading.Event = field(default_factory=threading.Event)  # set if no further request may be sent
    problem: str | Exception | None = None  # the first reason to stop
    unanswered: set[_Prompt] = field(default_factory=set)
    refused: list[tuple[_Prompt, Failure]] = field(default_factory=list)
    failed: list[Failure] = field(default_factory=list)
    failures: int = 0  # refused and failed prompts since the last reply
    unreadable: list[Reply[Value]] = field(default_factory=list)  # since the last readable answer
    paused_until: float = 0.0  # time.monotonic() before which no request is sent; set if the endpoint asks to wait

    def answer_to(self, prompt: _Prompt) -> Reply[Value] | int:
        """Return the answer if a stored reply is readable or all tries are used, else the number of the next try."""
        completion, problem = Completion(""), self.unread
        for attempt in range(1, self.tries + 1):
            stored = self.chat.replies.find(self.chat.key_of(prompt.messages, attempt))
            if stored is None:
                return attempt
            completion, problem = stored, self.unread
            try:
                value = self.read(prompt.positions[0], completion)
            except Unreadable as error:
                value, problem = None, str(error)
            if value is not None:
                return Reply(completion.text, value)
        problem = problem if completion.text.strip() else "the reply is empty"
        ends = {CUT: f", cut at judge.max_tokens={self.chat.max_tokens}", "content_filter": ", cut by a content filter"}
        asked = " (asked twice)" if self.tries == 2 else ""
        return Reply(completion.text, None, f"{problem}{ends.get(completion.finish or '', '')}{asked}")

    def note(self, answer: Reply[Value]) -> None:
        self.failures = 0
        if answer.value is None:
            self.unreadable.append(answer)
        else:
            self.unreadable.clear()

    def send(self, prompts: Sequence[_Prompt], total: int) -> Iterator[tuple[_Prompt, Reply[Value]]]:
        """Send the prompts; yield each with its answer, in the order of arrival, and refused prompts at the end.

        Args:
            total: number of different prompts that `ask` got, including those with a stored answer.

        Raises:
            JudgeError: requests failed, or the endpoint has refused every prompt, probably because of a wrong option.
        """
        self.unanswered.update(prompts)
        self._end_if_unreadable()
        # a daemon: Ctrl-C must not wait for requests that hang
        threading.Thread(target=self._run, args=(prompts,), daemon=True).start()
        try:
            while (result := self.arrived.get()) is not None:
                yield result
        finally:
            self.stop.set()
        only_refused = len(self.refused) == total and not self.chat.replies.spent(self.scope).calls
        if self.problem is None and only_refused:
            self.problem = f"every prompt is refused: {self.refused[-1][1].advice}"
        if self.problem is None:
            yield from ((prompt, Reply(failure.message, None, failure.reason)) for prompt, failure in self.refused)
            if self.failed:
                count = f"{len(self.failed)} of {len(prompts)} requests failed for good"
                self.problem = f"{count}, with judge.retries={self.chat.retries}: {self.failed[-1].advice}"
        if isinstance(self.problem, Exception):
            raise self.problem
        if self.problem is not None:
            answered = f"{len(prompts) - len(self.unanswered)} of {len(prompts)} requests are answered"
            raise JudgeError(self.chat.named(f"{self.chat.name}: {self.problem}; {_GO_ON} ({answered})"))

    def _run(self, prompts: Sequence[_Prompt]) -> None:
        async def work_all() -> None:
            async with self.chat.endpoint.client() as client:
                waiting = iter(prompts)
                workers = min(self.chat.concurrency, len(prompts))
                await asyncio.gather(*(self._work(client, waiting) for _ in range(workers)))

        try:
            asyncio.run(work_all())
        except Exception as error:  # noqa: BLE001 - raised again in the caller's thread
            self._end(error)
        finally:
            self.arrived.put(None)

    async def _work(self, client: AsyncClient, waiting: Iterator[_Prompt]) -> None:
        for prompt in waiting:
            try:
                while isinstance(answer := self.answer_to(prompt), int):
                    await self._fetch(client, prompt.messages, answer)
            except _StoppedError:
                return
            except Failure as failure:
                self._note_failure(prompt, failure)
            except CapReached as cap:
                self._end(self._cap_message(str(cap)))
            except Exception as error:  # noqa: BLE001 - raised again in the caller's thread
                self._end(error)
            else:
                self.note(answer)
                self.unanswered.remove(prompt)
                self._end_if_unreadable()
                self.arrived.put((prompt, answer))

    def _note_failure(self, prompt: _Prompt, failure: Failure) -> None:
        self.failures += 1
        if failure.kind == "refused":
            self.refused.append((prompt, failure))
        else:
            self.failed.append(failure)
        if failure.kind == "final":
            self._end(failure.advice)
        elif self.failures >= self.chat.give_up:
            self._end(
                f"gave up after {self.failures} requests in a row that failed for good (judge.give_up="
                f"{self.chat.give_up}, judge.retries={self.chat.retries}), the last one: {failure.advice}"
            )

    async def _fetch(self, client: AsyncClient, messages: Messages, attempt: int) -> None:
        """Send a prompt, with retries, until its reply is stored."""
        chat, replies, key = self.chat, self.chat.replies, self.chat.key_of(messages, attempt)
        estimate = Usage(estimated_tokens(messages), chat.max_tokens, estimated_calls=1)
        for retry in itertools.count():
            await self._sleep(self.paused_until - time.monotonic())
            while (claim := replies.claim(key, self.scope, estimate, chat.terms)) == "wait":
                await self._sleep(_POLL)
            if claim == "stored":
                return
            try:
                completion, usage = await chat.endpoint.request(client, messages, chat.parameters, chat.timeout)
                usage = usage or Usage(estimate.prompt_tokens, tokens_of(completion.text), estimated_calls=1)
                replies.keep(key, completion, self.scope, usage)
                return
            except Failure as failure:
                replies.release(key, self.scope, estimate if failure.charged else None)
                delay = self._delay(failure, retry)
            except BaseException:
                replies.release(key, self.scope, estimate)
                raise
            await self._sleep(delay)

    def _delay(self, failure: Failure, retry: int) -> float:
        """Return the seconds to wait before the request is sent again; raise Failure if it may not be sent again."""
        chat, wait = self.chat, failure.wait
        if wait is not None and wait > chat.max_wait:
            message = f"the endpoint asks to wait {wait:,.0f} s, longer than judge.max_wait={chat.max_wait:g}"
            raise Failure("final", message, "wait, or raise judge.max_wait")
        if failure.kind != "passing" or retry >= chat.retries:
            raise failure
        if wait is None:
            return min(_LONGEST_DELAY, _FIRST_DELAY * 2.0 ** min(retry, 99)) * random.uniform(0.5, 1.0)
        self.paused_until = max(self.paused_until, time.monotonic() + wait)  # all requests wait for this time
        return wait * random.uniform(1.0, 1.1)

    async def _sleep(self, seconds: float) -> None:
        """Wait for `seconds`; raise _StoppedError as soon as no further request may be sent."""
        end = time.monotonic() + seconds
        while not self.stop.is_set() and (left := end - time.monotonic()) > 0:
            await asyncio.sleep(min(left, _POLL))
        if self.stop.is_set():
            raise _StoppedError

    def _end(self, problem: str | Exception) -> None:
        self.problem = self.problem or problem
        self.stop.set()

    def _end_if_unreadable(self) -> None:
        """Stop if too many replies in a row were unreadable. An unreadable answer stands for `tries` replies."""
        count, most = len(self.unreadable) * self.tries, self.chat.give_up_unreadable
        if most is None or count < most:
            return
        first = self.unreadable[0]
        shown = repr(first.text[:_MOST_SHOWN]) + (" ..." if len(first.text) > _MOST_SHOWN else "")
        self._end(
            f"gave up after {count} unreadable replies in a row (judge.give_up_unreadable={most}); the first one: "
            f"{shown} ({first.reason}); check judge.model, judge.max_tokens and judge.parse, or set "
            "judge.give_up_unreadable=null to count such replies as invalid and go on"
        )

    def _cap_message(self, cap: str) -> str:
        spent = self.chat.spent(self.scope)
        money = "" if spent["usd"] is None else f" for {spent['usd']:.4g} USD"
        return (
            f"the spending cap {cap} is reached: this stage has sent {spent['calls']:,} requests{money}; "
            f"{len(self.unanswered):,} prompts are left ({self.chat.cost_of(self.unanswered)}); raise "
            f"{cap.split('=')[0]}"
        )
