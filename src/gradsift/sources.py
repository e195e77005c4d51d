"""Scorers and selectors: functions whose positional parameters name their inputs (sources).

The functions' keyword-only parameters are constants, whose values come from the config.
"""

from __future__ import annotations

import ast
import dis
import functools
import hashlib
import importlib
import inspect
import sys
import sysconfig
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path, PurePath
from types import CodeType, EllipsisType, FunctionType, ModuleType
from typing import TYPE_CHECKING, Any

from gradsift.errors import ConfigError

if TYPE_CHECKING:
    from gradsift.artifacts import Artifact

_INSTALLED = tuple(sysconfig.get_paths()[name] for name in ("stdlib", "platstdlib", "purelib", "platlib"))
_PLAIN = (type(None), bool, int, float, complex, str, bytes, range, EllipsisType, PurePath)


@dataclass(frozen=True)
class Source:
    """An input that a scorer or selector can ask for: the artifacts that contain it, and how to read it from them."""

    artifacts: Callable[[], Sequence[Artifact]]
    value: Callable[[], Any]
    settings: Mapping[str, Any] = field(default_factory=dict)  # further options that determine the value; JSON values
    reads_tokens: bool = False  # whether the input is computed from the pool's tokens in the proxy's template


@dataclass(frozen=True)
class Method:
    """A scorer or a selector, with the values of its constants from the config."""

    name: str
    target: str  # package.module.function
    function: Callable[..., Any]
    asked: tuple[str, ...]  # names of its sources
    constants: Mapping[str, Any]
    code: str = ""  # SHA-256 of a user's own code; gradsift's own functions have a VERSION instead

    def parents(self, sources: Mapping[str, Source]) -> list[Artifact]:
        """Return the artifacts of the sources that this method reads; artifacts that do not exist are made."""
        return [artifact for parameter in self.asked for artifact in sources[parameter].artifacts()]

    def settings(self, sources: Mapping[str, Source]) -> dict[str, Any]:
        """Return the settings that, with the artifacts of `parents`, determine the result of this method."""
        settings = {"name": self.name, "function": self.target, **self.constants}
        for parameter in self.asked:
            settings |= {f"{parameter}.{option}": value for option, value in sources[parameter].settings.items()}
        return settings | ({"source": self.code} if self.code else {})

    def __call__(self, *leading: Any, sources: Mapping[str, Source]) -> Any:
        return self.function(*leading, *(sources[parameter].value() for parameter in self.asked), **self.constants)


_texts: dict[str, str] = {}  # source text of the user's modules at the time of their import, by module


@functools.cache
def asked_by(target: str) -> frozenset[str] | None:
    """Return the names of the positional parameters of the function `target`; None if gradsift has no such function.

    The module's file is parsed but not imported, because the config is checked before slow modules such as torch are
    imported.
    """
    module, _, function = target.rpartition(".")
    package, *path = module.split(".")
    file = Path(__file__).parent.joinpath(*path).with_suffix(".py")
    if package == "gradsift" and file.is_file():
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and node.name == function:
                return frozenset(argument.arg for argument in node.args.args)
    return None


def method(
    kind: str,
    config: Any,
    known: Sequence[str],
    function: FunctionType | None = None,
    constants: Mapping[str, Any] | None = None,
) -> Method:
    """Return the scorer or selector that `config` describes.

    Args:
        kind: `scorer` or `selector`. A selector's first two parameters are `scores` and `size`, which are not sources.
        config: a dataclass of gradsift or a user's mapping, with `_target_`, `name` and the constants.
        known: names of the sources that the function may ask for.
        function: the function that `config._target_` names; if None, it is imported.
        constants: constants that are not in `config`. A constant called `name` must be given here, because
            `config.name` is the name of the method.

    Raises:
        ConfigError: the function does not exist or asks for an unknown source, `config` has a constant that the
            function does not have, or a constant without a default is not set.
    """
    options = asdict(config) if is_dataclass(config) and not isinstance(config, type) else dict(config)
    for key in ("_target_", "name"):
        if not isinstance(options.get(key), str):
            raise ConfigError(f"{kind}.{key} is missing; the YAML of a {kind} needs _target_ (the function) and name")
    target, name = options.pop("_target_"), options.pop("name")
    options.update(constants or {})
    code = ""
    if function is None:
        function, code = _resolve(kind, target)
    elif not target.startswith("gradsift."):
        code = code_hash(function)
    parameters = inspect.signature(function).parameters
    keyword_only = [n for n, p in parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY]
    positional = [n for n in parameters if n not in keyword_only]
    leading = ["scores", "size"] if kind == "selector" else []
    if positional[: len(leading)] != leading:
        raise ConfigError(f"{kind}={name} must take scores and size as its first parameters; see gradsift.selection")
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


