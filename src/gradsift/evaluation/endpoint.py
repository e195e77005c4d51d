"""OpenAI's chat protocol: where and how a request is sent, and how the reply or the error is read."""

from __future__ import annotations

import asyncio
import math
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from gradsift import outside_json
from gradsift.config.checks import FROM_ENVIRONMENT, endpoint_address
from gradsift.data.download import LOOPBACK
from gradsift.errors import ConfigError
from gradsift.evaluation.replies import Completion, Usage

if TYPE_CHECKING:
    from httpx2 import AsyncClient, Response

BYTES_PER_TOKEN = 4  # rule of thumb for English text; about right for other scripts in UTF-8 too
_TOKENS_PER_MESSAGE = 4
_DEFAULT = "https://api.openai.com/v1"
_NO_CREDIT = "insufficient_quota"  # OpenAI's code for an empty account, sent as HTTP 429
_SHORTEST_SECRET = 8  # characters; no real key has fewer
_TOKENS = "tokens"  # the role that marks a prompt of token ids

Messages = Sequence[Mapping[str, str]]


@dataclass(eq=False)
class Failure(Exception):
    """Raised if a prompt has no reply; `message` says why, and `remedy` what to do."""

    kind: Literal["refused", "passing", "final"]  # see `gradsift.evaluation.chat`
    message: str
    remedy: str = ""
    reason: str = ""  # for a refused prompt, the reason that is recorded
    charged: bool = False  # whether the endpoint may charge for the request
    wait: float | None = None  # seconds that the endpoint asks to wait; None if it names no time

    @property
    def advice(self) -> str:
        return f"{self.message}; {self.remedy}" if self.remedy else self.message


