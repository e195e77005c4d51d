"""The reference of all options, made from the dataclasses in `src/gradsift/config/` and their comments."""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gradsift.config import SCHEMAS, Config

_CONF = Path(__file__).parents[1] / "conf"
_HEAD = """# Options

Every option of a run, by group. `python run.py group=choice group.option=value` sets it; in Python the dot is written
as `__`. The defaults are those of `src/gradsift/config/`; a choice (a file in `conf/<group>/`) changes some of them.
`python run.py --cfg job` prints the values that a command has.
"""


def options_page() -> str:
    """Return a page with a table for each choice of each group: option, type, default, meaning, values."""
    lines = [_HEAD, "## The run itself", "", *_table("", Config)]
    for group in (field.name for field in dataclasses.fields(Config) if field.name in SCHEMAS):
        lines += [f"## {group}", ""]
        for name, schema in SCHEMAS[group].items():
            if choices := _choices(group, name):
                about = inspect.getdoc(schema) or ""
                lines += [f"### {', '.join(f'{group}={choice}' for choice in choices)}", "", about, ""]
                lines += _table(f"{group}.", schema)
    return "\n".join(lines) + "\n"


def _choices(group: str, schema: str) -> list[str]:
    """Return the choices of a group whose files name this schema; of a group with one schema all choices."""
    pattern = re.compile(rf"/schema/{group}@_here_: {schema}\b" if len(SCHEMAS[group]) > 1 else "")
    files = sorted(path for path in (_CONF / group).glob("*.yaml") if path.stem != "catalog")
    return [path.stem for path in files if pattern.search(path.read_text(encoding="utf-8"))]


def _table(prefix: str, schema: type) -> list[str]:
    rows = ["| " + " | ".join(cells) + " |" for cells in options_of(prefix, schema)]
    if not rows:
        return ["No options.", ""]
    return ["| option | type | default | meaning | values |", "|---|---|---|---|---|", *rows, ""]


def options_of(prefix: str, schema: type, values: Any = None) -> Iterator[tuple[str, ...]]:
    """Yield option, type, default, meaning and range for each field of a dataclass and of the dataclasses within it.

    Args:
        values: an instance whose values are the defaults; None: the defaults are those of the fields.
    """
    meanings = _meanings(schema)
    for field in dataclasses.fields(schema):
        if field.name in ("_target_", "name") or (prefix == "" and field.name in SCHEMAS):
            continue  # a choice's file sets the first two; the groups have sections of their own
        option = f"{prefix}{field.name}"
        inner = getattr(sys.modules[schema.__module__], str(field.type), None)
        if dataclasses.is_dataclass(inner):
            # the defaults of this field, whose factory may set other values than the class
            own = None if field.default_factory is dataclasses.MISSING else field.default_factory()
            yield from options_of(f"{option}.", inner, own)  # type: ignore[arg-type]
            continue
        yield f"`{option}`", f"`{field.type}`", _default(field, values), meanings.get(field.name, ""), _limits(field)


def _default(field: Any, values: Any) -> str:
    value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    if values is not None:
        value = getattr(values, field.name)
    if value is dataclasses.MISSING or value == "???":
        return "required"
    return f"`{'null' if value is None else str(value).lower() if isinstance(value, bool) else value}`"


def _meanings(schema: type) -> dict[str, str]:
    """Return the comment of each field, which is at the end of its line or in the lines above it."""
    meanings: dict[str, str] = {}
    for cls in filter(dataclasses.is_dataclass, reversed(schema.__mro__)):  # the base first
        above: list[str] = []
        for line in inspect.getsource(cls).splitlines():
            if comment := re.fullmatch(r"    # (.*)", line):
                above.append(comment[1])
            elif field := re.match(r"    (\w+): .*?(?:  # (.*))?$", line):
                meanings[field[1]] = " ".join([*above, field[2] or ""]).strip()
                above = []
    return meanings


def _limits(field: Any) -> str:
    """Return the values that a field may have, as `option` states them."""
    limits = dict(field.metadata)
    if "choices" in limits:
        return "one of " + ", ".join(f"`{choice}`" for choice in limits["choices"])
    words = {"least": "at least", "above": "above", "most": "at most", "below": "below"}
    return ", ".join(f"{words[name]} {limit:,g}" for name, limit in limits.items() if name in words)