def _resolve(kind: str, target: str) -> tuple[FunctionType, str]:
    """Import the function `target` (package.module.function).

    Returns:
        The function, and the SHA-256 of its module's source text; for gradsift's own functions '' instead of the
        SHA-256.
    """
    module_name, _, function_name = target.rpartition(".")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)  # last: a user's file never hides an installed package
    try:
        module = importlib.import_module(module_name)
        function = getattr(module, function_name)
        if not inspect.isfunction(function):
            raise ConfigError(f"{kind}._target_={target} is no function; give package.module.function")
        if target.startswith("gradsift."):
            return function, ""
        defined_in = sys.modules[function.__module__]  # `module` may only import the function
        try:
            text = inspect.getsource(defined_in)
        except (TypeError, OSError) as error:
            raise ConfigError(
                f"{kind}._target_={target}: the source text of {function.__module__} cannot be read ({error}), so "
                "gradsift could not notice a change of the function; put the function into a .py file"
            ) from error
        if _texts.setdefault(function.__module__, text) != text:  # edited since its import, as in a notebook
            importlib.reload(defined_in)
            _texts[function.__module__] = text
            function = getattr(importlib.reload(module), function_name)
    except (ImportError, AttributeError, ValueError, SyntaxError) as error:
        raise ConfigError(
            f"{kind}._target_={target} cannot be imported ({error}); give package.module.function"
        ) from error
    return function, hashlib.sha256(text.encode()).hexdigest()


def code_hash(function: Callable[..., Any]) -> str:
    """Return a SHA-256 of `function` that changes if its code changes, or a value that it reads from outside.

    A change in a file that the function reads does not change the hash.

    A function that is defined in a notebook has no source file to hash. So the hash covers the function's bytecode
    (which differs between versions of Python), its defaults, its closure, and the values of the global names that it
    reads. If such a value is a function of the user, the hash covers that function in the same way.

    Raises:
        ConfigError: a default, closure or global value that the function reads cannot be hashed, such as a model.
    """
    return hashlib.sha256("\n".join(_described(function, "the function", set())).encode()).hexdigest()


def _described(value: Any, name: str, seen: set[int]) -> Iterator[str]:
    """Yield strings that identify a value that a function reads.

    Args:
        name: what the error message calls the value.
        seen: the ids of the functions that are covered already, so that recursion ends.
    """
    import numpy as np  # imported here, because the check of a config needs this module, but not numpy

    if isinstance(value, (*_PLAIN, np.generic)):
        yield f"{type(value).__name__} {value!r}"
    elif isinstance(value, np.ndarray) and value.dtype != object:
        yield f"array {value.dtype} {value.shape} {hashlib.sha256(value.tobytes()).hexdigest()}"
    elif isinstance(value, Mapping):
        yield from _described([list(pair) for pair in value.items()], name, seen)
    elif isinstance(value, set | frozenset):  # their order differs from process to process
        yield from sorted("\n".join(_described(item, name, seen)) for item in value)
    elif isinstance(value, list | tuple):
        yield f"{type(value).__name__} of {len(value)}"
        for item in value:
            yield from _described(item, name, seen)
    elif isinstance(value, ModuleType):
        yield f"module {value.__name__}"
    elif hasattr(value, "__name__") and _is_installed(value):
        yield f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', value.__name__)}"
    elif isinstance(value, FunctionType):
        if id(value) not in seen:  # recursive functions are hashed once
            seen.add(id(value))
            yield from _of_function(value, seen)
    else:
        raise ConfigError(
            f"the scorer reads {name}, a {type(value).__name__}, whose content cannot be hashed, so a change would go "
            "unnoticed; create it inside the function from keyword-only arguments that are texts or numbers"
        )


def _is_installed(value: Any) -> bool:
    """Return whether a function or class belongs to Python or an installed package, so that its name identifies it."""
    if not isinstance(getattr(value, "__self__", None), ModuleType | type | None):
        return False  # a method of an object, which has a state
    module = getattr(value, "__module__", None) or "builtins"
    if module.startswith("gradsift."):
        return True
    if isinstance(value, FunctionType):
        return value.__code__.co_filename.startswith(_INSTALLED)
    file = getattr(sys.modules.get(module), "__file__", None) or ""
    return module != "__main__" and (not file or file.startswith(_INSTALLED))


def _of_function(function: FunctionType, seen: set[int]) -> Iterator[str]:
    defaults = [function.__defaults__, function.__kwdefaults__]
    yield from _described(defaults, f"a default of {function.__name__}", seen)
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        yield from _described(cell.cell_contents, f"{name!r} of the enclosing function", seen)
    for code in _codes(function.__code__):
        yield f"{code.co_name} {code.co_code.hex()} {code.co_names} {code.co_varnames}"
        for constant in code.co_consts:
            if not isinstance(constant, CodeType):
                yield from _described(constant, "a constant", seen)
        for name in dict.fromkeys(i.argval for i in dis.get_instructions(code) if i.opname == "LOAD_GLOBAL"):
            if name in function.__globals__:  # all other names are builtins
                yield name
                yield from _described(function.__globals__[name], f"the global name {name!r}", seen)


def _codes(code: CodeType) -> Iterator[CodeType]:
    """Yield the code object `code` of a function, and those of all functions defined inside the function."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)