class Endpoint:
    """An endpoint that speaks OpenAI's chat protocol. `address` is its base URL; None means OpenAI's."""

    def __init__(
        self,
        base_url: str | None,
        api_key_env: str,
        headers: Mapping[str, str] | None = None,
        query: Mapping[str, str] | None = None,
        *,
        needs_key: bool = True,
        group: str = "judge",
    ) -> None:
        """Read the environment variables.

        Args:
            base_url: address of the endpoint; default: the value of OPENAI_BASE_URL or, if that is not set, OpenAI's
                address.
            headers, query: sent with each request; `env:NAME` stands for the value of the environment variable NAME.
            needs_key: whether an error is raised if the variable `api_key_env`, or one that `env:NAME` names, is not
                set. An endpoint on this machine never needs `api_key_env`.
            group: the config group whose options the error messages name.

        Raises:
            ConfigError: an environment variable is missing or cannot be used, or OPENAI_BASE_URL is not an address.
        """
        self.address = base_url or os.environ.get("OPENAI_BASE_URL") or None
        if self.address and not base_url:
            endpoint_address("OPENAI_BASE_URL", self.address, api_key_env)
        self.address = self.address and self.address.rstrip("/")  # a slash at the end does not change the endpoint
        self._api_key_env, self._needs_key, self._group = api_key_env, needs_key, group
        self._secrets: list[str] = []
        key = self._secret(api_key_env)
        is_local = self.address is not None and urlsplit(self.address).hostname in LOOPBACK
        if needs_key and not key and not is_local:
            raise ConfigError(
                f"the endpoint needs an API key in the environment variable {api_key_env} ({group}.api_key_env); "
                f"set it, or give a {group}.base_url on this machine"
            )
        self._headers = {"Authorization": f"Bearer {key or 'none'}", **self._filled("extra_headers", headers)}
        self._query = self._filled("extra_query", query)

    def _filled(self, option: str, given: Mapping[str, str] | None) -> dict[str, str]:
        """Return headers or query parameters, with `env:NAME` replaced by the value of the variable NAME."""
        values = dict(given or {})
        for name, value in values.items():
            if value.startswith(FROM_ENVIRONMENT):
                variable = value.removeprefix(FROM_ENVIRONMENT)
                values[name] = self._secret(variable)
                if self._needs_key and not values[name]:
                    given_as = f"{self._group}.{option}.{name}"
                    raise ConfigError(f"{given_as} is the environment variable {variable}, which is not set; set it")
        return values

    def _secret(self, variable: str) -> str:
        """Return the value of an environment variable, or "" if the variable is not set.

        From then on `_scrub` hides the value, unless it is too short to be a key.
        """
        value = os.environ.get(variable, "").strip()
        if not (value.isascii() and value.isprintable()):
            raise ConfigError(f"the environment variable {variable} holds characters that no key has; correct it")
        if len(value) >= _SHORTEST_SECRET:  # a shorter value, such as "none", may occur in any reply
            self._secrets.append(value)
        return value

    def _scrub(self, text: str) -> str:
        """Return a text with `***` in place of each secret: some endpoints quote the key that they were sent."""
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return text

    def client(self) -> AsyncClient:
        """Return an HTTP client for `request`, without a timeout and without a limit on connections."""
        import httpx2 as httpx

        return httpx.AsyncClient(
            headers=self._headers,
            params=self._query,
            timeout=None,
            limits=httpx.Limits(),
            follow_redirects=False,  # a redirect leads to a login page, or takes the headers to another address
        )

    async def request(
        self, client: AsyncClient, prompt: Messages, parameters: Mapping[str, Any], timeout: float
    ) -> tuple[Completion, Usage | None]:
        """Send a prompt. Return the reply, and the token counts that the endpoint reports, or None if it reports none.

        Args:
            parameters: the request's parameters, such as model and temperature.
            timeout: seconds for the whole request, from the connection to the end of the response.

        Raises:
            Failure: the prompt has no reply.
        """
        import httpx2 as httpx

        path, shown = "chat/completions", dict[str, Any](messages=list(prompt))
        if prompt[0]["role"] == _TOKENS:
            path, shown = "completions", {"prompt": [int(token) for token in prompt[0]["content"].split()]}
        try:
            async with asyncio.timeout(timeout):
                response = await client.post(f"{self.address or _DEFAULT}/{path}", json={**shown, **parameters})
        # `from None`: the original errors may quote the key
        except (httpx.TimeoutException, TimeoutError):
            remedy = f"raise judge.timeout={timeout:g} seconds"
            raise Failure("passing", "the request timed out", remedy, charged=True) from None
        except httpx.RequestError as error:
            message = self._scrub(f"no reply arrived ({type(error).__name__}: {error})")
            remedy = "check the network and judge.base_url"
            raise Failure("passing", message, remedy, charged=not isinstance(error, httpx.ConnectError)) from None
        if not response.is_success:
            raise self._failure(response, parameters["model"])
        try:
            (content,) = outside_json.loads_all(response.content.decode("utf-8"))
            return self._completion(content, bool(parameters.get("logprobs"))), _reported(content.get("usage"))
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            raise self._unreadable(response, error) from None

    def _completion(self, content: Any, logprobs: bool) -> Completion:
        """Return the first choice of a response.

        The text of the completion is empty if the response has no choice, or if the choice has no text.
        """
        choice = content["choices"][0] if content["choices"] else {"message": {}}
        message = choice["message"] if "message" in choice else {"content": choice["text"]}
        text = message.get("content")
        if isinstance(text, list):
            text = "".join(part["text"] for part in text if part["type"] in ("text", "output_text"))
        # a refusal and a function's arguments are in separate fields
        text = text or message.get("refusal") or ""
        if calls := message.get("tool_calls"):
            text = calls[0]["function"]["arguments"]
        if not isinstance(text, str):
            raise TypeError("the content is not text")
        tokens = (choice.get("logprobs") or {}).get("content") if logprobs else None
        kept = [
            _logprob(token) | {"top_logprobs": list(map(_logprob, token.get("top_logprobs") or []))}
            for token in tokens or []
        ]
        finish = choice.get("finish_reason")
        return Completion(self._scrub(text), finish if isinstance(finish, str) else None, kept or None)

    def _unreadable(self, response: Response, error: Exception) -> Failure:
        """Return the failure for a response that is no chat completion.

        The failure is final for a response that every prompt would get, such as a web page.
        """
        content, kind = response.content, self._scrub(response.headers.get("content-type", "no content type"))
        is_page = content.lstrip().startswith(b"<") or "json" not in kind.lower()
        # secrets are removed before texts are cut or quoted, which would change them
        shown, reason = self._scrub(content.decode("utf-8", "replace"))[:200], self._scrub(str(error))[:200]
        message = f"the endpoint's reply is not a complete chat completion ({kind}; {reason}): {shown!r}"
        final = is_page or isinstance(error, outside_json.RepeatedKeyError)
        remedy = "check judge.base_url, and whether the address asks for a login"
        return Failure("final" if final else "passing", message, remedy, charged=True)

    def _failure(self, response: Response, model: str) -> Failure:
        """Return the failure for a response with an HTTP error status."""
        status, error = response.status_code, dict[str, Any]()
        with suppress(ValueError):
            content = outside_json.loads(response.content)
            described = content.get("error", content) if isinstance(content, dict) else {}
            error = described if isinstance(described, dict) else {"message": described}
        code = str(error.get("code") or error.get("type") or "")
        words = self._scrub(str(error.get("message") or response.text)).split()
        message = f"HTTP {status}: {' '.join(words)}"[:300]
        if status in (400, 413, 422):
            shown = f" ({self._scrub(code)[:60]})" if code else ""
            remedy = (
                "check judge.model, judge.max_tokens and what the endpoint accepts (judge.token_parameter, "
                "judge.temperature=null, judge.system_role=false, judge.extra_body)"
            )
            return Failure("refused", message, remedy, reason=f"the endpoint refuses it, HTTP {status}{shown}")
        if code == _NO_CREDIT or status == 402:
            return Failure("final", f"the account has no credit left: {message}")
        if status in (408, 409, 429) or status >= 500:
            return Failure("passing", message, wait=retry_after(response.headers))
        if status in (401, 403):
            return Failure("final", message, f"check the key in the environment variable {self._api_key_env}")
        return Failure("final", message, f"check judge.model={model} and judge.base_url")


