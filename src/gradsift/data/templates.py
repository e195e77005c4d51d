"""Prompt templates: how an example becomes text, and which part of the text is response.

alpaca  The prompt published with Stanford Alpaca, with and without input. As in its training code, the prompt ends
        with "### Response:" and the response follows without a line break. A system prompt replaces the introduction;
        a further exchange begins with "\\n\\n### Instruction:\\n".
plain   Instruction and input, a line each, then the response. Turns of a history are lines as well.
chat    The tokenizer's own chat template. An input follows its instruction after a line break. A response is an
        assistant's text with the marker that ends the turn, without the white space after that marker: generation
        stops at the marker.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from typing import Any

from gradsift.data.examples import Example, Turn
from gradsift.errors import ConfigError, DataError

_TASK = "Below is an instruction that describes a task"
_REQUEST = "Write a response that appropriately completes the request."
ALPACA_INTRODUCTION = f"{_TASK}. {_REQUEST}"
ALPACA_INTRODUCTION_WITH_INPUT = f"{_TASK}, paired with an input that provides further context. {_REQUEST}"


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of text that is prompt or response as a whole.

    is_response  carries loss
    is_markup    comes from a chat template and may spell special tokens; in other text "</s>" is text like any other,
                 so that no example can end a turn or start another one
    """

    text: str
    is_response: bool
    is_markup: bool = False


@dataclass(frozen=True, slots=True)
class _Exchange:
    instruction: str
    input: str
    output: str | None  # None: still to be generated
    is_trained: bool = True  # whether the output is response, which carries loss


