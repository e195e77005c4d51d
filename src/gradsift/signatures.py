"""The inputs that a scorer or selector of gradsift asks for, read from its source text without importing it.

The config is checked before anything heavy is imported, and the modules of most methods import numpy or torch.
"""

from __future__ import annotations

import ast
import functools
from pathlib import Path


@functools.cache
def asked_by(target: str) -> frozenset[str] | None:
    """Return the names of the positional parameters of a function, which are the inputs that it asks for.

    Args:
        target: the function as package.module.function.

    Returns:
        The names; None if gradsift has no such function. The run then inspects the function after importing it.
    """
    module, _, function = target.rpartition(".")
    package, *path = module.split(".")
    file = Path(__file__).parent.joinpath(*path).with_suffix(".py")
    if package != "gradsift" or not file.is_file():
        return None
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef) and node.name == function:
            return frozenset(argument.arg for argument in node.args.args)
    return None
