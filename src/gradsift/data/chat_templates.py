"""Chat templates: the text of a conversation, and which parts of it are responses.

Before the template renders the whole conversation, the texts of user and assistant turns are put between marks
(private-use Unicode characters). The marks show where each turn is in the rendered text, even if the template writes
earlier turns differently from the last turn (Qwen3, gpt-oss).

- A response is the text that the model has to generate: an assistant's text and the marker that ends the turn, without
  the white space after that marker. The text of the generation prompt, such as a header or an empty think block, counts
  as prompt. If the template has `{% generation %}` marks, responses lie within them.
- The text before the last response must equal the earlier turns rendered with the generation prompt. If the generation
  prompt opens a think block that the template omits from whole conversations (DeepSeek-R1), the last response begins
  with the row's reasoning, if there is any, and closes the block.
- A conversation with a think block is refused (`Unusable`) if the template has another notation for reasoning (gpt-oss,
  Gemma 4).
- A conversation is also refused if the template leaves out or changes the text of a turn.

The template's variable `enable_thinking` is true if an assistant turn has a `</think>`, otherwise false. A template
that writes today's date writes `DATE` instead, so that tokens do not depend on the day.
"""

from __future__ import annotations

import datetime
import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradsift.data.examples import Turn
from gradsift.data.turns import Unusable
from gradsift.errors import ConfigError

DATE = datetime.date(2024, 7, 26)  # the default date in Llama 3's templates
_PRIVATE_USE = range(0xF0000, 0xFFFFE)
_THINK, _THOUGHT = "<think>", "</think>"
_REASONS_APART = re.compile(r"\w(?:\.|\.get\(['\"]|\[['\"])(?:reasoning_content|thinking)\b")  # reads a message's key
_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
# exceptions that the code of a template may raise on unexpected data; Jinja does not catch them
_RAISED = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of text that is either all prompt or all response."""

    text: str
    is_response: bool  # whether the piece carries loss
    # Whether the piece comes from a chat template. Special tokens are recognised only in such pieces, so that "</s>" in
    # an example's text does not end a turn.
    is_markup: bool = False


def is_chat(template: str) -> bool:
    """Return whether `template` is `chat` (the tokenizer's own chat template) or the file of a chat template."""
    return template == "chat" or is_file(template)


def is_file(template: str) -> bool:
    """Return whether `template` names a file with a chat template."""
    return template.endswith(".jinja")


def template_of(template: str, tokenizer: Any) -> str:
    """Return the Jinja text of the tokenizer's chat template (if `template` is `chat`) or of the file `template`.

    Raises:
        ConfigError: the tokenizer has no default chat template, or the file cannot be read.
    """
    if template != "chat":
        return file_text(template)
    if not getattr(tokenizer, "chat_template", None):
        name = getattr(tokenizer, "name_or_path", None) or "given"
        raise ConfigError(
            f"template=chat: the tokenizer {name!r} has no chat template; choose "
            "template=alpaca, template=plain, or a template of your own, as in template=FILE.jinja"
        )
    try:
        text: str = tokenizer.get_chat_template()
    except ValueError as error:  # several named templates, none of them the default
        raise ConfigError(f"template=chat: {error}; give the template as a file, as in template=FILE.jinja") from error
    return text


def file_text(path: str) -> str:
    """Return the content of a template's file; raise ConfigError if it cannot be read."""
    try:
        return Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"template={path} cannot be read ({error}); name a file with a Jinja chat template"
        ) from error