def render(example: Example, template: str, tokenizer: Any = None) -> list[Segment]:
    """Return the text of an example; every assistant turn that is trained is a response segment.

    Args:
        template: alpaca, chat or plain.
        tokenizer: its chat template is used; needed for chat only.

    Raises:
        ConfigError: an unknown template, or a tokenizer without a usable chat template.
        DataError: the turns of the history do not alternate between user and assistant.
    """
    turns = list(example.history)
    system = turns.pop(0).content if turns and turns[0].role == "system" else None
    if [turn.role for turn in turns] != ["user", "assistant"] * (len(turns) // 2):
        raise DataError(
            f"row {example.row_index}: the turns before the last exchange do not alternate between user and assistant"
        )
    exchanges = [
        _Exchange(user.content, "", reply.content, reply.is_trained)
        for user, reply in zip(turns[::2], turns[1::2], strict=True)
    ]
    exchanges.append(_Exchange(example.instruction, example.input, example.output))
    return _render(system, exchanges, template, tokenizer)


def prompt_segments(instruction: str, input: str, template: str, tokenizer: Any = None) -> list[Segment]:
    """Return the part of `render` before the response, which a response is generated after; without a history.

    Raises:
        ConfigError: an unknown template, or a tokenizer without a usable chat template.
    """
    return _render(None, [_Exchange(instruction, input, None)], template, tokenizer)


def _render(system: str | None, exchanges: list[_Exchange], template: str, tokenizer: Any) -> list[Segment]:
    if template == "chat":
        return _chat(system, exchanges, tokenizer)
    if template not in ("alpaca", "plain"):
        raise ConfigError(f"template={template!r} is not known; choose one of: alpaca, chat, plain")
    prompt_of = _alpaca_prompt if template == "alpaca" else _plain_prompt
    segments = []
    for number, exchange in enumerate(exchanges):
        segments.append(Segment(prompt_of(system, exchange, is_first=number == 0), False))
        if exchange.output is not None:
            segments.append(Segment(exchange.output, exchange.is_trained))
    return segments


def _alpaca_prompt(system: str | None, exchange: _Exchange, *, is_first: bool) -> str:
    start = ""
    if is_first:
        start = ALPACA_INTRODUCTION_WITH_INPUT if exchange.input else ALPACA_INTRODUCTION
        start = start if system is None else system
    input_part = f"\n\n### Input:\n{exchange.input}" if exchange.input else ""
    return f"{start}\n\n### Instruction:\n{exchange.instruction}{input_part}\n\n### Response:"


def _plain_prompt(system: str | None, exchange: _Exchange, *, is_first: bool) -> str:
    start = "\n"  # ends the previous response
    if is_first:
        start = "" if system is None else system + "\n"
    return start + exchange.instruction + "\n" + (exchange.input + "\n" if exchange.input else "")


# -------------------------------------------------------------------------------------------- chat


def _chat(system: str | None, exchanges: list[_Exchange], tokenizer: Any) -> list[Segment]:
    """Render turn by turn: the text that a turn adds to the conversation so far is that turn's.

    A chat template is a program over the whole conversation, so each text is checked to begin with the previous one.
    """
    if not getattr(tokenizer, "chat_template", None):
        name = getattr(tokenizer, "name_or_path", None) or "given"
        raise ConfigError(
            f"template=chat needs a tokenizer with a chat template, which the tokenizer {name!r} has not; "
            "choose template=alpaca or template=plain"
        )
    turns = [] if system is None else [Turn("system", system)]
    for exchange in exchanges:
        turns.append(Turn("user", exchange.instruction + ("\n" + exchange.input if exchange.input else "")))
        if exchange.output is not None:
            turns.append(Turn("assistant", exchange.output, exchange.is_trained))
    stand_ins = _stand_ins("\n".join(turn.content for turn in turns), tokenizer)
    messages = []
    for turn in turns:
        content = turn.content
        for token, mark in stand_ins.items():
            content = content.replace(token, mark)
        messages.append({"role": turn.role, "content": content})
    segments: list[Segment] = []
    shown = ""
    for number, turn in enumerate(turns, start=1):
        if turn.role == "user":
            text = _apply(tokenizer, messages[:number], add_generation_prompt=True)
        elif turn.role == "assistant":  # the white space after its end marker is left to the next prompt
            text = _apply(tokenizer, messages[:number], add_generation_prompt=False).rstrip()
        else:
            continue  # a system prompt appears with the first user turn, as some templates merge the two
        if not text.startswith(shown):
            raise ConfigError(
                "template=chat: the tokenizer's chat template changes earlier turns when later ones are added, so a "
                "response has no fixed place in its text; choose template=alpaca or template=plain"
            )
        segments += _split(text[len(shown) :], stand_ins, is_response=turn.role == "assistant" and turn.is_trained)
        shown = text
    return segments


def _apply(tokenizer: Any, messages: list[dict[str, str]], *, add_generation_prompt: bool) -> str:
    from jinja2.exceptions import TemplateError

    try:
        text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise ConfigError(
            f"template=chat: the tokenizer's chat template refuses a conversation of {roles} ({error}); "
            "choose template=alpaca or template=plain"
        ) from error
    return text


def _stand_ins(text: str, tokenizer: Any) -> dict[str, str]:
    """Return a private-use character, absent from `text`, for each special token that `text` spells.

    They pass through the chat template in place of the tokens, which separates what an example says from what the
    template writes.
    """
    spelt = [token for token in _special_tokens(tokenizer) if token in text]
    if not spelt:
        return {}
    absent = (mark for mark in map(chr, range(0xF0000, 0xFFFFE)) if mark not in text)
    return dict(zip(spelt, absent, strict=False))


@functools.lru_cache(maxsize=2)  # slow, and needed for every example
def _special_tokens(tokenizer: Any) -> tuple[str, ...]:
    tokens = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return tuple(sorted(tokens, key=len, reverse=True))  # a token may be part of another one


def _split(text: str, stand_ins: dict[str, str], *, is_response: bool) -> list[Segment]:
    """Return one markup segment, or several if stand-ins have to become text again."""
    if not stand_ins:
        return [Segment(text, is_response, is_markup=True)]
    tokens = {mark: token for token, mark in stand_ins.items()}
    pieces = re.split(f"([{''.join(tokens)}])", text)
    segments = [
        Segment(tokens[piece], is_response) if piece in tokens else Segment(piece, is_response, is_markup=True)
        for piece in pieces
    ]
    return [segment for segment in segments if segment.text]
