"""Dataclass fields that state their range or choices, and checks of single values.

    members: int = option(5, least=1)
    collect: str = option("epoch_end", choices=("epoch_end", "during_training"))

The checks run when an instance of the dataclass is created. Errors name the option, the value and the remedy.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any, ClassVar
from urllib.parse import urlsplit

from gradsift.config.bounds import require_bound
from gradsift.errors import ConfigError

FROM_ENVIRONMENT = "env:"  # prefix of a value that names an environment variable, which is read when needed
_SECRET_NAME = re.compile(
    r"auth|key|token|secret|passw|cookie|session|credential|signature|^(sig|code)$", re.IGNORECASE
)


def option(
    default: Any,
    *,
    choices: tuple[str, ...] | None = None,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
) -> Any:
    """Return a dataclass field whose value is checked.

    In a list, every item is checked. The value None is accepted unless there are `choices`.

    Args:
        default: the default value.
        choices: the words that can be given.
        least: the smallest number that can be given.
        above: a number that the value must exceed.
        most: the largest number that can be given.
        below: a number that the value must stay below.
    """
    limits = {"choices": choices, "least": least, "above": above, "most": most, "below": below}
    metadata = {name: limit for name, limit in limits.items() if limit is not None}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


class Group:
    """Base class of the config groups. It checks the fields made with `option`, and the bounds of all integers."""

    _option: ClassVar[str] = ""  # path of the group in the config, for errors

    def __init_subclass__(cls, option: str | None = None) -> None:
        if option is not None:
            cls._option = option

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # type: ignore[arg-type]  # every subclass is a dataclass
            value, name = getattr(self, field.name), f"{self._option}.{field.name}".lstrip(".")
            for each in value if isinstance(value, list) else [value]:
                if isinstance(each, int) and not isinstance(each, bool):
                    require_bound(name, each)
                if "choices" in field.metadata:
                    one_of(name, each, field.metadata["choices"])
                elif field.metadata and each is not None:
                    in_range(name, each, **field.metadata)


def one_of(option: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raise ConfigError unless `value` is one of `choices`."""
    if value not in choices:
        raise ConfigError(f"{option}={value!r} is not known; choose one of: {', '.join(choices)}")


def in_range(
    option: str,
    value: float,
    *,
    least: float = -math.inf,
    above: float = -math.inf,
    most: float = math.inf,
    below: float = math.inf,
) -> None:
    """Raise ConfigError unless `value` is finite and within the limits."""
    if -math.inf < value < math.inf and least <= value <= most and above < value < below:
        return
    limits = {"of at least": least, "above": above, "up to": most, "below": below}
    wanted = " and ".join(f"{words} {limit:,g}" for words, limit in limits.items() if math.isfinite(limit))
    raise ConfigError(f"{option}={value} is out of range; give a finite number {wanted}")


def require_secrets_elsewhere(option: str, values: Mapping[str, Any]) -> None:
    """Raise ConfigError if a value's name suggests a secret, and the value does not have the form `env:NAME`.

    `env:NAME` stands for the value of an environment variable. A secret itself would be written, with the config, to
    the run's folder and to the tracker. A value that is not printable text is refused too.
    """
    for name, value in values.items():
        if not isinstance(value, str):
            raise ConfigError(f"{option}.{name} is no text; give it in quotes: '{option}={{{name}: \"...\"}}'")
        if value.startswith(FROM_ENVIRONMENT):
            if not re.fullmatch(r"[A-Za-z_]\w*", value.removeprefix(FROM_ENVIRONMENT)):
                raise ConfigError(f"{option}.{name} names no environment variable; give env:NAME")
        elif _SECRET_NAME.search(name):
            raise ConfigError(
                f"{option}.{name} is a secret by its name, and the config is written to the run's folder; put the "
                f"value into an environment variable and give its name: {option}.{name}=env:NAME"
            )
        elif not value.isprintable():
            raise ConfigError(f"{option}.{name} holds a character that cannot be sent; give printable text")


def require_no_typed_secret(option: str, value: str) -> None:
    """Raise ConfigError if an override holds a secret; Hydra writes overrides to the run's folder as they are typed."""
    if not re.match(r"judge\.extra_(headers|query)\b", option):
        return
    group, name, *key = option.split(".", 2)
    in_braces = re.findall(r"([\w-]+)['\"]?\s*:\s*['\"]?([^,}'\"]*)", value)
    values = {key[0]: value} if key else dict(in_braces)
    # an interpolation (${...}) is checked later, when its value is known
    typed = {header: each for header, each in values.items() if not each.startswith("${")}
    require_secrets_elsewhere(f"{group}.{name}", typed)


def endpoint_address(option: str, url: str, api_key_env: str) -> None:
    """Raise ConfigError if an address cannot be used, or may hold a secret.

    A secret in an address would be written to manifests.
    """
    if "@" in url or "?" in url:
        query = ", and other parameters into judge.extra_query={NAME: VALUE}" if option.startswith("judge.") else ""
        raise ConfigError(
            f"{option} holds a user name, a password or a query, which would be written to the run's folder; "
            f"put the key into the environment variable {api_key_env}" + query
        )
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # brackets, or a port that is no number
        usable = False
    if not usable or any(character.isspace() for character in url):
        raise ConfigError(f"{option}={url!r} is no endpoint's address; give one like http://127.0.0.1:8000/v1")
