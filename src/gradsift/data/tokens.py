"""Tokenises examples and prompts, and marks the tokens that belong to responses.

With a text template (alpaca, plain), the prompts and responses of an example are tokenised as one text, as in the code
of Alpaca and TRL. A token that holds both the end of a prompt and the start of its response counts as prompt, because
generation starts after the whole prompt and cannot produce this token. A token that holds the end of a response and the
start of the next prompt counts as prompt too. Prompts and responses are tokenised separately in two cases: with a chat
template, whose turns end at special tokens, and with a slow tokenizer, which does not tell which characters a token
holds.

The first token is the tokenizer's start token if the tokenizer adds one by itself (Llama). The last token of the
response is the tokenizer's end token, unless the text of a chat template already ends with a special token. A special
token that is spelled out in an example's text is tokenised as plain text.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from gradsift.artifacts import Artifact
from gradsift.data.chat_templates import DATE, Segment, file_text, is_chat
from gradsift.data.examples import Example, Rejected, Turn, write_rejected
from gradsift.data.templates import prompt_segments, render
from gradsift.data.truncation import Part, ids_of_segments, ids_of_texts, shorten, tokens_in, truncate
from gradsift.data.turns import Unusable
from gradsift.errors import ConfigError, DataError
from gradsift.runtime import Runtime

ENCODING = 2  # raised when the same text gets other tokens, or another boundary of prompt and response
_CHAT_ENCODING = 5  # raised instead of ENCODING when only the encoding with chat templates changes
_CHUNK = 1000  # texts tokenised in one call, to bound the memory of the tokenizer's own records
_CHUNK_CHARACTERS = 2_000_000  # characters tokenised in one call: the records take about 200 bytes per character
_MOST_UNKNOWN = 0.5  # share of unknown tokens above which the tokenizer cannot be meant for the data

REFUSED_FILE = "refused.jsonl"
_REFUSED_VERSION = 1
_REMEDY = "choose template=alpaca, or a chat template of your own, as in template=FILE.jinja"
_Texts = TypeVar("_Texts")


@dataclass(frozen=True, slots=True, eq=False)
class Encoded:
    """An example in tokens."""

    row: int  # position in the list of examples that was encoded
    row_index: int  # the example's row in the data's source, for messages
    input_ids: np.ndarray  # (T,) int32
    is_response: np.ndarray  # (T,) bool; False for the first token, so that every response token has a token before it
    lane: int = 0  # number of the example's adapter, if several adapters are trained side by side

    @property
    def scored(self) -> int:
        """Number of response tokens that the model predicts. The first token of an example is never predicted."""
        return int(self.is_response[1:].sum())


@dataclass(frozen=True, slots=True)
class EncodeReport:
    """What `encode` truncated or left out."""

    truncated_prompts: int  # number of examples that lost prompt tokens
    truncated_responses: int  # number of examples that lost response tokens
    rows_without_response: list[int]  # positions of examples whose response has no token; not encoded
    refused: dict[int, Rejected]  # by position, the examples that the chat template cannot render; not encoded


def encoding_settings(template: str, max_length: int) -> dict[str, Any]:
    """Return those settings of a stage that determine, together with the tokenizer, the tokens of its examples."""
    return {"template": template_identity(template), "max_length": max_length, "encoding": ENCODING}


def template_identity(template: str) -> str:
    """Return the text that identifies a template in the settings of a stage.

    This is the template's name, or the hash of its file. For chat templates, the version of the encoding and `DATE`
    (which a template writes as today's date) are added, because they change the tokens too.
    """
    if not is_chat(template):
        return template
    name = template if template == "chat" else hashlib.sha256(file_text(template).encode()).hexdigest()
    return f"{name} {_CHAT_ENCODING} {DATE}"


def encode(
    examples: Sequence[Example],
    tokenizer: Any,
    template: str,
    max_length: int,
    progress: Callable[[int], None] = lambda done: None,
) -> tuple[list[Encoded], EncodeReport]:
    """Tokenise examples, and truncate them to `max_length` tokens (see `gradsift.data.truncation`).

    Args:
        template: alpaca, chat, plain or the file of a chat template.
        max_length: largest number of tokens of an example, prompt and response together; at least 2.
        progress: called with the number of examples that were just tokenised.

    Returns:
        A list of the examples in tokens, in the order of `examples`, and a report of what was truncated. Examples that
        the report names as not encoded are missing from the list.

    Raises:
        ConfigError: the tokenizer or the template cannot be used, or the template can render none of the examples.
        DataError: more than half of the tokens are unknown to the tokenizer.
    """
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            f"the tokenizer {tokenizer.name_or_path!r} has no end token (eos), so a model could never learn where "
            "a response ends; choose a model whose tokenizer has one"
        )
    start, special = _start(tokenizer), set(tokenizer.all_special_ids)
    encoded: list[Encoded] = []
    without_response: list[int] = []
    refused: dict[int, Rejected] = {}
    cut_prompts = cut_responses = 0
    for row, parts in enumerate(_tokenised(examples, tokenizer, template, max_length, progress, refused)):
        if row in refused:
            continue
        if not tokens_in(parts, True):
            without_response.append(row)
            continue
        closed = is_chat(template) and not special.isdisjoint(parts[-1][0][-1:])
        complete = _with_start(parts if closed else [*parts, ([tokenizer.eos_token_id], True)], start)
        kept = truncate(complete, max_length)
        ids = np.fromiter(chain.from_iterable(ids for ids, _ in kept), dtype=np.int32)
        is_response = np.repeat([response for _, response in kept], [len(ids) for ids, _ in kept])
        is_response[0] = False  # True only if the prompt has no token
        if not is_response.any():
            without_response.append(row)
            continue
        encoded.append(Encoded(row, examples[row].row_index, ids, is_response))
        cut_prompts += tokens_in(kept, False) < tokens_in(complete, False)
        cut_responses += tokens_in(kept, True) < tokens_in(complete, True)
    return encoded, EncodeReport(cut_prompts, cut_responses, without_response, refused)


def encode_prompts(
    examples: Sequence[Example],
    tokenizer: Any,
    template: str,
    max_length: int,
    progress: Callable[[int], None] = lambda done: None,
) -> tuple[list[np.ndarray], int, dict[int, Rejected]]:
    """Tokenise the text before the last response of each example; arguments and errors are those of `encode`.

    A prompt of more than `max_length` tokens is cut from the left; the start token is kept if there is one.

    Returns:
        The token ids of each prompt, (T,) int32; the number of prompts that were cut; and the examples that the chat
        template cannot render, by position. The array of ids of such an example is empty.
    """
    start = _start(tokenizer)
    prompts: list[np.ndarray] = []
    refused: dict[int, Rejected] = {}
    cut = 0
    tokenised = _tokenised(examples, tokenizer, template, max_length, progress, refused, with_last_response=False)
    for row, parts in enumerate(tokenised):
        if row in refused:
            prompts.append(np.array([], dtype=np.int32))
            continue
        (first, _), *rest = _with_start(parts, start)
        ids = list(chain.from_iterable(part for part, _ in rest))
        excess = max(0, len(first) + len(ids) - max_length)
        cut += excess > 0
        prompts.append(np.array([*first, *ids[excess:]], dtype=np.int32))
    return prompts, cut, refused


def encode_prompt(
    instruction: str, input: str, tokenizer: Any, template: str, history: Sequence[Turn] = ()
) -> list[int]:
    """Return the token ids of a prompt, without truncation.

    They include the start token if the tokenizer adds one, and the generation prompt if the template has one.

    Raises:
        ConfigError: the template cannot be used, or cannot render this prompt.
    """
    try:
        segments = prompt_segments(instruction, input, template, tokenizer, history)
    except Unusable as reason:
        raise ConfigError(f"template={template}: {reason}; {_REMEDY}") from reason
    parts = [(ids, False) for ids in ids_of_segments(segments, tokenizer)]
    return list(chain.from_iterable(ids for ids, _ in _with_start(parts, _start(tokenizer))))


def start_of(text: str, tokenizer: Any, max_length: int) -> str:
    """Return the text, or only its start if it is far longer than `max_length` tokens.

    The start still has at least `max_length` tokens.
    """
    (segment,) = shorten([Segment(text, is_response=True)], tokenizer, max_length)
    return segment.text


def chunks(texts: Iterable[_Texts], characters_of: Callable[[_Texts], int]) -> Iterator[list[_Texts]]:
    """Divide the texts into lists, one for each call of the tokenizer.

    The lists have limited numbers of texts and characters, because the tokenizer's memory grows with both.
    """
    chunk: list[_Texts] = []
    characters = 0
    for text in texts:
        chunk.append(text)
        characters += characters_of(text)
        if len(chunk) == _CHUNK or characters >= _CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def say_refused(runtime: Runtime, refused: Iterable[Rejected], rows: int, group: str, what: str = "rows") -> None:
    """Print which rows the chat template of `group` (proxy or target) cannot render, and why.

    `rows` is the number of all rows, and `what` the word for them in the message.
    """
    by_reason: dict[str, list[int]] = {}
    for rejected in refused:
        by_reason.setdefault(rejected.reason, []).append(rejected.row)
    for reason, sources in by_reason.items():
        runtime.display.say(
            f"  {len(sources):,} of {rows:,} {what} are left out, because {group}.template cannot show them: {reason} "
            f"(rows {', '.join(map(str, sources[:10]))}{', ...' if len(sources) > 10 else ''})"
        )


def refused_rows(
    runtime: Runtime,
    slug: str,
    settings: Mapping[str, Any],
    model: Artifact,
    loaded: Artifact,
    report: Callable[[], EncodeReport],
) -> Artifact:
    """Return the artifact that lists the rows of the pool that the template cannot render (see `write_rejected`).

    Args:
        model: artifact of the model whose tokenizer and template are used.
        loaded: artifact of the load stage.
        report: returns the report of `encode` for the pool; called only if the store lacks the artifact.
    """

    def make(folder: Path) -> Mapping[str, Any]:
        refused = report().refused
        write_rejected(folder / REFUSED_FILE, list(refused.values()))
        return {"refused": len(refused)}

    return runtime.store.obtain("refused", slug, settings, [model, loaded], make, version=_REFUSED_VERSION)


# --------------------------------------------------------------------------------- segments to ids


def _tokenised(
    examples: Sequence[Example],
    tokenizer: Any,
    template: str,
    max_length: int,
    progress: Callable[[int], None],
    refused: dict[int, Rejected],
    *,
    with_last_response: bool = True,
) -> Iterator[list[Part]]:
    """Yield the parts of each example: token ids, and whether they belong to a response.

    If the template cannot render an example, its list of parts is empty, and the example is added to `refused`.

    If `with_last_response` is False, the text after the last prompt is left out.
    """
    as_one_text = not is_chat(template) and tokenizer.is_fast
    total = unknown = 0

    def segments(row: int) -> list[Segment]:
        try:
            rendered = render(examples[row], template, tokenizer)
        except Unusable as reason:
            refused[row] = Rejected(examples[row].row_index, str(reason), None, examples[row].original)
            return []
        while not with_last_response and rendered and rendered[-1].is_response:
            rendered.pop()  # before tokenising: prompt and response may share a token
        return shorten(rendered, tokenizer, max_length)

    segments_of = map(segments, range(len(examples)))
    for rendered in chunks(segments_of, lambda segments: sum(len(segment.text) for segment in segments)):
        for parts in (_as_one_text if as_one_text else _apart)(rendered, tokenizer):
            total += sum(len(ids) for ids, _ in parts)
            unknown += sum(ids.count(tokenizer.unk_token_id) for ids, _ in parts)
            yield parts
        progress(len(rendered))
    if refused and len(refused) == len(examples):
        reason, count = Counter(row.reason for row in refused.values()).most_common(1)[0]
        raise ConfigError(
            f"template={template} can show none of the {len(examples):,} conversations: {reason} ({count:,} rows); "
            f"{_REMEDY}"
        )
    if unknown > _MOST_UNKNOWN * total:
        raise DataError(
            f"{unknown / total:.0%} of the data's tokens are unknown to the tokenizer {tokenizer.name_or_path!r}; "
            "choose a model whose tokenizer fits the data"
        )


def _apart(rendered: Sequence[list[Segment]], tokenizer: Any) -> Iterator[list[Part]]:
    ids = iter(ids_of_segments(list(chain.from_iterable(rendered)), tokenizer))
    for segments in rendered:
        yield [(next(ids), segment.is_response) for segment in segments]


def _as_one_text(rendered: Sequence[list[Segment]], tokenizer: Any) -> Iterator[list[Part]]:
    """Tokenise each example as one text; a token that spans prompt and response counts as prompt.

    The offsets that a byte-level tokenizer gives may leave out blanks at the ends of a token. This puts no token into
    the wrong segment, because no template's prompt ends with a blank.
    """
    texts = ["".join(segment.text for segment in segments) for segments in rendered]
    output = ids_of_texts(texts, tokenizer, split_special_tokens=True, return_offsets_mapping=True)
    for segments, ids, offsets in zip(rendered, output["input_ids"], output["offset_mapping"], strict=True):
        parts: list[Part] = []
        done = boundary = 0
        for place, segment in enumerate(segments, start=1):
            boundary += len(segment.text)
            if place == len(segments):
                until = len(ids)
            elif segment.is_response:
                until = bisect_right(offsets, boundary, lo=done, key=lambda offset: offset[1])
            else:
                until = bisect_left(offsets, boundary, lo=done, key=lambda offset: offset[0])
            parts.append((ids[done:until], segment.is_response))
            done = until
        yield parts


def _start(tokenizer: Any) -> list[int]:
    """Return a list with the start token if the tokenizer adds it to a text by itself, otherwise an empty list."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else []


def _with_start(parts: list[Part], start: list[int]) -> list[Part]:
    """Return the parts, preceded by a new first part that holds `start`.

    If the chat template wrote the start token itself, the token is moved to this first part instead.
    """
    if parts and start and parts[0][0][:1] == start:
        return [(start, False), (parts[0][0][1:], parts[0][1]), *parts[1:]]
    return [(start, False), *parts]