def _logprob(token: Mapping[str, Any]) -> dict[str, Any]:
    return {"token": str(token["token"]), "logprob": float(token["logprob"])}


def _reported(usage: Any) -> Usage | None:
    if not isinstance(usage, dict):
        return None
    prompt, completion = usage.get("prompt_tokens"), usage.get("completion_tokens")
    if not isinstance(prompt, int) or not isinstance(completion, int) or min(prompt, completion) < 0:
        return None
    return Usage(prompt, completion)


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Return the seconds to wait that the header `retry-after-ms` or `retry-after` gives; None if neither can be read.

    The value of `retry-after` is a number of seconds or a date.
    """
    for name, unit in (("retry-after-ms", 1000.0), ("retry-after", 1.0)):
        with suppress(ValueError):
            seconds = float(headers.get(name, "")) / unit
            if 0 <= seconds < math.inf:
                return seconds
    try:
        moment = parsedate_to_datetime(headers.get("retry-after", ""))
    except (ValueError, TypeError):
        return None
    return max(0.0, moment.timestamp() - time.time())


def token_prompt(ids: Sequence[int]) -> Messages:
    """Return token ids in the form of messages; `request` sends them without a chat template, as text to continue."""
    return [{"role": _TOKENS, "content": " ".join(map(str, ids))}]


def without_system(messages: Messages) -> Messages:
    """Return the messages with the text of system messages moved to the beginning of the first other message."""
    system = "\n\n".join(message["content"] for message in messages if message["role"] == "system")
    others = [dict(message) for message in messages if message["role"] != "system"]
    if system and others:
        others[0]["content"] = f"{system}\n\n{others[0]['content']}"
    return others or [{"role": "user", "content": system}]


def estimated_tokens(messages: Messages) -> int:
    """Estimate the number of tokens of a prompt from its bytes; exact counts would need each model's own tokenizer."""
    return sum(tokens_of(message["content"]) + _TOKENS_PER_MESSAGE for message in messages)


def tokens_of(text: str) -> int:
    return math.ceil(len(text.encode("utf-8", "replace")) / BYTES_PER_TOKEN)
