"""Law of the modules: no import circle, not even one hidden in a function or behind TYPE_CHECKING."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

SRC = Path(__file__).parents[1] / "src"


def name_of(file: Path) -> str:
    return ".".join(file.relative_to(SRC).with_suffix("").parts).removesuffix(".__init__")


def imported_by(file: Path, modules: set[str]) -> set[str]:
    """Return the modules of gradsift that a file imports anywhere; of a package only those that it names."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names} & modules or {node.module}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names & modules - {name_of(file)}


def test_no_module_imports_itself_through_others() -> None:
    files = sorted((SRC / "gradsift").rglob("*.py"))
    modules = {name_of(file) for file in files}
    assert len(modules) > 100
    TopologicalSorter({name_of(file): imported_by(file, modules) for file in files}).prepare()  # raises CycleError
