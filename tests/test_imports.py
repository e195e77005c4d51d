"""Law of the modules: no import circle, not even one hidden in a function or behind TYPE_CHECKING."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

SRC = Path(__file__).parents[1] / "src"


def name_of(file: Path) -> str:
    return ".".join(file.relative_to(SRC).with_suffix("").parts).removesuffix(".__init__")


def imported_from(module: ast.Module, modules: set[str]) -> set[str]:
    """Return the modules of gradsift that a module imports, also within functions; of a package only those it names."""
    names = set()
    for node in ast.walk(module):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names} & modules or {node.module}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names & modules


def imported_by(file: Path, modules: set[str]) -> set[str]:
    return imported_from(ast.parse(file.read_text(encoding="utf-8")), modules) - {name_of(file)}


def test_no_module_imports_itself_through_others() -> None:
    files = sorted((SRC / "gradsift").rglob("*.py"))
    modules = {name_of(file) for file in files}
    assert len(modules) > 100
    TopologicalSorter({name_of(file): imported_by(file, modules) for file in files}).prepare()  # raises CycleError


def test_every_run_loads_neither_lightning_nor_the_kernels() -> None:
    """Lightning takes seconds to import, and the kernels are optional, so both are imported only within functions."""
    files = {name_of(file): file for file in (SRC / "gradsift").rglob("*.py")}
    loaded, left = set(), {"gradsift.pipeline"}
    while left:
        name = left.pop()
        loaded.add(name)
        module = ast.parse(files[name].read_text(encoding="utf-8"))
        module.body = [node for node in module.body if isinstance(node, ast.Import | ast.ImportFrom)]
        for node in module.body:
            roots = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            assert not any(root.split(".")[0] == "lightning" for root in roots), name
        left |= imported_from(module, set(files)) - loaded
    assert "gradsift.training.target" in loaded
    assert not any(name.startswith("gradsift.cpu") for name in loaded)