def chat_segments(turns: Sequence[Turn], tokenizer: Any, template: str) -> list[Segment]:
    """Return the text of a conversation as segments.

    If the last turn is an assistant turn, the text ends with the last response on which the model is trained. If the
    last turn is a user turn, the text ends with the generation prompt.

    Args:
        turns: user and assistant turns that alternate, optionally preceded by a system turn.
        template: the Jinja text of the template.

    Raises:
        Unusable: the template cannot render this conversation.
        ConfigError: the template is not valid Jinja.
    """
    chat = _Chat(turns, tokenizer, template)
    if chat.thinks and _THINK not in template and _REASONS_APART.search(template):
        raise Unusable("the chat template shows reasoning in a notation of its own, not in a think block")
    if turns[-1].role == "user":
        return chat.segments(chat.rendered(len(turns), generate=True)[0], [])
    text, spans = chat.whole()
    chat.require_shown(text)
    replies = [number for number, turn in enumerate(turns) if turn.role == "assistant"]
    places = {number: chat.response(text, spans, number) for number in replies}
    return chat.segments(text, [places[number] for number in replies if turns[number].is_trained])


class _Chat:
    """A conversation with marks around the texts of its turns.

    If a turn's text spells out a control token, such as `</s>`, the token is replaced with a private-use character (its
    stand-in) before the template is rendered. Afterwards the token is restored as plain text.
    """

    def __init__(self, turns: Sequence[Turn], tokenizer: Any, template: str) -> None:
        self._turns, self._tokenizer, self._template = turns, tokenizer, template
        self._prompts: dict[int, str] = {}
        said = "\n".join(turn.content for turn in turns)
        unused = (character for character in map(chr, _PRIVATE_USE) if character not in said)
        self._control = _control_tokens(tokenizer, template)
        self._stand_ins = dict(zip([token for token in self._control if token in said], unused, strict=False))
        self._marks = [(next(unused), next(unused)) for _ in turns]
        self._texts = []
        for turn in turns:
            text = turn.content
            for token, stand_in in self._stand_ins.items():
                if self._control[token] or turn.role != "assistant":  # tags of an assistant's think block stay
                    text = text.replace(token, stand_in)
            self._texts.append(text)
        self.thinks = any(turn.role == "assistant" and _THOUGHT in turn.content for turn in turns)

    def whole(self) -> tuple[str, list[tuple[int, int]]]:
        """Return the rendered conversation, and the (start, end) of each part in `{% generation %}` marks.

        If the generation prompt opens a think block that the template omits from the conversation, the returned text
        has the whole generation prompt before the last response.
        """
        text, spans = self.rendered(len(self._turns), generate=False)
        prompt, end_mark = self._prompt(len(self._turns) - 1), self._marks[-1][1]
        before, _, opened = prompt.rpartition(_THINK)
        opens_alone = before and not opened.strip() and text.startswith(before) and not text.startswith(prompt)
        if not opens_alone or end_mark not in text:
            return text, spans
        answer = self._marked(len(self._turns) - 1).lstrip()
        thought = answer.removeprefix(_THINK).lstrip("\n") if _THOUGHT in answer else f"\n{_THOUGHT}\n\n{answer}"
        end, longer = text.index(end_mark), prompt + thought[: thought.index(end_mark)]
        spans = [(start, stop + len(longer) - end) if start <= end < stop else (start, stop) for start, stop in spans]
        return longer + text[end:], spans

    def _prompt(self, number: int) -> str:
        """Return the rendered turns before the assistant turn `number`, with the generation prompt at the end."""
        if number not in self._prompts:
            self._prompts[number], _ = self.rendered(number, generate=True)
        return self._prompts[number]

    def rendered(self, count: int, *, generate: bool) -> tuple[str, list[tuple[int, int]]]:
        """Render the first `count` turns, and the generation prompt if `generate` is True.

        Returns the text, and the (start, end) of each part that the template puts in `{% generation %}` marks.
        """
        messages: list[dict[str, Any]] = []
        for number, turn in enumerate(self._turns[:count]):
            text = self._marked(number)
            content = [{"type": "text", "text": text}] if _takes_parts(self._template) else text
            messages.append({"role": turn.role, "content": content})
        options = {**self._tokenizer.special_tokens_map, "enable_thinking": self.thinks}
        try:
            return _render(self._template, messages, generate=generate, **options)
        except Unusable as error:
            raise Unusable(f"the chat template refuses the conversation ({str(error)[:200]})") from error

    def _marked(self, number: int) -> str:
        """Return the text of a turn with marks around its core (see `_core`).

        System turns and empty turns get no marks.
        """
        text, core = self._texts[number], self._core(number)
        if self._turns[number].role == "system" or not core:
            return text
        place = text.rindex(core)
        return text[:place] + core.join(self._marks[number]) + text[place + len(core) :]

    def _core(self, number: int) -> str:
        """Return the text of a turn without outer white space.

        The reasoning of an assistant turn is left out too, unless the turn has nothing else.
        """
        text = self._texts[number].strip()
        answer = text.rpartition(_THOUGHT)[2].strip() if self._turns[number].role == "assistant" else text
        return answer or text

    def require_shown(self, text: str) -> None:
        """Raise Unusable if the template changes a turn's text in more than white space, or adds a think block."""
        for number, turn in enumerate(self._turns):
            said, (start, end) = _squeezed(self._texts[number]), self._marks[number]
            if turn.role == "system":
                is_shown = said in _squeezed(text)
            else:
                begin = max(0, text.find(self._marks[number - 1][1]) if number else 0)  # a system turn has no marks
                shown = _squeezed(text[begin : text.find(end)].replace(start, ""))
                is_shown = said in shown and f"{start}{self._core(number)}{end}" in text
            if not is_shown:
                raise Unusable(
                    f"the chat template leaves out or changes the text of turn {number + 1} (the {turn.role}'s)"
                )
            if turn.role == "assistant" and _THOUGHT in said and shown.count(_THOUGHT) > said.count(_THOUGHT):
                raise Unusable(f"the chat template adds a think block to that of turn {number + 1}")

    def response(self, text: str, spans: list[tuple[int, int]], number: int) -> tuple[int, int]:
        """Return the start and the end, in the text of the whole conversation, of the response in turn `number`.

        Raises:
            Unusable: the text before the response is not the generation prompt, or the template has generation marks,
                but none around the response.
        """
        asked, (start_mark, end_mark) = self._marks[number - 1][1], self._marks[number]
        prompt = self._prompt(number)
        supplied = prompt[prompt.find(asked) + 1 :]
        begin, end = text.index(asked) + 1, text.index(end_mark, text.index(asked))
        before = text[begin : text.index(start_mark, begin)]
        shared = next((n for n, pair in enumerate(zip(before, supplied, strict=False)) if len(set(pair)) > 1), None)
        start = begin + (min(len(before), len(supplied)) if shared is None else shared)
        is_last = number == len(self._turns) - 1
        if start - begin < len(supplied) and (is_last or text[start : begin + len(before)].strip()):
            raise Unusable(
                f"the chat template's generation prompt ends with {supplied.strip()[-80:]!r}, which is not before the "
                "response of a whole conversation"
            )
        if is_last and not text.startswith(prompt):
            raise Unusable("the chat template changes earlier turns when the response is added")
        if not _GENERATION.search(self._template):
            return start, self._end(text, end)
        for span_start, span_end in spans:
            if span_start <= end < span_end:
                return max(start, span_start), span_start + len(text[span_start:span_end].rstrip())
        raise Unusable(f"the chat template has no generation marks around turn {number + 1}")

    def _end(self, text: str, end_mark: int) -> int:
        """Return where a response ends: after the marker that ends the turn or, without a marker, after the text."""
        closing = text[text.index(self._marks[-1][1]) + 1 :].strip()  # what follows the last turn's text
        if closing.startswith(tuple(self._control)):  # some templates write an end-of-text token on the next line
            closing = closing.split()[0]
        after = text[end_mark + 1 :]
        for marker in (closing, *self._control):
            if marker and after.lstrip().startswith(marker):
                return end_mark + 1 + after.index(marker) + len(marker)
        return end_mark + 1

    def segments(self, text: str, responses: Sequence[tuple[int, int]]) -> list[Segment]:
        """Return the segments up to the end of the last response, or of the whole text if there is no response."""
        segments: list[Segment] = []
        done = 0
        for start, end in responses:
            segments += self._split(text[done:start], is_response=False)
            segments += self._split(text[start:end], is_response=True)
            done = end
        return segments if responses else self._split(text, is_response=False)

    def _split(self, text: str, *, is_response: bool) -> list[Segment]:
        """Return the text without marks, as markup segments.

        The tokens that stand-ins replaced become plain-text segments.
        """
        text = text.translate({ord(mark): None for marks in self._marks for mark in marks})
        tokens = {stand_in: token for token, stand_in in self._stand_ins.items()}
        segments = []
        for piece in re.split(f"([{''.join(tokens)}])", text) if tokens else [text]:
            token = tokens.get(piece)
            if token is None:
                segments.append(Segment(piece, is_response, is_markup=True))
            elif self._control[token]:
                segments.append(Segment(token, is_response))
            else:  # `split_special_tokens` splits only special tokens, so other added tokens are divided here
                segments += [Segment(token[:1], is_response), Segment(token[1:], is_response)]
        return [segment for segment in segments if segment.text]


