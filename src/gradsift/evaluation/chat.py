"""Send prompts to any endpoint that speaks OpenAI's protocol. Replies are stored, so each is paid for once.

A request can fail in three ways (`Failure.kind`):

    refused   HTTP 400, 413, 422 (content filter, context too long): this prompt gets no reply; the others are sent
    passing   network errors, timeouts, HTTP 408, 409, 429, 5xx, a body that is cut off: the request is retried up to
              `retries` times. If it still fails, the other prompts are still sent, and then `ask` raises JudgeError.
              The same command, given again, sends only the prompts without a reply
    final     a wrong key, an unknown model, no credit, a web page as reply, a Retry-After that is too long: no
              further request is sent, and `ask` raises JudgeError. The same happens after `give_up` failed prompts in
              a row, after `give_up_unreadable` unreadable replies in a row, and when a spending cap is reached

The requests run in the event loop of one background thread, each only if the spending caps allow its estimated largest
cost. A Retry-After header is obeyed if it asks for at most `judge.max_wait` seconds.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Generic

from gradsift.errors import ConfigError
from gradsift.evaluation.chat_protocol import (
    BYTES_PER_TOKEN,
    GO_ON,
    Failure,
    Messages,
    UnreadReplies,
    after_thinking,
    estimated_tokens,
    failure_of_status,
    read_completion,
    request_of,
    tokens_of,
    without_system,
)
from gradsift.evaluation.endpoint import Endpoint
from gradsift.evaluation.judges import DryRun, JudgeError, Reply, Unreadable, Value, content_hash
from gradsift.evaluation.replies import CUT, CapReached, Completion, Replies, Terms, Usage

if TYPE_CHECKING:
    from httpx2 import AsyncClient

_FIRST_DELAY, _LONGEST_DELAY = 0.5, 8.0  # seconds before a retry, if the endpoint names no time
_POLL = 0.05  # seconds between checks of the stop signal and of other processes' requests


@dataclass(frozen=True)
class _Job(Generic[Value]):
    """The arguments of one call of `ChatClient.ask`."""

    prompts: Sequence[Messages]
    read: Callable[[int, Completion], Value | None]
    scope: str
    unread: str
    tries: int


class _StoppedError(Exception):
    """Raised in a waiting request when no further request may be sent."""


class ChatClient:
    """Sends prompts, several at a time, and reads the replies."""

    def __init__(
        self,
        *,
        model: str,
        replies: Replies,
        base_url: str | None = None,
        api_key_env: str = "OPENAI_API_KEY",
        temperature: float | None = 0.0,
        max_tokens: int = 256,
        token_parameter: str = "max_tokens",  # noqa: S107 - the name of a parameter
        system_role: bool = True,
        extra_body: Mapping[str, Any] | None = None,
        extra_headers: Mapping[str, str] | None = None,
        extra_query: Mapping[str, str] | None = None,
        timeout: float = 60.0,
        retries: int = 5,
        max_wait: float = 120.0,
        give_up: int = 10,
        give_up_unreadable: int | None = 10,
        concurrency: int = 4,
        terms: Terms | None = None,
        group: str = "judge",
        known_as: str | None = None,
        skip_thinking: bool = True,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        """Check the endpoint's address and key. No request is sent.

        Args: as in `OpenaiJudgeConfig`, and
            replies: where replies are stored.
            group: the config group whose options the error messages name.
            known_as: replaces the address in the hash of a stored reply, for a server whose port changes.
            skip_thinking: whether `read` gets a reply without the thinking at its beginning (see `after_thinking`).
            say: called before the first request with a text that gives the number of requests and their largest cost.

        Raises:
            ConfigError: the key or another environment variable is missing, or OPENAI_BASE_URL is not an address.
        """
        body = {"model": model, "temperature": temperature, token_parameter: max_tokens, **(extra_body or {})}
        self.parameters: dict[str, Any] = {name: value for name, value in body.items() if value is not None}
        self._terms = terms or Terms()
        self._group, self._skip_thinking = group, skip_thinking
        needs_key = not self._terms.dry_run
        try:
            self._endpoint = Endpoint(base_url, api_key_env, extra_headers, extra_query, needs_key=needs_key)
        except ConfigError as error:
            raise ConfigError(self._named(str(error))) from error
        self._known_as = known_as or self._endpoint.address
        # all that a reply depends on beside the address and the messages
        own = {} if system_role else {"system_role": False}
        self.identity = {**self.parameters, **self._endpoint.settings, **own}
        self._system_role, self._max_tokens = system_role, max_tokens
        self.name, self._replies = f"openai/{model}", replies
        self._timeout, self._retries, self._max_wait, self._say = timeout, retries, max_wait, say
        self._give_up, self._give_up_unreadable, self._concurrency = give_up, give_up_unreadable, concurrency
        self._paused_until = 0.0  # time.monotonic() before which no request is sent; set if the endpoint asks to wait

    def _named(self, text: str) -> str:
        """Return a text in which the names of options begin with the client's config group instead of `judge`."""
        return text.replace("judge.", f"{self._group}.")

    def spent(self, scope: str) -> dict[str, float | int | None]:
        """Return the calls, tokens and USD (None: price unknown) that all processes have spent under `scope` so far."""
        spent = self._replies.spent(scope)
        return {**asdict(spent), "usd": self._terms.usd(spent.prompt_tokens, spent.completion_tokens)}

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

        Other replies are yielded in the order of arrival. Equal prompts are sent once. The number of requests and
        their largest cost are printed first. A dry run sends nothing.

        Args:
            read: called with the position of a prompt and a reply to it; returns the value in the reply. If it returns
                None or raises `Unreadable`, the prompt is sent again, up to `tries` times in all.
            scope: name under which all processes count the spending that the caps apply to.
            unread: reason recorded for a reply from which `read` returns None.

        Raises:
            JudgeError: requests failed (see the top of this module); all answers that arrived were yielded before.
            DryRun: always raised in dry-run mode, after printing what would be sent.
        """
        prompts = prompts if self._system_role else [without_system(messages) for messages in prompts]
        job = _Job(prompts, read, scope, unread, tries)
        same: dict[str, list[int]] = {}
        for position, messages in enumerate(prompts):
            same.setdefault(self._key_of(messages, 1), []).append(position)
        missing: list[list[int]] = []
        answered: list[tuple[list[int], Reply[Value]]] = []
        for positions in same.values():
            answer = self._stored_answer(job, positions[0])
            if isinstance(answer, Reply):
                answered.append((positions, answer))
            else:
                missing.append(positions)
        calls, cost = self._plan([prompts[positions[0]] for positions in missing])
        plan = f"{calls}, {len(answered):,} replies found in the cache; {cost}"
        if missing or self._terms.dry_run:
            self._say(self._named(f"  {self.name}: {plan}"))
        if self._terms.dry_run:
            raise DryRun(plan)
        unread_replies = UnreadReplies[Value](self._give_up_unreadable)
        for positions, answer in answered:
            unread_replies.add(answer, tries)
            yield from ((position, answer) for position in positions)
        if missing and (problem := unread_replies.problem()):
            raise JudgeError(self._named(f"{self.name}: {problem}"))
        for positions, answer in self._send_all(job, missing, unread_replies, works=bool(answered)):
            yield from ((position, answer) for position in positions)

    def _send_all(
        self, job: _Job[Value], groups: Sequence[list[int]], unread: UnreadReplies[Value], works: bool
    ) -> Iterator[tuple[list[int], Reply[Value]]]:
        """Yield groups of equal prompts with their answer, in the order of arrival, and refused prompts at the end.

        Raises JudgeError if the endpoint has only refused prompts, because a wrong option may be the reason.

        Args:
            groups: for each distinct prompt, the positions of the prompts that are equal to it.
            unread: the unreadable replies so far.
            works: whether stored replies show that the endpoint answers such prompts.
        """
        stop, arrived = threading.Event(), SimpleQueue[tuple[int, Reply[Value] | Exception] | None]()
        # a daemon: Ctrl-C must not wait for requests that hang
        threading.Thread(target=self._run, args=(job, groups, arrived, stop), daemon=True).start()
        left = set(range(len(groups)))
        refused: list[tuple[int, Failure]] = []
        failed: list[Failure] = []
        streak = 0  # failures since the last reply
        problem: Exception | str | None = None
        try:
            while (result := arrived.get()) is not None:
                number, outcome = result
                if isinstance(outcome, Reply):
                    streak, works = 0, True
                    left.discard(number)
                    unread.add(outcome, job.tries)
                    if problem is None and (problem := unread.problem()):
                        stop.set()
                    yield groups[number], outcome
                elif isinstance(outcome, Failure) and outcome.kind != "final":
                    streak += 1
                    if outcome.kind == "refused":
                        refused.append((number, outcome))
                    else:
                        failed.append(outcome)
                    if streak >= self._give_up and problem is None:
                        problem = self._gave_up_message(streak, outcome)
                else:
                    problem = problem or outcome
        finally:
            stop.set()
        if problem is None and refused and not failed and not works and not self._replies.spent(job.scope).calls:
            problem = f"every prompt is refused: {refused[-1][1].advice}"
        if problem is None:
            yield from ((groups[number], Reply(str(failure), None, failure.reason)) for number, failure in refused)
        if problem is None and failed:
            count = f"{len(failed)} of {len(groups)} requests failed for good"
            problem = f"{count}, with judge.retries={self._retries}: {failed[-1].advice}"
        if isinstance(problem, CapReached):
            problem = self._cap_message(problem, job, [groups[number] for number in left])
        problem = problem.advice if isinstance(problem, Failure) else problem
        if isinstance(problem, str):
            answered = f"{len(groups) - len(left)} of {len(groups)} requests are answered"
            raise JudgeError(self._named(f"{self.name}: {problem} ({answered})"))
        if problem is not None:
            raise problem

    def _run(self, job: _Job[Value], groups: Sequence[list[int]], arrived: SimpleQueue[Any], stop: Any) -> None:
        """Send one prompt for each group; put (number, answer or exception) into `arrived`, and None at the end."""
        numbers, streak = iter(range(len(groups))), 0  # counted here, since the caller's thread may lag behind

        async def work(client: AsyncClient) -> None:
            nonlocal streak
            for number in numbers:
                try:
                    while isinstance(answer := self._stored_answer(job, groups[number][0]), int):
                        await self._fetch(client, job, job.prompts[groups[number][0]], answer, stop)
                    arrived.put((number, answer))
                    streak = 0
                except _StoppedError:
                    return
                except Exception as error:  # noqa: BLE001 - handled in the caller's thread
                    streak += 1
                    if streak >= self._give_up or not isinstance(error, Failure) or error.kind == "final":
                        stop.set()
                    arrived.put((number, error))

        async def work_all() -> None:
            async with self._endpoint.client() as client:
                await asyncio.gather(*(work(client) for _ in range(min(self._concurrency, len(groups)))))

        try:
            asyncio.run(work_all())
        except Exception as error:  # noqa: BLE001 - raised again in the caller's thread
            arrived.put((0, error))
        finally:
            arrived.put(None)

    def _stored_answer(self, job: _Job[Value], position: int) -> Reply[Value] | int:
        """Return the answer if a stored reply can be read or all tries are used, else the number of the next try."""
        completion, problem = Completion(""), job.unread
        for attempt in range(1, job.tries + 1):
            stored = self._replies.find(self._key_of(job.prompts[position], attempt))
            if stored is None:
                return attempt
            completion, problem = stored, job.unread
            try:
                text = after_thinking(completion.text) if self._skip_thinking else completion.text
                value = job.read(position, replace(completion, text=text))
            except Unreadable as error:
                value, problem = None, str(error)
            if value is not None:
                return Reply(completion.text, value)
        problem = problem if completion.text.strip() else "the reply is empty"
        ends = {CUT: f", cut at judge.max_tokens={self._max_tokens}", "content_filter": ", cut by a content filter"}
        asked = f" (asked {'twice' if job.tries == 2 else f'{job.tries} times'})" if job.tries > 1 else ""
        return Reply(completion.text, None, f"{problem}{ends.get(completion.finish or '', '')}{asked}")

    async def _fetch(
        self, client: AsyncClient, job: _Job[Value], messages: Messages, attempt: int, stop: threading.Event
    ) -> None:
        """Send a prompt, with retries, until its reply is stored."""
        key = self._key_of(messages, attempt)
        estimate = Usage(estimated_tokens(messages), self._max_tokens, estimated_calls=1)
        for retry in itertools.count():
            await _sleep(self._paused_until - time.monotonic(), stop)
            while (claim := self._replies.claim(key, job.scope, estimate, self._terms)) == "wait":
                await _sleep(_POLL, stop)
            if claim == "stored":
                return
            try:
                completion, usage = await self._request(client, messages)
                usage = usage or Usage(estimate.prompt_tokens, tokens_of(completion.text), estimated_calls=1)
                self._replies.keep(key, completion, job.scope, usage)
                return
            except BaseException as error:
                is_free = isinstance(error, Failure) and not error.charged
                self._replies.release(key, job.scope, None if is_free else estimate)
                if not isinstance(error, Failure) or error.kind != "passing":
                    raise
                wait = error.wait
                if wait is not None and wait > self._max_wait:
                    message = f"the endpoint asks to wait {wait:,.0f} s, longer than judge.max_wait={self._max_wait:g}"
                    remedy = "the replies so far are kept: give the same command again then"
                    raise Failure("final", message, remedy) from None
                if retry >= self._retries:
                    raise
            if wait is not None:  # all requests wait for this time
                self._paused_until = max(self._paused_until, time.monotonic() + wait)
                await _sleep(wait * random.uniform(1.0, 1.1), stop)
            else:
                await _sleep(min(_LONGEST_DELAY, _FIRST_DELAY * 2**retry) * random.uniform(0.5, 1.0), stop)

    async def _request(self, client: AsyncClient, messages: Messages) -> tuple[Completion, Usage | None]:
        """Return a reply and its token counts (None if not reported). The timeout covers headers and body together."""
        import httpx2 as httpx

        try:
            async with asyncio.timeout(self._timeout):
                path, prompt = request_of(messages)
                response = await client.post(self._endpoint.url(path), json={**prompt, **self.parameters})
        # `from None`: the original errors may quote the key
        except (httpx.TimeoutException, TimeoutError):
            remedy = f"raise judge.timeout={self._timeout:g} seconds; {GO_ON}"
            raise Failure("passing", "the request timed out", remedy, charged=True) from None
        except httpx.RequestError as error:
            remedy = f"check the network and judge.base_url; {GO_ON}"
            message = self._endpoint.scrub(f"no reply arrived ({type(error).__name__}: {error})")
            raise Failure("passing", message, remedy, charged=not isinstance(error, httpx.ConnectError)) from None
        if not response.is_success:
            model, scrub = self.parameters["model"], self._endpoint.scrub
            raise failure_of_status(response, scrub, self._endpoint.api_key_env, model)
        kind = response.headers.get("content-type", "")
        logprobs = bool(self.parameters.get("logprobs"))
        return read_completion(response.content, self._endpoint.scrub, kind, logprobs=logprobs)

    def _plan(self, prompts: Sequence[Messages]) -> tuple[str, str]:
        """Return two texts: the number of requests, and their largest cost if each prompt is sent only once."""
        prompt_tokens = sum(map(estimated_tokens, prompts))
        reply_tokens = len(prompts) * self._max_tokens
        usd = self._terms.usd(prompt_tokens, reply_tokens)
        unknown = "price unknown (judge.price_input and judge.price_output are not set)"
        price = unknown if usd is None else f"at most about {usd:.4g} USD"
        return f"{len(prompts):,} requests to send", (
            f"about {prompt_tokens:,} prompt tokens (estimate: {BYTES_PER_TOKEN} bytes per token) and at most "
            f"{reply_tokens:,} reply tokens; {price}"
        )

    def _gave_up_message(self, streak: int, last: Failure) -> str:
        return (
            f"gave up after {streak} requests in a row that failed for good (judge.give_up={self._give_up}, "
            f"judge.retries={self._retries}), the last one: {last.advice}"
        )

    def _cap_message(self, reached: CapReached, job: _Job[Value], left: Sequence[list[int]]) -> str:
        spent = self.spent(job.scope)
        money = "" if spent["usd"] is None else f" for {spent['usd']:.4g} USD"
        _, cost = self._plan([job.prompts[positions[0]] for positions in left])
        return (
            f"the spending cap {reached.option} is reached: this stage has sent {spent['calls']:,} requests{money}; "
            f"{len(left):,} prompts are left ({cost}); raise {reached.option.split('=')[0]} and give the same command "
            "again: the replies so far are kept and cost nothing more"
        )

    def _key_of(self, messages: Messages, attempt: int) -> str:
        """Hash all that a reply depends on.

        This includes the address, because two endpoints may use one name for different models.
        """
        return content_hash("chat", self._known_as, self.identity, [dict(m) for m in messages], attempt)


async def _sleep(seconds: float, stop: threading.Event) -> None:
    """Wait for `seconds`; raise _StoppedError as soon as `stop` is set."""
    end = time.monotonic() + seconds
    while not stop.is_set() and (left := end - time.monotonic()) > 0:
        await asyncio.sleep(min(left, _POLL))
    if stop.is_set():
        raise _StoppedError
