"""Address, key, headers and query of a chat endpoint. Its secrets are removed from messages and replies."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from gradsift.config.checks import FROM_ENVIRONMENT, endpoint_address
from gradsift.data.download import LOOPBACK
from gradsift.errors import ConfigError

if TYPE_CHECKING:
    from httpx2 import AsyncClient

_DEFAULT = "https://api.openai.com/v1"
_SHORTEST_SECRET = 8  # characters; no real key has fewer


class Endpoint:
    """An endpoint that speaks OpenAI's chat protocol.

    Attributes:
        address: the endpoint's base URL; None means OpenAI's.
        settings: headers and query as configured, without the values of environment variables. They are part of the
            hash under which a reply is stored.
    """

    def __init__(
        self,
        base_url: str | None,
        api_key_env: str,
        headers: Mapping[str, str] | None = None,
        query: Mapping[str, str] | None = None,
        *,
        needs_key: bool = True,
    ) -> None:
        """Check address and key, and read the environment variables.

        Args:
            base_url: the endpoint's base URL; default: the value of OPENAI_BASE_URL.
            api_key_env: name of the environment variable that holds the key.
            headers: sent with each request; a value `env:NAME` stands for the value of the environment variable NAME.
            query: parameters added to the address; values `env:NAME` as in `headers`.
            needs_key: whether a missing key, or another missing variable, is an error. Endpoints on this machine never
                need a key.

        Raises:
            ConfigError: a variable is missing or holds no usable value, or OPENAI_BASE_URL is not an address.
        """
        self.api_key_env = api_key_env
        address = base_url or os.environ.get("OPENAI_BASE_URL")
        if address:
            endpoint_address("judge.base_url" if base_url else "OPENAI_BASE_URL", address, api_key_env)
        self.address = address.rstrip("/") if address else None  # a slash at the end does not change the endpoint
        given = {"extra_headers": dict(headers or {}), "extra_query": dict(query or {})}
        self.settings = {name: values for name, values in given.items() if values}
        self._key = _api_key(api_key_env, self.address, needs_key)
        self._secrets = [self._key] if self._key else []
        self._headers, self._query = (
            {key: self._value(f"judge.{name}.{key}", value, needs_key) for key, value in values.items()}
            for name, values in given.items()
        )

    def _value(self, option: str, value: str, needed: bool) -> str:
        if not value.startswith(FROM_ENVIRONMENT):
            return value
        variable = value.removeprefix(FROM_ENVIRONMENT)
        secret = os.environ.get(variable, "").strip()
        if not secret and needed:
            raise ConfigError(f"{option} is the environment variable {variable}, which is not set; set it")
        _require_sendable(variable, secret)
        self._secrets.append(secret)
        return secret

    def client(self) -> AsyncClient:
        """Return an HTTP client for the endpoint. `ChatClient` limits the time and the number of its requests."""
        import httpx2 as httpx

        return httpx.AsyncClient(
            headers={"Authorization": f"Bearer {self._key or 'none'}", **self._headers},
            params=self._query,
            timeout=None,
            limits=httpx.Limits(),  # no limits here
            follow_redirects=False,  # a redirect leads to a login page, or takes the headers to another address
        )

    def url(self, path: str) -> str:
        """Return the URL of `path` at the endpoint."""
        return f"{self.address or _DEFAULT}/{path}"

    def scrub(self, text: str) -> str:
        """Return a text with `***` in place of each secret, because some endpoints quote secrets.

        Values of fewer than 8 characters, such as "none", are kept.
        """
        for secret in self._secrets:
            if len(secret) >= _SHORTEST_SECRET:
                text = text.replace(secret, "***")
        return text


def _require_sendable(variable: str, secret: str) -> None:
    if not (secret.isascii() and secret.isprintable()):
        raise ConfigError(f"the environment variable {variable} holds characters that no API key has")


def _api_key(variable: str, address: str | None, needed: bool) -> str | None:
    key = os.environ.get(variable, "").strip()
    _require_sendable(variable, key)
    if not key and needed and (address is None or urlsplit(address).hostname not in LOOPBACK):
        raise ConfigError(
            f"the endpoint needs an API key in the environment variable {variable} (judge.api_key_env); "
            "set it, or give a judge.base_url on this machine"
        )
    return key or None