def _squeezed(text: str) -> str:
    return "".join(text.split())


@functools.lru_cache(maxsize=4)  # called for every example, and slow
def _control_tokens(tokenizer: Any, template: str) -> dict[str, bool]:
    """Return the control tokens, the longest first, and whether each one is a special token.

    Control tokens are the tokenizer's special tokens, and those of its other added tokens that the template contains.
    """
    added = {token.content: bool(token.special) for token in tokenizer.added_tokens_decoder.values()}
    control = [token for token, special in added.items() if special or (token.strip() and token in template)]
    return {token: added[token] for token in sorted(control, key=len, reverse=True)}  # a token may contain another


@functools.lru_cache(maxsize=4)
def _takes_parts(template: str) -> bool:
    """Return whether a template shows the content of a message only if it is a list of parts, as for vision models."""
    shown = []
    for content in ("probe", [{"type": "text", "text": "probe"}]):
        try:
            message = {"role": "user", "content": content}
            shown.append("probe" in _render(template, [message], generate=False, bos_token="", eos_token="")[0])
        except Unusable:
            shown.append(False)
    return shown == [False, True]


def _render(
    template: str, messages: list[dict[str, Any]], *, generate: bool, **options: Any
) -> tuple[str, list[tuple[int, int]]]:
    from jinja2.exceptions import TemplateError, TemplateSyntaxError
    from transformers.utils.chat_template_utils import render_jinja_template

    template = _with_date(template)
    options |= {"add_generation_prompt": generate, "return_assistant_tokens_mask": bool(_GENERATION.search(template))}
    try:
        rendered: Any = render_jinja_template(conversations=[messages], chat_template=template, **options)
    except TemplateSyntaxError as error:
        raise ConfigError(
            f"the chat template is no valid Jinja: {error}; correct it, or choose template=alpaca"
        ) from error
    except (TemplateError, *_RAISED) as error:
        raise Unusable(str(error) or type(error).__name__) from error
    texts, spans = rendered
    return texts[0], spans[0] if spans else []


@functools.lru_cache(maxsize=4)
def _with_date(template: str) -> str:
    """Return the template with a macro `strftime_now` that formats `DATE`.

    The macro replaces transformers' function of this name, which formats today's date.
    """
    if "strftime_now" not in template:
        return template
    codes = "".join(f"|replace('%{code}', '{DATE.strftime('%' + code)}')" for code in (*"aAbBdejmyYHIMSpxXcF", "-d"))
    return f"{{%- macro strftime_now(format) -%}}{{{{ format{codes} }}}}{{%- endmacro %}}\n{template}"  # Jinja drops \n
