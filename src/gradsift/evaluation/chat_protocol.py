"""OpenAI's chat protocol: the form of requests, and how replies and errors are read."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, Generic, Literal

from gradsift import outside_json
from gradsift.evaluation.judges import Reply, Unreadable, Value
from gradsift.evaluation.replies import Completion, Usage

if TYPE_CHECKING:
    from httpx2 import Response

GO_ON = "the replies so far are kept: give the same command again to go on"
_NO_CREDIT = "insufficient_quota"  # OpenAI's code for an empty account, sent as HTTP 429

_MOST_SHOWN = 300  # characters of an unreadable reply in an error

Messages = Sequence[Mapping[str, str]]
BYTES_PER_TOKEN = 4  # rule of thumb for English text; about right for other scripts in UTF-8 too
_TOKENS_PER_MESSAGE = 4
_TOKENS = "tokens"  # the role that marks a prompt of token ids


class Failure(Exception):
    """Why a prompt has no reply.

    Attributes:
        kind: see `gradsift.evaluation.chat`.
        reason: for a refused prompt, the reason that is recorded.
        charged: whether the endpoint may charge for the request.
        wait: seconds that the endpoint asks to wait; None if it names no time.
        advice: what happened and what to do, for the error message.
    """

    def __init__(
        self,
        kind: Literal["refused", "passing", "final"],
        message: str,
        remedy: str,
        *,
        reason: str = "",
        charged: bool = False,
        wait: float | None = None,
    ) -> None:
        super().__init__(message)
        self.kind, self.reason, self.charged, self.wait = kind, reason, charged, wait
        self.advice = f"{message}; {remedy}"


@dataclass
class UnreadReplies(Generic[Value]):
    """Counts the unreadable replies since the last readable reply; sending ends at `most` of them (None: no limit)."""

    most: int | None
    count: int = 0
    first: Reply[Value] | None = None

    def add(self, answer: Reply[Value], replies: int) -> None:
        if answer.value is not None:
            self.count, self.first = 0, None
        else:
            self.count, self.first = self.count + replies, self.first or answer

    def problem(self) -> str | None:
        """Return an error message with the first unreadable reply if the limit is reached, else None."""
        if self.most is None or self.count < self.most or self.first is None:
            return None
        text = self.first.text
        shown = repr(text[:_MOST_SHOWN]) + (" ..." if len(text) > _MOST_SHOWN else "")
        return (
            f"gave up after {self.count} unreadable replies in a row (judge.give_up_unreadable={self.most}); the first "
            f"one: {shown} ({self.first.reason}); check judge.model, judge.max_tokens and judge.parse, then give the "
            "same command again: the replies so far are kept, and judge.give_up_unreadable=null counts such replies as "
            "invalid and goes on"
        )


def read_completion(
    body: bytes, scrub: Callable[[str], str], content_type: str = "application/json", *, logprobs: bool = False
) -> tuple[Completion, Usage | None]:
    """Return a response's first choice, and the token counts that the response reports (None if it reports none).

    If the response has no choice, or its choice has no text, the text is empty.

    Args:
        scrub: removes the secrets from a text.
        content_type: the body's type, as the endpoint states it.

    Raises:
        Failure: the body is not a chat completion. The failure is final for a web page, a content type other than JSON
            or an object with a repeated key, because a retry would return the same. Otherwise it is passing.
    """
    try:
        (content,) = outside_json.loads_all(body.decode("utf-8"))
        choice = content["choices"][0] if content["choices"] else {"message": {}}
        finish = choice.get("finish_reason")
        message = choice["message"] if "message" in choice else {"content": choice["text"]}
        # a refusal and a function's arguments are in separate fields
        text = _text_of(message.get("content")) or message.get("refusal") or ""
        if calls := message.get("tool_calls"):
            text = calls[0]["function"]["arguments"]
        if not isinstance(text, str):
            raise TypeError("the content is not text")
        tokens = (choice.get("logprobs") or {}).get("content") if logprobs else None
        kept = [
            _logprob(token) | {"top_logprobs": list(map(_logprob, token.get("top_logprobs") or []))}
            for token in tokens or []
        ]
        usage = content.get("usage")
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        shown = scrub(body[:200].decode("utf-8", "replace"))
        message = f"the endpoint's reply is not a complete chat completion: {shown!r}"
        if isinstance(error, outside_json.RepeatedKeyError):
            raise Failure("final", f"{message} ({error})", f"check judge.base_url; {GO_ON}", charged=True) from None
        if body.lstrip().startswith(b"<") or "json" not in content_type.lower():
            message = f"the endpoint sends {content_type or 'no content type'} and no chat completion: {shown!r}"
            remedy = f"check judge.base_url, and whether the address asks for a login; {GO_ON}"
            raise Failure("final", message, remedy, charged=True) from None
        raise Failure("passing", message, f"check judge.base_url; {GO_ON}", charged=True) from None
    finish = finish if isinstance(finish, str) else None
    return Completion(scrub(text), finish, kept or None), _reported(usage)


def token_prompt(ids: Sequence[int]) -> Messages:
    """Return a prompt of token ids, which the model continues without a chat template."""
    return [{"role": _TOKENS, "content": " ".join(map(str, ids))}]


def request_of(prompt: Messages) -> tuple[str, dict[str, Any]]:
    """Return a request's path below the endpoint's address, and the part of its body that holds the prompt."""
    if prompt[0]["role"] == _TOKENS:
        return "completions", {"prompt": [int(token) for token in prompt[0]["content"].split()]}
    return "chat/completions", {"messages": list(prompt)}


def _text_of(content: Any) -> Any:
    """Return the text of a message; if the content is a list of parts, join the texts of its text parts."""
    if not isinstance(content, list):
        return content
    return "".join(part["text"] for part in content if part["type"] in ("text", "output_text"))


_THINKING = re.compile(r"\s*<(think|thinking|thought|reasoning)>(.*?)(</\1>|\Z)", re.DOTALL | re.IGNORECASE)
# if the prompt's template already holds the opening tag, the reply begins inside the thinking
_REST_OF_THINKING = re.compile(r".*?^[^\S\n]*</(think|thinking|thought|reasoning)>[^\S\n]*$", re.DOTALL | re.MULTILINE)


def after_thinking(text: str) -> str:
    """Return a reply without the thinking at its beginning.

    The thinking is a block such as `<think>...</think>`, or all text up to a line that is only the closing tag.

    Raises:
        Unreadable: the block does not end, because the reply was cut while thinking.
    """
    match = _THINKING.match(text)
    if match is None:
        match = _REST_OF_THINKING.match(text)
    elif not match[3]:
        raise Unreadable("the reply ends while thinking, before any score")
    return text[match.end() :] if match else text


def without_system(messages: Messages) -> Messages:
    """Return the messages without system messages, whose text goes in front of the first other message."""
    system = "\n\n".join(message["content"] for message in messages if message["role"] == "system")
    others = [dict(message) for message in messages if message["role"] != "system"]
    if system and others:
        others[0]["content"] = f"{system}\n\n{others[0]['content']}"
    return others or [{"role": "user", "content": system}]


def _logprob(token: Mapping[str, Any]) -> dict[str, Any]:
    return {"token": str(token["token"]), "logprob": float(token["logprob"])}


def _reported(usage: Any) -> Usage | None:
    if not isinstance(usage, dict):
        return None
    prompt, completion = usage.get("prompt_tokens"), usage.get("completion_tokens")
    if not isinstance(prompt, int) or not isinstance(completion, int) or min(prompt, completion) < 0:
        return None
    return Usage(prompt, completion)


def failure_of_status(response: Response, scrub: Callable[[str], str], api_key_env: str, model: str) -> Failure:
    """Return the `Failure` for a response with an HTTP error status."""
    status, error = response.status_code, dict[str, Any]()
    with suppress(ValueError):
        content = outside_json.loads(response.content)
        described = content.get("error", content) if isinstance(content, dict) else {}
        error = described if isinstance(described, dict) else {"message": described}
    code = str(error.get("code") or error.get("type") or "")
    words = scrub(str(error.get("message") or response.text)).split()
    message = f"HTTP {status}: {' '.join(words)}"[:300]
    if status in (400, 413, 422):
        shown = f" ({scrub(code)[:60]})" if code else ""
        remedy = (
            "check judge.model, judge.max_tokens and what the endpoint accepts (judge.token_parameter, "
            f"judge.temperature=null, judge.system_role=false, judge.extra_body); {GO_ON}"
        )
        return Failure("refused", message, remedy, reason=f"the endpoint refuses it, HTTP {status}{shown}")
    if code == _NO_CREDIT or status == 402:
        return Failure("final", f"the account has no credit left: {message}", GO_ON)
    if status in (408, 409, 429) or status >= 500:
        return Failure("passing", message, GO_ON, wait=retry_after(response.headers))
    if status in (401, 403):
        return Failure("final", message, f"check the key in the environment variable {api_key_env}; {GO_ON}")
    return Failure("final", message, f"check judge.model={model} and judge.base_url; {GO_ON}")


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Return the seconds to wait from the header `retry-after-ms` or `retry-after` (seconds or a date), or None."""
    for name, unit in (("retry-after-ms", 1000.0), ("retry-after", 1.0)):
        try:
            seconds = float(headers.get(name, "")) / unit
        except ValueError:
            continue
        if 0 <= seconds < math.inf:
            return seconds
    try:
        moment = parsedate_to_datetime(headers.get("retry-after", ""))
    except (ValueError, TypeError):
        return None
    return max(0.0, moment.timestamp() - time.time())


def estimated_tokens(messages: Messages) -> int:
    """Estimate the tokens of a prompt from its bytes; exact counts would need each model's own tokenizer."""
    return sum(tokens_of(message["content"]) + _TOKENS_PER_MESSAGE for message in messages)


def tokens_of(text: str) -> int:
    return math.ceil(len(text.encode("utf-8", "replace")) / BYTES_PER_TOKEN)
