"""Recognises which columns of a dataset hold the parts (fields) of an example.

A column can match a field in three ways, which are tried in this order:

1. The column has the field's configured name.
2. The column's name differs from the configured name only in letter case or surrounding blanks.
3. The configured name is the default, and the column has another common name of the field.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain
from typing import Any

from gradsift.config import FieldsConfig
from gradsift.data.examples import SourceRow
from gradsift.errors import DataError

_PROMPTS = ("instruction", "prompt", "query", "question")
_RESPONSES = ("output", "response", "answer", "completion")
_OTHER_NAMES: dict[str, tuple[str, ...]] = {  # names of a field in public datasets
    "instruction": _PROMPTS,
    "prompt": _PROMPTS,
    "output": _RESPONSES,
    "completion": _RESPONSES,
    "input": ("input", "context"),
    "messages": (),
    "conversations": ("conversation",),
    "system": ("system", "system_prompt"),
    "history": ("history",),
}
_NEEDED = {
    "alpaca": ("instruction", "output"),
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "prompt_completion": ("prompt", "completion"),
}
_PREFERENCE = ("chosen", "rejected")
KNOWN = frozenset({*_PROMPTS, *_RESPONSES, *_PREFERENCE, "messages", "conversations", "conversation"})
_DEFAULTS = FieldsConfig()


@lru_cache(maxsize=1024)  # called for every column of every row
def folded(name: str) -> str:
    """Return a column's name in lower case, without the blanks and byte order marks around the name."""
    return name.strip().strip("\ufeff").casefold()


@dataclass(frozen=True)
class Shape:
    """A format of instruction data, and the names of the columns that hold the format's fields.

    `needed` and `fields` hold the names that the format's required columns have in the data. If the user gave the
    format and no row has the format's columns, `needed` and `fields` hold the configured names. Optional columns are
    looked up in each row (see `optional`).
    """

    format: str  # alpaca, messages, sharegpt or prompt_completion
    fields: FieldsConfig
    needed: tuple[str, ...]

    def optional(self, row: Mapping[str, Any], part: str) -> str | None:
        """Return the column for the optional field `part` (input, system or history).

        This is the closest match that is not blank in this row. If all matching columns are blank, it is the closest
        match. None: no column matches.
        """
        configured = getattr(self.fields, part)
        if configured is None:
            return None
        names = [name for name in _optional_columns(tuple(row), configured, part) if name not in self.needed]
        return next((name for name in names if not _is_blank(row[name])), names[0] if names else None)


