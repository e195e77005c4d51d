"""Scorers and selectors as configured functions, and the sources that they ask for.

The positional parameters of such a function name its sources, and the pipeline computes only these sources. The
function's keyword-only parameters are constants, which come from its YAML file.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path
from typing import Any

from gradsift.artifacts import Artifact
from gradsift.errors import ConfigError


@dataclass(frozen=True)
class Source:
    """An input that a scorer or selector can ask for: the artifacts that contain it, and how to read it from them."""

    artifacts: Callable[[], Sequence[Artifact]]
    value: Callable[[], Any]
    settings: Mapping[str, Any] = field(default_factory=dict)  # further options that determine the value; JSON values
    reads_tokens: bool = False  # whether the input is computed from the pool's tokens in the proxy's template


@dataclass(frozen=True)
class Method:
    """A scorer or a selector with its configured constants."""

    name: str
    target: str  # package.module.function
    function: Callable[..., Any]
    asked: tuple[str, ...]  # names of its sources
    constants: Mapping[str, Any]
    code: str = ""  # SHA-256 of a user's own code; gradsift's own functions are versioned by hand

    def parents(self, sources: Mapping[str, Source]) -> list[Artifact]:
        """Return the artifacts that the result is computed from; artifacts that do not exist are made."""
        return [artifact for parameter in self.asked for artifact in sources[parameter].artifacts()]

    def settings(self, sources: Mapping[str, Source]) -> dict[str, Any]:
        """Return the settings that the result depends on besides its parents."""
        settings = {"name": self.name, "function": self.target, **self.constants}
        for parameter in self.asked:
            settings |= {f"{parameter}.{option}": value for option, value in sources[parameter].settings.items()}
        if self.code:
            settings["source"] = self.code
        return settings

    def __call__(self, *leading: Any, sources: Mapping[str, Source]) -> Any:
        return self.function(*leading, *(sources[parameter].value() for parameter in self.asked), **self.constants)


_texts: dict[str, str] = {}  # source text that each module of the user was imported with


def method(kind: str, config: Any, known: Sequence[str], leading: Sequence[str] = ()) -> Method:
    """Return the scorer or selector whose function `config._target_` names, after a check of the function's parameters.

    Args:
        kind: `scorer` or `selector`; names the options in errors.
        config: a dataclass of gradsift or a user's mapping, with `_target_`, `name` and the constants.
        known: names of the sources.
        leading: names of the first positional parameters, which are not sources.

    Raises:
        ConfigError: the function does not exist, a source or a constant is not known, or a constant has no value.
    """
    options = asdict(config) if is_dataclass(config) and not isinstance(config, type) else dict(config)
    for key in ("_target_", "name"):
        if not isinstance(options.get(key), str):
            raise ConfigError(f"{kind}.{key} is missing; a {kind}'s YAML names its function and itself")
    target, name = options.pop("_target_"), options.pop("name")
    function, code = _resolve(kind, target)
    return method_of(kind, name, function, options, known, leading, target=target, code=code)


def method_of(
    kind: str,
    name: str,
    function: Callable[..., Any],
    options: Mapping[str, Any],
    known: Sequence[str],
    leading: Sequence[str] = (),
    *,
    target: str,
    code: str,
) -> Method:
    """Return a function as a scorer or selector, with `options` as its constants.

    Args:
        target: name of the function in the fingerprint of its results.
        code: SHA-256 of its code; empty for a function of gradsift.

    Raises:
        ConfigError: see `method`.
    """
    parameters = inspect.signature(function).parameters
    keyword_only = [n for n, p in parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY]
    positional = [n for n in parameters if n not in keyword_only]
    if positional[: len(leading)] != list(leading):
        raise ConfigError(f"{kind}={name} must take {', '.join(leading)} first; see gradsift.selection")
    asked = positional[len(leading) :]
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
    return Method(name, target, function, tuple(asked), options, code)


def _resolve(kind: str, target: str) -> tuple[Callable[..., Any], str]:
    """Return the function `target` and the SHA-256 of its module's source text ('' for a function of gradsift)."""
    module_name, _, function_name = target.rpartition(".")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)  # last: a user's file never hides an installed package
    try:
        module = importlib.import_module(module_name)
        function: Callable[..., Any] = getattr(module, function_name)
        if not inspect.isfunction(function):
            raise ConfigError(f"{kind}._target_={target} is no function; a {kind} is one")
        if target.startswith("gradsift."):
            return function, ""
        text = _text_of(kind, target, function)
        if _texts.setdefault(function.__module__, text) != text:  # edited since its import, as in a notebook
            importlib.reload(sys.modules[function.__module__])
            _texts[function.__module__] = text
            function = getattr(importlib.reload(module), function_name)
    except (ImportError, AttributeError, ValueError, SyntaxError) as error:
        raise ConfigError(
            f"{kind}._target_={target} cannot be imported ({error}); give package.module.function"
        ) from error
    return function, hashlib.sha256(text.encode()).hexdigest()


def _text_of(kind: str, target: str, function: Callable[..., Any]) -> str:
    """Return the source text of the module that defines the function."""
    try:
        return inspect.getsource(sys.modules[function.__module__])
    except (TypeError, OSError) as error:
        raise ConfigError(
            f"{kind}._target_={target}: the source text of {function.__module__} cannot be read ({error}), and it is "
            "part of the identity of the scores; put the function into a .py file"
        ) from error
