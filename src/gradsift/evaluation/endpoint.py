"""One request to an endpoint that speaks OpenAI's chat protocol, and what can come of it.

The key is taken out of all that is said: endpoints quote it in their errors.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Mapping
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

from gradsift import outside_json
from gradsift.config.checks import endpoint_address
from gradsift.data.download import LOOPBACK
from gradsift.errors import ConfigError
from gradsift.evaluation.judges import JudgeError
from gradsift.evaluation.reply_cache import Completion, Tokens
from gradsift.evaluation.spending import Messages

_REFUSED = (400, 413, 422)  # what HTTP says of one request's content
_PASSING = (408, 409, 429)
_LARGEST_BODY = 2**24  # bytes
_SHORTEST_SECRET = 8  # characters; no real key has fewer
_NO_CREDIT = "insufficient_quota"  # OpenAI's code for an empty account, which it sends as a 429

GO_ON = "the replies so far are kept: give the same command again to go on"


class Failure(Exception):
    """A prompt without a reply."""

    def __init__(self, said: str, remedy: str) -> None:
        super().__init__(said)
        self.said, self.remedy = said, remedy


class Refused(Failure):
    """The endpoint would refuse this prompt every time."""

    def __init__(self, reason: str, said: str) -> None:
        super().__init__(said, f"check judge.model, judge.max_tokens and what the endpoint accepts; {GO_ON}")
        self.reason = reason


class Failed(Failure):
    """A request failed; another one may not."""

    def __init__(self, said: str, remedy: str, *, charged: bool, wait: float | None = None) -> None:
        super().__init__(said, remedy)
        self.charged, self.wait = charged, wait


class _TooLate(Exception):
    """A reply dripped in for longer than the timeout."""


class Endpoint:
    """Where requests go, with the model and the parameters that all of them have."""

    def __init__(
        self,
        *,
        base_url: str | None,
        api_key_env: str,
        timeout: float,
        parameters: Mapping[str, Any],
        needs_key: bool,
    ) -> None:
        """`needs_key=False` is for those that send nothing.

        Raises:
            ConfigError: the variable named by `api_key_env` holds no usable key (endpoints on this machine
                need none), or OPENAI_BASE_URL no address.
        """
        import openai

        address = base_url or os.environ.get("OPENAI_BASE_URL")
        if address:
            endpoint_address("judge.base_url" if base_url else "OPENAI_BASE_URL", address, api_key_env)
        self.base_url = address.rstrip("/") if address else None  # the slash makes no other endpoint of it
        self.name = f"openai/{parameters['model']}"
        self._parameters = parameters
        self._api_key_env = api_key_env
        self._timeout = timeout
        self._key = _api_key(api_key_env, self.base_url, needs_key)
        self._client = openai.OpenAI(
            api_key=self._key or "none", base_url=self.base_url, timeout=timeout, max_retries=0
        )

    def request(self, messages: Messages) -> tuple[Completion, Tokens | None]:
        """The reply and the tokens that the endpoint reports, within twice the timeout however slowly it drips in.

        Raises:
            Refused, Failed: this prompt has no reply.
            JudgeError: no prompt will have one.
        """
        import openai

        deadline = time.monotonic() + self._timeout
        create: Any = self._client.chat.completions.with_streaming_response.create
        try:
            # as an extra body: endpoints know parameters that the client does not
            body_of: dict[str, Any] = {name: self._parameters[name] for name in self._parameters if name != "model"}
            with create(messages=list(messages), model=self._parameters["model"], extra_body=body_of) as response:
                body = _read_body(response.iter_bytes(), deadline)
        except openai.APIStatusError as error:
            # `from None`, here and below: the original may quote the key
            raise self._status_error(error) from None
        except (openai.APITimeoutError, _TooLate):
            remedy = f"raise judge.timeout={self._timeout:g} seconds; {GO_ON}"
            raise Failed("the request timed out", remedy, charged=True) from None
        except openai.APIConnectionError as error:
            reached = "Connect" not in type(error.__cause__).__name__
            remedy = f"check the network and judge.base_url; {GO_ON}"
            raise Failed(self._scrub(f"{error} ({error.__cause__})"), remedy, charged=reached) from None
        except Exception as error:
            if not type(error).__module__.startswith(("httpx", "httpcore", "h11")):
                raise
            # while the body was read; the client explains only what comes before
            if "Timeout" in type(error).__name__:
                remedy = f"raise judge.timeout={self._timeout:g} seconds; {GO_ON}"
                raise Failed("the request timed out", remedy, charged=True) from None
            raise Failed(self._scrub(f"the reply broke off ({error})"), GO_ON, charged=True) from None
        return self._completion(body)

    def _completion(self, body: bytes) -> tuple[Completion, Tokens | None]:
        """The reply in a body; its text is empty where the model declined to write any."""
        try:
            content = outside_json.loads(body)
            choices = content["choices"]
            message = choices[0]["message"] if choices else {}
            finish = choices[0].get("finish_reason") if choices else None
            # a refusal stands in a field of its own, and so does what a function is called with
            text = message.get("content") or message.get("refusal") or ""
            if calls := message.get("tool_calls"):
                text = calls[0]["function"]["arguments"]
            if not isinstance(text, str):
                raise TypeError("its content is no text")
            logprobs = _logprobs(choices[0]) if choices and self._parameters.get("logprobs") else None
        except (ValueError, KeyError, TypeError, IndexError, AttributeError):
            shown = self._scrub(body[:200].decode("utf-8", "replace"))
            said = f"the endpoint's reply is no whole chat completion: {shown!r}"
            raise Failed(said, f"check judge.base_url; {GO_ON}", charged=True) from None
        finish = finish if isinstance(finish, str) else None
        return Completion(self._scrub(text), finish, logprobs), _usage(content)

    def _status_error(self, error: Any) -> Exception:
        """What an HTTP error status means for the prompt and for the stage."""
        status, code = int(error.status_code), str(error.code or error.type or "")
        said = " ".join(self._scrub(str(error)).split())[:300]
        if status in _REFUSED:
            shown = f" ({self._scrub(code)[:60]})" if code else ""
            return Refused(f"the endpoint refuses it, HTTP {status}{shown}", said)
        if code == _NO_CREDIT or status == 402:
            return JudgeError(f"{self.name}: the account has no credit left: {said}; {GO_ON}")
        if status in _PASSING or status >= 500:
            return Failed(said, GO_ON, charged=False, wait=retry_after(error.response.headers))
        if status in (401, 403):
            return JudgeError(
                f"{self.name}: {said}; check the key in the environment variable {self._api_key_env}; {GO_ON}"
            )
        model = self._parameters["model"]
        return JudgeError(f"{self.name}: {said}; check judge.model={model} and judge.base_url; {GO_ON}")

    def _scrub(self, text: str) -> str:
        """`text` without the key: endpoints have been seen to quote it.

        What local servers are given in place of a key ("1", "none") is no secret, and replies hold such words.
        """
        return text.replace(self._key, "***") if self._key and len(self._key) >= _SHORTEST_SECRET else text


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that a reply's headers ask to wait: `retry-after-ms`, or `retry-after` in seconds or as a date."""
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


