"""Checks of single values; their errors name the option, the value and the remedy."""

from __future__ import annotations

import math

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
