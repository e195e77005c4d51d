"""Prompt templates: how an example becomes text, and which part of the text is response.

alpaca  The prompt published with Stanford Alpaca, in its forms with and without input. As in Alpaca's training code,
        the prompt ends with "### Response:", and the response follows without a line break. A system prompt replaces
        the introduction. A further exchange begins with "\\n\\n### Instruction:\\n".
plain   Instruction, input and response, each starting on a new line. The turns of a history start on new lines too.
chat    The tokenizer's own chat template (see `gradsift.data.chat_templates`). An input follows its instruction after a
        line break.
FILE.jinja
        A chat template in a file of the user, used in place of the tokenizer's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gradsift.data.chat_templates import Segment, chat_segments, is_chat, template_of
from gradsift.data.examples import Example, Turn
from gradsift.errors import ConfigError, DataError

_TASK = "Below is an instruction that describes a task"
_REQUEST = "Write a response that appropriately completes the request."
ALPACA_INTRODUCTION = f"{_TASK}. {_REQUEST}"
ALPACA_INTRODUCTION_WITH_INPUT = f"{_TASK}, paired with an input that provides further context. {_REQUEST}"


@dataclass(frozen=True, slots=True)
class _Exchange:
    instruction: str
    input: str
    output: str | None  # None if it is still to be generated
    is_trained: bool = True  # whether the output carries loss


def render(example: Example, template: str, tokenizer: Any = None) -> list[Segment]:
    """Return the text of an example as segments; every assistant turn that is trained is a response segment.

    Args:
        template: alpaca, chat, plain or the file of a chat template.
        tokenizer: needed for chat templates only.

    Raises:
        ConfigError: the template is unknown, or the tokenizer has no chat template.
        Unusable: the chat template cannot render this conversation.
        DataError: the turns of the history do not alternate between user and assistant.
    """
    turns = list(example.history)
    system = turns.pop(0).content if turns and turns[0].role == "system" else None
    if [turn.role for turn in turns] != ["user", "assistant"] * (len(turns) // 2):
        raise DataError(
            f"row {example.row_index}: the turns before the last exchange do not alternate between user and assistant"
        )
    exchanges = [*_exchanges(turns), _Exchange(example.instruction, example.input, example.output)]
    return _render(system, exchanges, template, tokenizer)


def prompt_segments(
    instruction: str, input: str, template: str, tokenizer: Any = None, history: Sequence[Turn] = ()
) -> list[Segment]:
    """Return the segments that `render` puts before the response, so that a response can be generated after them.

    Args:
        history: the earlier turns, user and assistant alternating.

    Raises:
        ConfigError: the template is unknown, or the tokenizer has no chat template.
        Unusable: the chat template cannot render this prompt.
    """
    return _render(None, [*_exchanges(history), _Exchange(instruction, input, None)], template, tokenizer)


def _exchanges(turns: Sequence[Turn]) -> list[_Exchange]:
    return [
        _Exchange(user.content, "", reply.content, reply.is_trained)
        for user, reply in zip(turns[::2], turns[1::2], strict=True)
    ]


def _render(system: str | None, exchanges: list[_Exchange], template: str, tokenizer: Any) -> list[Segment]:
    if is_chat(template):
        return _chat(system, exchanges, template, tokenizer)
    if template not in ("alpaca", "plain"):
        raise ConfigError(f"template={template!r} is not known; choose alpaca, chat, plain or a FILE.jinja")
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


def _chat(system: str | None, exchanges: list[_Exchange], template: str, tokenizer: Any) -> list[Segment]:
    turns = [] if system is None else [Turn("system", system)]
    for exchange in exchanges:
        turns.append(Turn("user", exchange.instruction + ("\n" + exchange.input if exchange.input else "")))
        if exchange.output is not None:
            turns.append(Turn("assistant", exchange.output, exchange.is_trained))
    return chat_segments(turns, tokenizer, template_of(template, tokenizer))