def _read_body(chunks: Iterator[bytes], deadline: float) -> bytes:
    body = b""
    for chunk in chunks:
        body += chunk
        # some endpoints send blanks for minutes to keep a connection open; no timeout of the client ends that
        if time.monotonic() > deadline:
            raise _TooLate
        if len(body) > _LARGEST_BODY:
            break  # no whole JSON then
    return body


def _logprobs(choice: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """The log-probabilities of a choice, token by token, without the bytes; None where it has none."""
    tokens = (choice.get("logprobs") or {}).get("content")
    if not tokens:
        return None

    def kept(token: Mapping[str, Any]) -> dict[str, Any]:
        return {"token": str(token["token"]), "logprob": float(token["logprob"])}

    return [kept(token) | {"top_logprobs": [kept(top) for top in token.get("top_logprobs") or []]} for token in tokens]


def _usage(content: Mapping[str, Any]) -> Tokens | None:
    """The tokens that the endpoint reports; None where it reports none."""
    usage = content.get("usage")
    if not isinstance(usage, dict):
        return None
    prompt, completion = usage.get("prompt_tokens"), usage.get("completion_tokens")
    if not isinstance(prompt, int) or not isinstance(completion, int) or min(prompt, completion) < 0:
        return None
    return Tokens(prompt, completion)


def _api_key(variable: str, base_url: str | None, needed: bool) -> str | None:
    """The key in an environment variable; None where there is none and none is needed."""
    key = os.environ.get(variable, "").strip()
    if key:
        if not (key.isascii() and key.isprintable()):
            raise ConfigError(f"the environment variable {variable} holds characters that no API key has")
        return key
    if not needed or (base_url is not None and urlsplit(base_url).hostname in LOOPBACK):
        return None
    raise ConfigError(
        f"the judge needs an API key in the environment variable {variable} (judge.api_key_env); "
        "set it, or give a judge.base_url on this machine"
    )
