"""The hash of a function's code. If `select` is called with a function, the scores' fingerprint contains this hash.

A function of a notebook or a script has no module file that could be hashed, and its source text does not contain the
values that it reads from outside. So the hash covers its bytecode, its defaults, its closure, and the names and values
of the globals that it reads. If such a value is itself a function written by the user, it is hashed in the same way.
Bytecode differs between versions of Python, and so does the hash.
"""

from __future__ import annotations

import dis
import hashlib
import sys
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from pathlib import PurePath
from types import CodeType, EllipsisType, FunctionType, ModuleType
from typing import Any

import numpy as np

from gradsift.errors import ConfigError

_INSTALLED = tuple(sysconfig.get_paths()[name] for name in ("stdlib", "platstdlib", "purelib", "platlib"))
_PLAIN = (type(None), bool, int, float, complex, str, bytes, range, EllipsisType, PurePath, np.generic)


def code_hash(function: Callable[..., Any]) -> str:
    """Return a SHA-256 that changes if `function` may compute something else; files that it reads are not covered.

    Raises:
        ConfigError: the function reads a global, or a variable of an enclosing function, whose content cannot be
            hashed, such as a model.
    """
    return hashlib.sha256("\n".join(_described(function, "the function", set())).encode()).hexdigest()


def _described(value: Any, name: str, seen: set[int]) -> Iterator[str]:
    """Yield texts that identify a value that the function reads under `name`."""
    if isinstance(value, _PLAIN):
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
        if id(value) not in seen:  # a function may call itself
            seen.add(id(value))
            yield from _of_function(value, seen)
    else:
        raise ConfigError(
            f"the scorer reads {name}, a {type(value).__name__}, whose content cannot be part of the identity of the "
            "scores; make it within the function, from names and numbers that are keyword-only arguments"
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
        yield from _described(cell.cell_contents, f"{name!r} of the function around it", seen)
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
    """Yield the code objects of a function and of the functions defined in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)
