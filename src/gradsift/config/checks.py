"""Dataclass fields that state their range or choices, upper bounds for all integers, and checks of single values.

    members: int = option(5, least=1)
    collect: str = option("epoch_end", choices=("epoch_end", "during_training"))

The checks run when an instance of the dataclass is created. Errors name the option, the value and the remedy.
"""

from __future__ import annotations

import dataclasses
import math
import operator
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import urlsplit

from gradsift.errors import ConfigError

# the dataclasses by group, and by <name> in a file's `/schema/<group>@_here_: <name>`
SCHEMAS: dict[str, dict[str, type]] = {}
FROM_ENVIRONMENT = "env:"  # prefix of a value that names an environment variable, which is read when needed
_SECRET_NAME = re.compile(
    r"auth|key|token|secret|passw|cookie|session|credential|signature|^(sig|code)$", re.IGNORECASE
)
# A larger value is probably a typing error: each bound is far above every published or computable value, and a value
# above it could exhaust the memory. No bound depends on the machine, because a sweep's jobs may run on another machine.
# The last entry is the reason, and ends the sentence "OPTION=VALUE is more than BOUND, ...".
_BOUNDS = (
    ("seed projection_seed", 2**32 - 1, "the largest seed that numpy and scikit-learn take"),
    ("max_length max_new_tokens max_tokens", 2**24, "more than the context of any model"),
    ("batch_size", 2**16, "more than any training or generation takes at once"),
    ("epochs snapshots", 10_000, "which nobody could train"),
    ("steps warmup_steps", 1_000_000, "which nobody could train; the batches of all steps are known before the first"),
    ("members", 1000, "more than any published ensemble has; the paper has 5"),
    ("rank", 4096, "more than any published rank; a rank above a layer's smaller side adds nothing"),
    ("shards shard", 10_000, "the largest number of jobs of a sweep"),
    ("size", 10_000_000, "the limit for data that is generated in memory"),
    ("benchmark_items target_set.limit", 1_000_000, "the limit for data that is generated in memory"),
    ("dimensions", 2**20, "above which a projection saves nothing"),
    ("concurrency", 1000, "more than any endpoint answers at once"),
    ("retries", 1000, "which would take days"),
    ("clusters", 1_000_000, "more than k-means can compute"),
    ("threads num_nodes", 4096, "more than any machine or cluster has"),
    ("devices", 1024, "more than any machine has"),
    ("tokens", 2**30, "more than any memory holds at once"),
)
# bound and reason, by the full name of an option or by its last part
MOST = {name: (most, reason) for names, most, reason in _BOUNDS for name in names.split()}
_LIMITS: dict[str, tuple[str, Callable[[float, float], bool]]] = {  # the words in errors, and the condition
    "least": ("of at least", operator.ge),
    "above": ("above", operator.gt),
    "most": ("up to", operator.le),
    "below": ("below", operator.lt),
}


def option(default: Any, *, choices: tuple[str, ...] | None = None, **limits: float) -> Any:
    """Return a dataclass field whose value must be one of `choices`, or a number within the limits (see `in_range`).

    With `folder=True` the value is the path of a folder instead, in which `~` is replaced by the home folder. If the
    value is a list, every item is checked. The value None is accepted unless there are `choices`.
    """
    metadata = limits if choices is None else {"choices": choices}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


class Group:
    """Base class of the config groups.

    Creating an instance checks the fields made with `option`, and that no integer is above its bound.
    """

    _option: ClassVar[str] = ""  # path of the group in the config, for errors

    def __init_subclass__(cls, option: str | None = None, schema: str | None = None) -> None:
        """Register the dataclass as a schema.

        Args:
            option: path of the group in the config; None: the same path as that of the base class.
            schema: name by which a file in `conf/<group>/` chooses this dataclass as its schema; None: no file can
                choose it.
        """
        if option is not None:
            cls._option = option
        if schema is not None:
            SCHEMAS.setdefault(cls._option, {})[schema] = cls

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # type: ignore[arg-type]  # every subclass is a dataclass
            value, name = getattr(self, field.name), f"{self._option}.{field.name}".lstrip(".")
            for each in value if isinstance(value, list) else [value]:
                if isinstance(each, int) and not isinstance(each, bool):
                    require_bound(name, each)
                if "choices" in field.metadata:
                    one_of(name, each, field.metadata["choices"])
                elif "folder" in field.metadata:
                    if not each:
                        raise ConfigError(f"{name} names no folder; give one, as in {name}=DIR")
                    setattr(self, field.name, str(Path(each).expanduser()))
                elif field.metadata and each is not None:
                    in_range(name, each, **field.metadata)
        self.check()

    def check(self) -> None:
        """Raise ConfigError if the values contradict each other; subclasses override this method."""


