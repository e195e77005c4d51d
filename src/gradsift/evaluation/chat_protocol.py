"""What an endpoint that speaks OpenAI's chat protocol sends back: replies, and errors."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from email.utils import parsedate_to_datetime
from typing import Any, Literal

from gradsift import outside_json
from gradsift.evaluation.replies import Completion, Usage

GO_ON = "the replies so far are kept: give the same command again to go on"
_NO_CREDIT = "insufficient_quota"  # OpenAI's code for an empty account, sent as HTTP 429

Messages = Sequence[Mapping[str, str]]


class Failure(Exception):
    """Why a prompt has no reply (see `gradsift.evaluation.chat`).

    Attributes:
        reason: recorded for a refused prompt.
        charged: whether the endpoint may charge for the request.
        wait: seconds that the endpoint asks to wait.
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


def read_completion(
    body: bytes, scrub: Callable[[str], str], *, logprobs: bool = False
) -> tuple[Completion, Usage | None]:
    """Read the first choice of a response, and the tokens that it reports. The text is empty if the model wrote none.

    Args:
        scrub: removes the key from a text.

    Raises:
        Failure: the body is not a chat completion.
    """
    try:
        content = outside_json.loads(body)
        choice = content["choices"][0] if content["choices"] else {"message": {}}
        message, finish = choice["message"], choice.get("finish_reason")
        # a refusal has a field of its own, and so have a function's arguments
        text = message.get("content") or message.get("refusal") or ""
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
    except (ValueError, KeyError, TypeError, IndexError, AttributeError):
        shown = scrub(body[:200].decode("utf-8", "replace"))
        message = f"the endpoint's reply is not a complete chat completion: {shown!r}"
        raise Failure("passing", message, f"check judge.base_url; {GO_ON}", charged=True) from None
    finish = finish if isinstance(finish, str) else None
    return Completion(scrub(text), finish, kept or None), _reported(usage)


def _logprob(token: Mapping[str, Any]) -> dict[str, Any]:
    return {"token": str(token["token"]), "logprob": float(token["logprob"])}


def _reported(usage: Any) -> Usage | None:
    if not isinstance(usage, dict):
        return None
    prompt, completion = usage.get("prompt_tokens"), usage.get("completion_tokens")
    if not isinstance(prompt, int) or not isinstance(completion, int) or min(prompt, completion) < 0:
        return None
    return Usage(prompt, completion)


def failure_of_status(error: Any, scrub: Callable[[str], str], api_key_env: str, model: str) -> Failure:
    """Return the failure that an HTTP error status (an `openai.APIStatusError`) means."""
    status, code = int(error.status_code), str(error.code or error.type or "")
    message = " ".join(scrub(str(error)).split())[:300]
    if status in (400, 413, 422):
        shown = f" ({scrub(code)[:60]})" if code else ""
        remedy = f"check judge.model, judge.max_tokens and what the endpoint accepts; {GO_ON}"
        return Failure("refused", message, remedy, reason=f"the endpoint refuses it, HTTP {status}{shown}")
    if code == _NO_CREDIT or status == 402:
        return Failure("final", f"the account has no credit left: {message}", GO_ON)
    if status in (408, 409, 429) or status >= 500:
        return Failure("passing", message, GO_ON, wait=retry_after(error.response.headers))
    if status in (401, 403):
        return Failure("final", message, f"check the key in the environment variable {api_key_env}; {GO_ON}")
    return Failure("final", message, f"check judge.model={model} and judge.base_url; {GO_ON}")


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Return the seconds that a response asks to wait: `retry-after-ms`, or `retry-after` in seconds or as a date."""
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
