"""What a scorer or a selector may ask for, and how its signature asks.

Both are functions. Their positional parameters name what they need, and the pipeline computes nothing
else; their keyword-only parameters are constants, filled from their YAML file.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass
from typing import Any

from gradsift.artifacts import Artifact
from gradsift.errors import ConfigError


@dataclass(frozen=True)
class Source:
    """Something that may be asked for: the artifacts it comes from, and how to read it from them."""

    artifacts: Callable[[], Sequence[Artifact]]
    value: Callable[[], Any]
    settings: Mapping[str, Any] = field(default_factory=dict)  # options of the run that it comes from; JSON values


@dataclass(frozen=True)
class Method:
    """A scorer or a selector as it is configured."""

    name: str
    target: str  # package.module.function
    function: Callable[..., Any]
    asked: tuple[str, ...]  # names of its sources
    constants: Mapping[str, Any]

    def parents(self, sources: Mapping[str, Source]) -> list[Artifact]:
        """What the result is computed from; makes it where it is not there."""
        return [artifact for parameter in self.asked for artifact in sources[parameter].artifacts()]

    def settings(self, sources: Mapping[str, Source]) -> dict[str, Any]:
        """What the result depends on besides its parents."""
        settings = {"name": self.name, "function": self.target, **self.constants}
        for parameter in self.asked:
            settings |= {f"{parameter}.{option}": value for option, value in sources[parameter].settings.items()}
        if not self.target.startswith("gradsift."):  # ours are versioned by hand, a user's own by its text
            text = inspect.getsource(inspect.getmodule(self.function) or self.function)
            settings["source"] = hashlib.sha256(text.encode()).hexdigest()
        return settings

    def __call__(self, *given: Any, sources: Mapping[str, Source]) -> Any:
        return self.function(*given, *(sources[parameter].value() for parameter in self.asked), **self.constants)


def method(kind: str, config: Any, known: Sequence[str], given: Sequence[str] = ()) -> Method:
    """The function that `config._target_` names, with its constants, checked against its signature.

    Args:
        kind: `scorer` or `selector`; names the options in errors.
        config: a dataclass of ours or a mapping of the user's own, with `_target_` and `name`.
        known: names of the sources.
        given: the first positional parameters, which are no sources.

    Raises:
        ConfigError: no such function, a source or a constant that is not known, a constant without a value.
    """
    options = asdict(config) if is_dataclass(config) and not isinstance(config, type) else dict(config)
    for key in ("_target_", "name"):
        if not isinstance(options.get(key), str):
            raise ConfigError(f"{kind}.{key} is missing; a {kind}'s YAML names its function and itself")
    target, name = options.pop("_target_"), options.pop("name")
    function = _resolve(kind, target)
    parameters = inspect.signature(function).parameters
    keyword_only = [n for n, p in parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY]
    positional = [n for n in parameters if n not in keyword_only]
    if positional[: len(given)] != list(given):
        raise ConfigError(f"{kind}={name} must take {', '.join(given)} first; see gradsift.selection")
    asked = positional[len(given) :]
    for parameter in asked:
        if parameter not in known:
            raise ConfigError(f"{kind}={name} asks for {parameter!r}; a {kind} can ask for {', '.join(known)}")
    for option in options:
        if option not in keyword_only:
            has = ", ".join(keyword_only) or "none"
            raise ConfigError(f"{kind}.{option} is no constant of {kind}={name}; it has {has}")
    for constant in keyword_only:
        if constant not in options and parameters[constant].default is inspect.Parameter.empty:
            raise ConfigError(f"{kind}.{constant} is not set, and {kind}={name} has no default for it")
    return Method(name, target, function, tuple(asked), options)


def _resolve(kind: str, target: str) -> Callable[..., Any]:
    """The function at package.module.function."""
    module_name, _, function_name = target.rpartition(".")
    try:
        function: Callable[..., Any] = getattr(importlib.import_module(module_name), function_name)
        if not inspect.isfunction(function):
            raise ConfigError(f"{kind}._target_={target} is no function; a {kind} is one")
    except (ImportError, AttributeError, ValueError, SyntaxError) as error:
        raise ConfigError(
            f"{kind}._target_={target} cannot be imported ({error}); give package.module.function"
        ) from error
    return function