def require_bound(option: str, value: int) -> None:
    """Raise ConfigError if `value` is above the bound of the option.

    The bound is that in `MOST`, or 10^12 if `MOST` has none for the option.
    """
    last = option.rpartition(".")[2].removeprefix("--")  # an option of a command is given as --seed
    most, reason = MOST.get(option) or MOST.get(last, (10**12, "more than any data has"))
    if value > most:
        shown = value if value < 10**30 else "(a number of more than 30 digits)"
        raise ConfigError(f"{option}={shown} is more than {most:,}, {reason}; give less")


def one_of(option: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raise ConfigError unless `value` is one of `choices`."""
    if value not in choices:
        raise ConfigError(f"{option}={value!r} is not known; choose one of: {', '.join(choices)}")


def each_once(option: str, values: list[Any], known: str = "") -> None:
    """Raise ConfigError if a list is empty or has equal items; `known`, such as "; known: a, b", ends the message."""
    if not values or len(set(values)) < len(values):
        raise ConfigError(f"{option}={list(values)} must name at least one, and each once{known}")


def in_range(option: str, value: float, **limits: float) -> None:
    """Raise ConfigError unless `value` is finite and within the limits.

    Each limit is a keyword argument whose name is a key of `_LIMITS`, as in `above=0`.
    """
    if -math.inf < value < math.inf and all(_LIMITS[name][1](value, limit) for name, limit in limits.items()):
        return
    wanted = " and ".join(f"{_LIMITS[name][0]} {limit:,g}" for name, limit in limits.items())
    raise ConfigError(f"{option}={value} is out of range; give a finite number {wanted}")


def require_secrets_elsewhere(option: str, values: Mapping[str, Any]) -> None:
    """Raise ConfigError for a value that is not printable text, and for a secret that is not given as `env:NAME`.

    The name of a value, such as `api_key`, decides whether it is a secret. `env:NAME` stands for the value of the
    environment variable NAME. A secret in the config itself would be written to the run's folder and sent to the
    tracker.
    """
    for name, value in values.items():
        if not isinstance(value, str):
            raise ConfigError(f"{option}.{name} is not text; give it in quotes: '{option}={{{name}: \"...\"}}'")
        if value.startswith(FROM_ENVIRONMENT):
            if not re.fullmatch(r"[A-Za-z_]\w*", value.removeprefix(FROM_ENVIRONMENT)):
                raise ConfigError(f"{option}.{name} names no environment variable; give env:NAME")
        elif _SECRET_NAME.search(name):
            raise ConfigError(
                f"{option}.{name} is a secret, judging by its name, and the config is written to the run's folder; put "
                f"the value into an environment variable and give its name: {option}.{name}=env:NAME"
            )
        elif not value.isprintable():
            raise ConfigError(f"{option}.{name} holds a character that cannot be sent; give printable text")


def require_no_typed_secret(option: str, value: str) -> None:
    """Raise ConfigError if an override of the judge's headers or query parameters contains a secret as plain text.

    Hydra writes overrides to the run's folder as they are typed.
    """
    if not re.match(r"judge\.extra_(headers|query)\b", option):
        return
    group, name, *key = option.split(".", 2)
    in_braces = re.findall(r"([\w-]+)['\"]?\s*:\s*['\"]?([^,}'\"]*)", value)
    values = {key[0]: value} if key else dict(in_braces)
    # an interpolation (${...}) is checked later, when its value is known
    typed = {header: each for header, each in values.items() if not each.startswith("${")}
    require_secrets_elsewhere(f"{group}.{name}", typed)


def endpoint_address(option: str, url: str, api_key_env: str) -> None:
    """Raise ConfigError if the address `url` is not valid, or has a part that may be a secret.

    Manifests contain addresses, so a secret in an address would be written to the store. The error message tells the
    user to put the secret into the environment variable `api_key_env` instead.
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
    except ValueError:  # brackets, or a port that is not a number
        usable = False
    if not usable or any(character.isspace() for character in url):
        raise ConfigError(f"{option}={url!r} is not the address of an endpoint; give one like http://127.0.0.1:8000/v1")
