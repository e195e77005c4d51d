"""Parses rows into examples, with one parser for each format.

A row that cannot be trained on becomes a `Rejected` with the reason. Parsing then continues with the next row.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from gradsift import outside_json
from gradsift.config import FieldsConfig
from gradsift.data.columns import Shape, columns_of, folded, pair_of, recognise
from gradsift.data.examples import Example, Rejected, SourceRow, Turn, json_type, json_value, make_example
from gradsift.data.turns import (
    MEDIA,
    Conversation,
    Unusable,
    conversation,
    earlier_exchanges,
    is_empty,
    text_of,
    turns_in,
    turns_of,
)
from gradsift.errors import DataError

_UNSHOWN = {  # columns that change the meaning of a row but have no place in an example, and their content in words
    "tools": "tools",
    "functions": "tools",
    "reasoning_content": "reasoning apart from the answer",
    **MEDIA,
}


def parse_rows(
    rows: Iterable[SourceRow | tuple[int, Any]],
    format: str,
    fields: FieldsConfig,
    source: str = "the data",
    group: str = "data",
    occurrences: Counter[str] | None = None,
) -> tuple[list[Example], list[Rejected]]:
    """Parse rows, and return the examples and the rejected rows.

    The formats have these columns:

    alpaca             instruction, input (may be missing or null), output. If the data has columns chosen and rejected
                       in place of output, chosen is the output
    messages           a list of turns: [{"role": "user", "content": text}, ...]
    sharegpt           a list of turns in the column conversations
    prompt_completion  prompt and completion, both text or both lists of turns
    auto               the format whose columns the data has, see `gradsift.data.columns.recognise`

    A column `system` holds the system prompt, and a column `history` holds earlier exchanges.

    Args:
        rows: rows as a reader yields them, or pairs of a row's position and its columns.
        source: name of the data in error messages.
        group: name of the option group that describes the data, such as `data`, for error messages.
        occurrences: how many examples with each content hash other sources have; the new examples are added to the
            counts. None: there are no other sources.

    Raises:
        DataError: there is no row, no format fits, two columns could be the same field, or no row can be used.
    """
    source_rows = [SourceRow(*row) for row in rows]
    if not source_rows:
        raise DataError(f"{source} is empty: it holds no row")
    shape = recognise(source_rows, format, fields, source, group)
    examples: list[Example] = []
    rejected: list[Rejected] = []
    occurrences = Counter() if occurrences is None else occurrences
    for row, content, line in source_rows:
        try:
            original = _original(content)
            if format == "auto":
                _require_shape(original, shape, group)
            parsed = _PARSERS[shape.format](original, shape)
            examples.append(make_example(row, *parsed, original=original, occurrences=occurrences))
        except Unusable as reason:
            rejected.append(Rejected(row, str(reason), line, content))
    if not examples:
        reasons = Counter(row.reason for row in rejected).most_common(3)
        counted = "; ".join(f"{reason} ({count:,} rows)" for reason, count in reasons)
        raise DataError(
            f"{source}: none of its {len(rejected):,} rows can be used: {counted}. Its columns are "
            f"{columns_of(source_rows)}; check {group}.format, and the names of its columns as in "
            f"{group}.fields.output=NAME"
        )
    return examples, rejected


def _original(content: Any) -> dict[str, Any]:
    """Return the columns of a row as JSON values.

    Raises:
        Unusable: the row is not an object, a column holds something that an example cannot hold, such as tools or
            images, or a column marks the response as undesired.
    """
    if not isinstance(content, dict):
        raise Unusable(f"the row is {json_type(content)}, not an object")
    original = {}
    for name, value in content.items():
        try:
            original[str(name)] = json_value(value)
        except TypeError as error:
            raise Unusable(f"column {name!r} holds {error}") from error
        except RecursionError:
            raise Unusable(f"column {name!r} is nested too deep") from None
    for name, value in original.items():
        meaning = _UNSHOWN.get(folded(name))
        if meaning and not is_empty(value):
            raise Unusable(
                f"column {name!r} holds {meaning}, which would be lost; delete it to train on the other columns"
            )
    by_name = {folded(name): value for name, value in original.items()}
    mark = "label" if by_name.keys() == {"prompt", "completion", "label"} else "kto_tag"
    if by_name.get(mark) is False:  # as in the KTO data of LLaMA-Factory and TRL
        raise Unusable(f"column {mark!r} is false, which marks the response as undesired")
    return original


def _require_shape(row: Mapping[str, Any], shape: Shape, group: str) -> None:
    """Raise Unusable if a row lacks a needed column of `shape` and has all needed columns of another format."""
    missing = [name for name in shape.needed if name not in row]
    if not missing:
        return
    try:
        other = recognise([SourceRow(0, row)], "auto", FieldsConfig(), "", group)
    except DataError:
        return  # the parser rejects the row and names the column
    columns = ", ".join(map(repr, other.needed))
    raise Unusable(
        f"field {missing[0]!r} is missing: the row has other columns ({columns}) than the first rows; write the rows "
        "of each format to a separate file, and join the files with data=mixture"
    )


def _alpaca(row: Mapping[str, Any], shape: Shape) -> Conversation:
    fields = shape.fields
    column = shape.optional(row, "input")
    input = "" if column is None or row[column] is None else text_of(row, column)
    input = input if input.strip() else ""
    if folded(fields.output) == "chosen" and isinstance(reply := _decoded(row.get(fields.output)), list | dict):
        if input:
            raise Unusable(f"field {column!r} cannot be combined with the turns of {fields.output!r}")
        asked = _decoded(row.get(fields.instruction))
        if isinstance(asked, list):
            prompt = turns_of(asked)
        else:
            prompt = [Turn("user", text_of(row, fields.instruction, filled=True))]
        return _with_reply(_with_system(row, shape, [*_history(row, shape), *prompt]), reply, fields.output)
    instruction = text_of(row, fields.instruction)
    if not instruction.strip() and not input:
        raise Unusable(f"fields {fields.instruction!r} and {column or fields.input!r} are both empty")
    turns = [Turn("user", instruction), Turn("assistant", text_of(row, fields.output, filled=True))]
    return conversation(_with_system(row, shape, [*_history(row, shape), *turns]))._replace(input=input)


def _prompt_completion(row: Mapping[str, Any], shape: Shape) -> Conversation:
    fields = shape.fields
    prompt, completion = row.get(fields.prompt), row.get(fields.completion)
    if isinstance(prompt, list) and isinstance(completion, list):
        return conversation(_with_system(row, shape, turns_of([*prompt, *completion])))
    if isinstance(prompt, list) or isinstance(completion, list):
        raise Unusable(f"fields {fields.prompt!r} and {fields.completion!r} must both be text or both be lists")
    turns = [
        Turn("user", text_of(row, fields.prompt, filled=True)),
        Turn("assistant", text_of(row, fields.completion, filled=True)),
    ]
    return conversation(_with_system(row, shape, [*_history(row, shape), *turns]))


def _history(row: Mapping[str, Any], shape: Shape) -> list[Turn]:
    column = shape.optional(row, "history")
    return [] if column is None else earlier_exchanges(row, column)


def _with_system(row: Mapping[str, Any], shape: Shape, turns: list[Turn]) -> list[Turn]:
    """Return the turns, preceded by the system prompt in the row's system column if there is one."""
    column = shape.optional(row, "system")
    if column is None or is_empty(row[column]):
        return turns
    if not isinstance(row[column], str):
        raise Unusable(
            f"column {column!r} is {json_type(row[column])}, not a system prompt; fields.system=null ignores it"
        )
    system = Turn("system", text_of(row, column))
    if not turns or turns[0].role != "system":
        return [system, *turns]
    if turns[0].content.strip() not in ("", system.content.strip()):
        raise Unusable(f"column {column!r} and the first turn hold different system prompts")
    return [system, *turns[1:]]