def _is_blank(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


@lru_cache(maxsize=1024)  # called for every row
def _optional_columns(columns: tuple[str, ...], configured: str, part: str) -> list[str]:
    """Return the columns that match the optional field `part`, the closest match first."""
    return list(dict.fromkeys(chain(*_matches(columns, configured, part))))


def pair_of(row: Iterable[str]) -> tuple[str, str] | None:
    """Return the columns of the chosen and the rejected response; None if the row lacks one of the two columns."""
    chosen, rejected = ([column for column in row if folded(column) == wanted] for wanted in _PREFERENCE)
    return (chosen[0], rejected[0]) if chosen and rejected else None


def recognise(rows: Sequence[SourceRow], format: str, fields: FieldsConfig, source: str, group: str) -> Shape:
    """Return the format of a dataset and the columns of its fields.

    The three ways to match columns (see the module's docstring) are tried in turn. As soon as one way finds a row that
    has all columns of a format, this format is returned.

    Args:
        format: auto, or the only format to look for.
        source: name of the data in errors.
        group: group of the options that describe the data, for errors.

    Raises:
        DataError: no format fits, or two columns could be the same field. The message names the option to set.
    """
    formats = _NEEDED if format == "auto" else {format: _NEEDED[format]}
    given = {part for part in chain(*_NEEDED.values()) if getattr(fields, part) != getattr(_DEFAULTS, part)}
    if format == "auto" and given:  # only formats with a column that the user named
        formats = {name: needed for name, needed in _NEEDED.items() if given & set(needed)}
    headers = list(dict.fromkeys(tuple(row.content) for row in rows if isinstance(row.content, dict)))
    for step in (1, 2, 3):
        for columns in headers:
            for name, needed in formats.items():
                matches = {part: _matches(columns, getattr(fields, part), part)[:step] for part in needed}
                candidates = {part: next(filter(None, names), []) for part, names in matches.items()}
                if all(candidates.values()):
                    return _shape(name, fields, candidates, source, group)
            if step == 3 and format == "auto" and not given and (chosen := _chosen_turns(columns, rows)):
                return Shape("messages", replace(fields, messages=chosen), (chosen,))
    if format != "auto":  # each row is rejected for the column that it lacks
        return Shape(format, fields, tuple(getattr(fields, part) for part in _NEEDED[format]))
    wanted = [f"{name}: {', '.join(getattr(fields, part) for part in needed)}" for name, needed in _NEEDED.items()]
    raise DataError(
        f"{source} has no format that {group}.format=auto recognises: its columns are {columns_of(rows)}; a format "
        f"needs ({'; '.join(wanted)}; or other common names of these); {_advice(rows, group)}"
    )


def _shape(
    format: str, fields: FieldsConfig, candidates: Mapping[str, Sequence[str]], source: str, group: str
) -> Shape:
    """Return the shape with the candidate columns; raise DataError if a field has several candidates."""
    for part, names in candidates.items():
        if len(names) > 1:
            choices = " or ".join(f"{group}.fields.{part}={name}" for name in names)
            raise DataError(f"{source}: the columns {listed(names)} could each be the {part}; set {choices}")
    chosen = {part: names[0] for part, names in candidates.items()}
    return Shape(format, replace(fields, **chosen), tuple(chosen.values()))


def _matches(columns: Sequence[str], configured: str, part: str) -> list[list[str]]:
    """Return three lists: the columns that match a field in each of the three ways (see the module's docstring)."""
    is_default = configured == getattr(_DEFAULTS, part)
    others = [column for column in columns if is_default and folded(column) in _OTHER_NAMES[part]]
    if is_default and part in ("output", "completion") and (pair := pair_of(columns)):
        others.append(pair[0])
    exact = [column for column in columns if column == configured]
    return [exact, [column for column in columns if folded(column) == folded(configured)], others]


def _chosen_turns(columns: Sequence[str], rows: Sequence[SourceRow]) -> str | None:
    """Return the column `chosen` of preference pairs if it holds turns (which include the prompt), else None."""
    pair = pair_of(columns)
    if pair is None:
        return None
    value = next(row.content[pair[0]] for row in rows if isinstance(row.content, dict) and pair[0] in row.content)
    return None if isinstance(value, str) and not value.lstrip().startswith("[") else pair[0]


def _advice(rows: Sequence[SourceRow], group: str) -> str:
    """Return the part of an error message that says what to do about rows that `format=auto` does not recognise."""
    remedy = 'write each conversation as one row {"messages": [...]}'
    if _are_turns(rows[0].content):
        return f"the rows are lists of turns: {remedy}"
    row = next((row.content for row in rows if isinstance(row.content, dict)), {})
    if {"role", "content"} <= row.keys() or {"from", "value"} <= row.keys():
        return f"the rows are turns: {remedy}"
    turns = [name for name, value in row.items() if _are_turns(value)]
    if len(turns) == 1:
        return f"if {turns[0]!r} holds the turns of a conversation, set {group}.fields.messages={turns[0]}"
    by_name = {folded(name): name for name in row}
    if {"input", "output"} <= by_name.keys():
        return f"if {by_name['input']!r} is the whole prompt, set {group}.fields.instruction={by_name['input']}"
    for part, meaning, known in (("output", "response", _PROMPTS), ("instruction", "prompt", _RESPONSES)):
        others = [name for name in row if folded(name) not in known]
        if others and not by_name.keys().isdisjoint(known):
            return f"name the column of the {meaning} with {group}.fields.{part}=COLUMN, one of: {listed(others)}"
    if text := by_name.get("text") or by_name.get("chosen"):
        return (
            f"the text of column {text!r} does not say where the prompt ends and the response begins: "
            'split it, and write rows like {"instruction": ..., "output": ...} or {"messages": [...]}'
        )
    return (
        f"set {group}.format, and the names of its columns as in {group}.fields.instruction=NAME "
        f"{group}.fields.output=NAME"
    )


def _are_turns(value: Any) -> bool:
    if not isinstance(value, list) or not value:
        return False
    if all(isinstance(turn, str) for turn in value):
        return len(value) > 1
    return all(isinstance(turn, dict) and not turn.keys().isdisjoint(("role", "from")) for turn in value)


def columns_of(rows: Iterable[SourceRow]) -> str:
    """Return the names of all columns of the rows, as text for messages."""
    names = dict.fromkeys(name for row in rows if isinstance(row.content, dict) for name in row.content)
    return listed(names) if names else "none (the rows are not objects)"


def listed(names: Iterable[Any]) -> str:
    """Return names as text for messages: at most twenty names, each cut to forty characters."""
    shown = [str(name)[:40] for name in names]
    return ", ".join(shown[:20]) + (f" and {len(shown) - 20} more" if len(shown) > 20 else "")
