"""Parses conversations, which datasets store in several forms, into system, user and assistant turns.

If a turn has reasoning under a key of its own, the reasoning is put before the answer as a think block
(`<think>...</think>`). A row is rejected if it has content that an example cannot hold, such as tool calls or images.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from gradsift import outside_json
from gradsift.data.examples import Turn, json_type

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bing": "assistant",
    "bard": "assistant",
}
_TOOL_ROLES = ("tool", "function", "function_call", "observation", "ipython")
_KEYS = (("role", "content"), ("from", "value"))
MEDIA = {  # names of columns and keys, and their content in words
    "image": "images",
    "images": "images",
    "audio": "audio",
    "audios": "audio",
    "video": "videos",
    "videos": "videos",
}
_UNSHOWN = {  # keys that change the meaning of a turn but have no place in an example, and their content in words
    "tool_calls": "tool calls",
    "function_call": "a function call",
    "tools": "tools",
    "refusal": "a refusal apart from the answer",
    **MEDIA,
}
_REASONING = ("reasoning_content", "reasoning", "thinking")  # keys of an assistant's reasoning
_WEIGHTS = ("weight", "loss", "train")  # with the value 0 or false, a turn is context only
_TEXT_PARTS = ("text", "input_text", "output_text")
_PART_KEYS = ("type", "text", "annotations", "cache_control")


class Unusable(Exception):
    """Raised for a row that cannot be trained on; the message becomes the `reason` of the row's `Rejected`."""


class Conversation(NamedTuple):
    """A conversation, split into the fields that an `Example` has: the earlier turns and the last exchange."""

    history: list[Turn]
    instruction: str
    input: str
    output: str


def text_of(row: Mapping[str, Any], key: str, name: str | None = None, *, filled: bool = False) -> str:
    """Return the text that `row` has under `key`.

    Args:
        name: name of the text in errors; by default `field 'key'`.
        filled: whether text that is empty or only white space is an error.

    Raises:
        Unusable: the key is missing, or its value is not text that can be tokenised.
    """
    name = name or f"field {key!r}"
    if key not in row:
        raise Unusable(f"{name} is missing")
    value = row[key]
    if not isinstance(value, str):
        raise Unusable(f"{name} is {json_type(value)}, not text")
    if "\0" in value:
        raise Unusable(f"{name} holds a NUL character")
    if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
        raise Unusable(f"{name} holds half a surrogate pair, which is not a character")
    if filled and not value.strip():
        raise Unusable(f"{name} is empty")
    return value


def is_empty(value: Any) -> bool:
    """Return whether the value of a column is empty: null, blank text, [], {}, or the JSON text of null, [] or {}."""
    if isinstance(value, str):
        return value.strip() in ("", "[]", "{}", "null")
    return value is None or value == [] or value == {}


def turns_in(row: Mapping[str, Any], name: str) -> list[Turn]:
    """Return the turns in a column that holds a list of turns, or the JSON text of such a list.

    A list of texts is read as alternating user and assistant turns, beginning with the user. An object with lists of
    equal length as values, such as {"role": [...], "content": [...]}, is read as a list of turns stored by columns.

    Raises:
        Unusable: the column is missing or holds no list of turns, or the role or the content of a turn cannot be used.
    """
    if name not in row:
        raise Unusable(f"field {name!r} is missing")
    value = _decoded(row[name], name)
    if isinstance(value, dict) and value and all(isinstance(column, list) for column in value.values()):
        if len({len(column) for column in value.values()}) > 1:
            raise Unusable(f"field {name!r} holds lists of different lengths, not turns")
        value = [dict(zip(value, values, strict=True)) for values in zip(*value.values(), strict=True)]
    if not isinstance(value, list):
        raise Unusable(f"field {name!r} is {json_type(value)}, not a list of turns")
    return turns_of(value)


def turns_of(entries: Sequence[Any]) -> list[Turn]:
    """Return the turns in a list of texts, or of objects with the keys `role` and `content`, or `from` and `value`."""
    if entries and all(isinstance(entry, str) for entry in entries):
        texts = {f"turn {number}": entry for number, entry in enumerate(entries, start=1)}
        roles = ("user", "assistant")
        return [Turn(roles[place % 2], text_of(texts, name, name, filled=True)) for place, name in enumerate(texts)]
    return [_turn(entry, number) for number, entry in enumerate(entries, start=1)]


def earlier_exchanges(row: Mapping[str, Any], name: str) -> list[Turn]:
    """Return the turns in the column `name` of earlier exchanges.

    The column holds a list of (user text, assistant text) pairs, or a list of turns. If the column is empty, the
    result is an empty list.
    """
    value = _decoded(row[name], name)
    if is_empty(value):
        return []
    if not isinstance(value, list):
        raise Unusable(
            f"field {name!r} is {json_type(value)}, not a list of earlier exchanges; fields.history=null ignores it"
        )
    if not any(isinstance(pair, list) for pair in value):
        return turns_of(value)
    for pair in value:
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            raise Unusable(f"field {name!r} holds an exchange that is not a pair of texts")
    return turns_of([text for pair in value for text in pair])