def _messages(row: Mapping[str, Any], shape: Shape) -> Conversation:
    (column,) = shape.needed
    turns = _with_system(row, shape, turns_in(row, column))
    pair = pair_of(row)
    if pair is None or column in pair or is_empty(row[pair[0]]):
        return conversation(turns)
    return _with_reply(turns, _decoded(row[pair[0]]), pair[0])


def _with_reply(prompt: list[Turn], reply: Any, name: str) -> Conversation:
    """Return the conversation that consists of the turns of `prompt` and the chosen reply.

    Args:
        reply: a text, a turn, or a list of turns, which may repeat the prompt.
        name: the reply's column, which the reason of a rejection names.
    """
    if isinstance(reply, str):
        answer = [Turn("assistant", text_of({name: reply}, name, filled=True))]
    else:
        answer = turns_of([reply]) if isinstance(reply, dict) else turns_in({name: reply}, name)
    if answer in (prompt, prompt[-1:]):  # the prompt's column includes the chosen reply
        return conversation(prompt)
    spoken = [turn for turn in answer if turn.role != "system"]
    if not spoken or spoken[0].role != "user":
        return conversation([*prompt, *answer])
    if not all(turn in spoken for turn in prompt if turn.role != "system"):
        raise Unusable(f"the prompt is not among the turns of {name!r}, although the first of them is a user turn")
    return conversation([*(turn for turn in prompt if turn.role == "system" and turn not in answer), *answer])


def _decoded(value: Any) -> Any:
    """Return the list of turns if `value` is a list of turns written as JSON text, otherwise `value` itself."""
    if not isinstance(value, str) or not value.lstrip().startswith("[{"):
        return value
    try:
        decoded = outside_json.loads(value)
    except json.JSONDecodeError:
        return value
    are_turns = all(isinstance(turn, dict) and not turn.keys().isdisjoint(("role", "from")) for turn in decoded)
    return decoded if are_turns else value


_PARSERS: dict[str, Callable[[Mapping[str, Any], Shape], Conversation]] = {
    "alpaca": _alpaca,
    "messages": _messages,
    "sharegpt": _messages,
    "prompt_completion": _prompt_completion,
}
