"""Prompt templates: how an example becomes text, and which parts of the text are responses.

alpaca  The prompt published with Stanford Alpaca, in its forms with and without input. As in Alpaca's training code,
        the prompt ends with "### Response:", and the response follows without a line break. A system prompt replaces
        the introduction ("Below is an instruction ..."). Further exchanges begin with
        "\\n\\n### Instruction:\\n".
plain   Instruction, input and response, each on a new line. Earlier turns begin on new lines too.
chat    The tokenizer's own chat template (see `gradsift.data.chat_templates`). An input follows its instruction after a
        line break.
FILE.jinja
        A chat template in a file of the user, which replaces the tokenizer's chat template.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gradsift.data.chat_templates import Segment, chat_segments, is_chat, template_of
from gradsift.data.examples import Example, Turn

_TASK = "Below is an instruction that describes a task"
_REQUEST = "Write a response that appropriately completes the request."


def render(example: Example, template: str, tokenizer: Any = None) -> list[Segment]:
    """Return the text of an example as segments; assistant turns on which the model is trained are response segments.

    Args:
        template: alpaca, chat, plain or the file of a chat template.
        tokenizer: the model's tokenizer; needed for chat templates only.

    Raises:
        ConfigError: the tokenizer has no chat template, or the file of the template cannot be used.
        Unusable: the chat template cannot render this conversation.
    """
    last = [Turn("user", example.instruction), Turn("assistant", example.output)]
    return _render([*example.history, *last], example.input, template, tokenizer)


def prompt_segments(
    instruction: str, input: str, template: str, tokenizer: Any = None, history: Sequence[Turn] = ()
) -> list[Segment]:
    """Return the segments that `render` puts before the last response, as the prompt of a generation.

    `history` holds the turns before `instruction`. The other arguments and the errors are those of `render`.
    """
    return _render([*history, Turn("user", instruction)], input, template, tokenizer)


def _render(turns: list[Turn], input: str, template: str, tokenizer: Any) -> list[Segment]:
    """Return the segments of a conversation's turns. `input` is added to the last user turn."""
    last = max(place for place, turn in enumerate(turns) if turn.role == "user")
    if is_chat(template):
        if input:
            turns[last] = Turn("user", f"{turns[last].content}\n{input}")
        return chat_segments(turns, tokenizer, template_of(template, tokenizer))
    prompt_of = _alpaca_prompt if template == "alpaca" else _plain_prompt
    system = turns[0].content if turns[0].role == "system" else None
    segments: list[Segment] = []
    for place, turn in enumerate(turns):
        if turn.role == "assistant":
            segments.append(Segment(turn.content, turn.is_trained))
        elif turn.role == "user":
            own_input = input if place == last else ""
            segments.append(Segment(prompt_of(system, turn.content, own_input, is_first=not segments), False))
    return segments


def _alpaca_prompt(system: str | None, instruction: str, input: str, *, is_first: bool) -> str:
    start = ""
    if is_first and system is not None:
        start = system
    elif is_first:
        start = f"{_TASK}, paired with an input that provides further context. " if input else f"{_TASK}. "
        start += _REQUEST
    input_part = f"\n\n### Input:\n{input}" if input else ""
    return f"{start}\n\n### Instruction:\n{instruction}{input_part}\n\n### Response:"


def _plain_prompt(system: str | None, instruction: str, input: str, *, is_first: bool) -> str:
    start = "\n"  # ends the previous response
    if is_first:
        start = "" if system is None else system + "\n"
    return start + instruction + "\n" + (input + "\n" if input else "")