def conversation(turns: list[Turn]) -> Conversation:
    """Split turns into the parts of an example: the last exchange with a trained answer, and the turns before it.

    Turns after the last assistant turn that is trained are left out, because they carry no loss.

    Raises:
        Unusable: no assistant turn is trained, or user and assistant turns do not alternate.
    """
    replies = [place for place, turn in enumerate(turns) if turn.role == "assistant"]
    if not replies:
        raise Unusable("there is no assistant turn")
    trained = [place for place in replies if turns[place].is_trained]
    if not trained:
        raise Unusable("no assistant turn is trained: all have weight 0")
    turns = turns[: trained[-1] + 1]
    if turns[0].role == "system" and not turns[0].content.strip():
        turns = turns[1:]
    first = int(turns[0].role == "system")
    for number, turn in enumerate(turns[first:]):
        expected = "assistant" if number % 2 else "user"
        if turn.role != expected:
            raise Unusable(f"user and assistant turns do not alternate: {turn.role} turn instead of {expected} turn")
    return Conversation(turns[:-2], turns[-2].content, "", turns[-1].content)


def _decoded(value: Any, name: str) -> Any:
    """Parse `value` as JSON if it is text that begins with [; return any other value unchanged."""
    if not isinstance(value, str) or not value.lstrip(outside_json.BLANK).startswith("["):
        return value
    try:
        return outside_json.loads(value.strip(outside_json.BLANK))
    except json.JSONDecodeError as error:
        raise Unusable(
            f"field {name!r} is text but not a JSON list of turns ({error.msg} at character {error.pos}); write it "
            "with json.dumps"
        ) from error


def _turn(entry: Any, number: int) -> Turn:
    if not isinstance(entry, dict):
        raise Unusable(f"turn {number} is {json_type(entry)}, not an object")
    complete = [keys for keys in _KEYS if all(entry.get(key) is not None for key in keys)]
    if len(complete) == 2 and entry["content"] != entry["value"]:
        raise Unusable(f"turn {number} has both 'content' and 'value', and they differ")
    role_key, content_key = complete[0] if complete else _KEYS["role" not in entry and "from" in entry]
    role_name = text_of(entry, role_key, f"{role_key!r} of turn {number}").strip().casefold()
    for key, meaning in _UNSHOWN.items():
        if not is_empty(entry.get(key)):
            raise Unusable(
                f"turn {number} holds {meaning} ({key!r}), which would be lost; delete the key to train without it"
            )
    if role_name in _TOOL_ROLES:
        raise Unusable(f"turn {number} has the role {role_name!r}; tool turns cannot be used")
    if role_name not in ROLES:
        raise Unusable(f"turn {number} has the role {role_name[:40]!r}; known: {', '.join(ROLES)}")
    role, name = ROLES[role_name], f"{content_key!r} of turn {number}"
    content = entry
    if isinstance(parts := entry.get(content_key), list):
        content = {content_key: "".join(_part(part, f"part {place} of {name}") for place, part in enumerate(parts, 1))}
    text = text_of(content, content_key, name, filled=role != "system")
    return Turn(role, _with_reasoning(entry, role, text, number), _is_trained(entry, role, number))


def _with_reasoning(entry: Mapping[str, Any], role: str, text: str, number: int) -> str:
    """If the turn `entry` has reasoning, put it before `text` as a think block; otherwise return `text`."""
    keys = [key for key in _REASONING if not is_empty(entry.get(key))]
    if not keys:
        return text
    reasoning = {text_of(entry, key, f"{key!r} of turn {number}", filled=True) for key in keys}
    if role != "assistant":
        raise Unusable(f"turn {number} holds reasoning ({keys[0]!r}), but is a {role} turn")
    if len(reasoning) > 1:
        raise Unusable(f"turn {number} holds different reasoning in {' and '.join(map(repr, keys))}; delete one")
    (thoughts,) = reasoning
    if any(tag in said for said in (text, thoughts) for tag in ("<think>", "</think>")):
        raise Unusable(f"turn {number} holds reasoning in {keys[0]!r} and also a think block; keep one of the two")
    return f"<think>\n{thoughts}\n</think>\n\n{text}"


def _part(part: Any, name: str) -> str:
    """Return the text of one part of a turn whose content is a list of parts."""
    if isinstance(part, str):
        return part
    if not isinstance(part, dict):
        raise Unusable(f"{name} is {json_type(part)}, not an object")
    kind = part.get("type", "text")
    if kind not in _TEXT_PARTS:
        raise Unusable(f"{name} is of type {str(kind)[:40]!r}; only text can be used")
    if others := [str(key) for key, value in part.items() if key not in _PART_KEYS and not is_empty(value)]:
        raise Unusable(f"{name} holds {', '.join(others)[:80]}; only text can be used")
    return text_of(part, "text", f"'text' in {name}")


def _is_trained(entry: Mapping[str, Any], role: str, number: int) -> bool:
    """Return False for an assistant turn with the weight 0 or false, and True for every other turn."""
    weights = {key: entry[key] for key in _WEIGHTS if entry.get(key) is not None}
    for key, weight in weights.items():
        if not isinstance(weight, bool | int | float) or weight not in (0, 1):
            raise Unusable(f"turn {number} has the {key} {str(weight)[:40]!r}; known: 0 (not trained) and 1")
        if weight and role != "assistant":
            raise Unusable(f"turn {number} has the {key} {weight}, but a {role} turn is never trained")
    return role != "assistant" or all(weights.values())
