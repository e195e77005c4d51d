"""Checks of single values; their errors name the option, the value and the remedy."""

from __future__ import annotations

import math
from urllib.parse import urlsplit

from gradsift.errors import ConfigError


def one_of(option: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{option}={value!r} is not known; choose one of: {', '.join(choices)}")


def at_least(option: str, value: float | None, least: float) -> None:
    if value is not None and not least <= value < math.inf:
        raise ConfigError(f"{option}={value} is out of range; give at least {least}, and a finite number")


def positive(option: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ConfigError(f"{option}={value} must be greater than 0 and finite")


def warmup_fits(option: str, warmup: int, steps: int) -> int:
    """The warm-up's steps, which must leave some of `steps` optimiser steps: it starts at a learning rate of 0."""
    if 0 < steps <= warmup:
        raise ConfigError(
            f"{option} warms up over {warmup:,} of {steps:,} optimiser steps, so the learning rate never reaches its "
            "full value; give a shorter warm-up (0 for none) or train for longer"
        )
    return warmup


def endpoint_address(option: str, url: str, api_key_env: str) -> None:
    """Refuse an address that no request can be sent to, or that holds a secret: addresses are written to manifests."""
    if "@" in url or "?" in url:
        raise ConfigError(
            f"{option} holds a user name, a password or a query, which would be written to the run's folder; "
            f"put the key into the environment variable {api_key_env}"
        )
    try:
        parts = urlsplit(url)
        whole = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # brackets, or a port that is no number
        whole = False
    if not whole or any(character.isspace() for character in url):
        raise ConfigError(f"{option}={url!r} is no endpoint's address; give one like http://127.0.0.1:8000/v1")
