"""Tokens of examples and prompts, and which of them are response."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, groupby
from typing import Any, TypeVar

import numpy as np

from gradsift.data.examples import Example
from gradsift.data.templates import Segment, prompt_segments, render
from gradsift.errors import ConfigError, DataError

_CHUNK = 1000  # examples tokenised in one call: bounds the memory that a tokenizer's own records take
_CHUNK_CHARACTERS = 2_000_000  # the same for long examples: the records take some 200 bytes a character
_WINDOW = 20_000, 64  # characters, and characters a token of the limit: a text that is longer than both may be cut
_MARGIN = 64  # tokens kept beyond the limit, so that the cut in a text does not change the tokens within it
_MOST_UNKNOWN = 0.5  # share of unknown tokens above which the tokenizer cannot be meant for the data


@dataclass(frozen=True, slots=True, eq=False)
class Encoded:
    """An example in tokens.

    row          position in the list of examples that was encoded
    row_index    the example's row in the data's source, for messages
    input_ids    (T,) int32
    is_response  (T,) bool; the first token never is, so every response token has one before it
    """

    row: int
    row_index: int
    input_ids: np.ndarray
    is_response: np.ndarray

    @property
    def scored(self) -> int:
        """The number of tokens with a loss: response tokens, without a first one, which nothing predicts."""
        return int(self.is_response[1:].sum())


@dataclass(frozen=True, slots=True)
class EncodeReport:
    """What happened to the examples on the way.

    truncated_prompts      examples that lost prompt tokens
    truncated_responses    examples that lost response tokens
    rows_without_response  positions of examples whose response has no token; they are not encoded
    unknown_share          share of unknown tokens over prompts and responses
    """

    truncated_prompts: int
    truncated_responses: int
    rows_without_response: list[int]
    unknown_share: float


ENCODING = 2  # raised when the same text has other tokens, or another boundary between prompt and response

Part = tuple[list[int], bool]  # token ids, is_response
_Texts = TypeVar("_Texts")


def encoding_settings(template: str, max_length: int) -> dict[str, Any]:
    """What an example's tokens depend on besides the tokenizer, for the settings of a stage."""
    return {"template": template, "max_length": max_length, "encoding": ENCODING}


def encode(
    examples: Sequence[Example],
    tokenizer: Any,
    template: str,
    max_length: int,
    progress: Callable[[int], None] = lambda done: None,
) -> tuple[list[Encoded], EncodeReport]:
    """Tokenise examples, in their order.

    A text template (alpaca, plain) is tokenised as one text, as Alpaca's and TRL's code do. A token that holds both the
    end of a prompt and the start of its response is prompt: generation begins behind the whole prompt, where no such
    token can come. One that holds the end of a response and the start of the next prompt is prompt, too. Of a tokenizer
    without offsets (a slow one), and of a chat template, whose turns end at special tokens, each part is tokenised by
    itself.

    The tokenizer's start token comes first where it puts one there by itself (Llama) and the chat
    template does not. Its end token comes last and belongs to the response, unless the chat template has
    closed the turn already. A special token that is spelt out in an example's text is text.

    Of an example longer than `max_length`, prompt tokens go first, from the left; at least one
    token of context stays, and it is the start token where there is one. Response tokens go only where
    they do not fit by themselves: of a conversation then its earliest exchanges as a whole, of a
    single response its end.

    Args:
        template: alpaca, chat or plain.
        max_length: tokens, prompt and response together; at least 2.
        progress: called with the number of examples that were just done.

    Raises:
        ConfigError: `max_length` or the template cannot be used.
        DataError: more than half of the tokens are unknown to the tokenizer.
    """
    if max_length < 2:
        raise ConfigError(f"max_length={max_length} is too small; give at least 2")
    start, end, special = _start(tokenizer), _end(tokenizer), set(tokenizer.all_special_ids)
    encoded: list[Encoded] = []
    silent: list[int] = []
    cut_prompts = cut_responses = unknown = total = 0
    unknown_id = tokenizer.unk_token_id
    cut = partial(shortened, tokenizer=tokenizer, max_length=max_length)
    for row, parts in enumerate(_tokenised(examples, tokenizer, template, progress, cut)):
        total += sum(len(ids) for ids, _ in parts)
        unknown += sum(ids.count(unknown_id) for ids, _ in parts)
        if not _tokens(parts, True):
            silent.append(row)
            continue
        closed = template == "chat" and not special.isdisjoint(parts[-1][0][-1:])
        whole = _with_start(parts if closed else [*parts, (end, True)], start)
        fitted = _fit(whole, max_length)
        example = _encoded(row, examples[row].row_index, fitted)
        if not example.is_response.any():
            silent.append(row)
            continue
        encoded.append(example)
        cut_prompts += _tokens(fitted, False) < _tokens(whole, False)
        cut_responses += _tokens(fitted, True) < _tokens(whole, True)
    share = unknown / total if total else 0.0
    _refuse_unknown(share, tokenizer)
    return encoded, EncodeReport(cut_prompts, cut_responses, silent, share)


def encode_prompts(
    examples: Sequence[Example],
    tokenizer: Any,
    template: str,
    max_length: int,
    progress: Callable[[int], None] = lambda done: None,
) -> tuple[list[np.ndarray], int]:
    """Token ids of all that comes before each example's last response, and how many of these prompts were cut.

    A prompt longer than `max_length` loses tokens from the left, except the start token where there is one.

    Returns:
        (T,) int32 each, and the number of those that were cut

    Raises:
        ConfigError: the template cannot be used.
        DataError: more than half of the tokens are unknown to the tokenizer.
    """
    start, unknown_id = _start(tokenizer), tokenizer.unk_token_id
    found: list[np.ndarray] = []
    cut = unknown = total = 0

    def asked(segments: list[Segment]) -> list[Segment]:
        while segments and segments[-1].is_response:  # before it is tokenised: it may share a token with the prompt
            segments.pop()
        return shortened(segments, tokenizer, max_length, keep_ends=True)

    for parts in _tokenised(examples, tokenizer, template, progress, asked):
        (first, _), *rest = _with_start(parts, start)
        ids = list(chain.from_iterable(part for part, _ in rest))
        total, unknown = total + len(ids), unknown + ids.count(unknown_id)
        excess = max(0, len(first) + len(ids) - max_length)
        cut += excess > 0
        found.append(np.array([*first, *ids[excess:]], dtype=np.int32))
    _refuse_unknown(unknown / total if total else 0.0, tokenizer)
    return found, cut


def encode_prompt(instruction: str, input: str, tokenizer: Any, template: str) -> list[int]:
    """Token ids after which a response is generated: those of the prompt part in `encode`, not cut.

    Raises:
        ConfigError: the template cannot be used.
    """
    segments = prompt_segments(instruction, input, template, tokenizer)
    parts = [(ids, False) for ids in _ids(segments, tokenizer)]
    return list(chain.from_iterable(ids for ids, _ in _with_start(parts, _start(tokenizer))))


# --------------------------------------------------------------------------------- segments to ids


def _tokenised(
    examples: Sequence[Example],
    tokenizer: Any,
    template: str,
    progress: Callable[[int], None],
    cut: Callable[[list[Segment]], list[Segment]],
) -> Iterator[list[Part]]:
    """The parts of each example, in order; `cut` shortens the segments of one before they are tokenised."""
    every = (cut(render(example, template, tokenizer)) for example in examples)
    parts_of = _as_one_text if template != "chat" and tokenizer.is_fast else _apart
    for rendered in chunks(every, lambda segments: sum(len(segment.text) for segment in segments)):
        yield from parts_of(rendered, tokenizer)
        progress(len(rendered))


def _apart(rendered: Sequence[list[Segment]], tokenizer: Any) -> Iterator[list[Part]]:
    ids = iter(_ids(list(chain.from_iterable(rendered)), tokenizer))
    for segments in rendered:
        yield [(next(ids), segment.is_response) for segment in segments]


def _as_one_text(rendered: Sequence[list[Segment]], tokenizer: Any) -> Iterator[list[Part]]:
    texts = ["".join(segment.text for segment in segments) for segments in rendered]
    output = _call(tokenizer, texts, split_special_tokens=True, return_offsets_mapping=True)
    for segments, ids, offsets in zip(rendered, output["input_ids"], output["offset_mapping"], strict=True):
        yield _divided(segments, ids, offsets)


def _divided(segments: Sequence[Segment], ids: list[int], offsets: Sequence[tuple[int, int]]) -> list[Part]:
    """The tokens of each segment of one text, a token on both sides of a boundary on the side that is prompt.

    Args:
        offsets: of each token, its first character and the one behind its last. Byte-level tokenizers may leave out
            blanks at its ends, which moves no token over a boundary: no template's prompt ends with a blank.
    """
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
    return parts


def chunks(texts: Iterable[_Texts], characters_of: Callable[[_Texts], int]) -> Iterator[list[_Texts]]:
    """What is tokenised in one call: as many texts as keep a tokenizer's own records small."""
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


def start_of(text: str, tokenizer: Any, max_length: int) -> str:
    """The text, or of one far longer than `max_length` tokens a start that holds somewhat more tokens than that."""
    (segment,) = shortened([Segment(text, is_response=True)], tokenizer, max_length)
    return segment.text


def shortened(segments: list[Segment], tokenizer: Any, max_length: int, *, keep_ends: bool = False) -> list[Segment]:
    """The segments without most of what truncation to `max_length` tokens takes: 100 MB of text take 20 GB in tokens.

    Truncation takes prompts from the left, responses from the right, and the earliest exchanges, of which no more
    than `max_length` can stay. So a prompt keeps its end and the last response its start, each somewhat longer than
    `max_length` tokens. An earlier response that is cut is one that truncation takes as a whole; it keeps the end, as a
    token may reach from there into the next prompt. For the same reason a prompt behind a response keeps its start too.
    Examples that are not much longer than that stay whole.

    Args:
        keep_ends: the last response keeps its end too, as it is context.
    """
    window = max(_WINDOW[0], _WINDOW[1] * max_length)
    if sum(len(segment.text) for segment in segments) <= window:
        return segments
    runs = [(response, list(run)) for response, run in groupby(segments, key=lambda segment: segment.is_response)]
    runs = runs[-2 * max_length :]  # a prompt and a response each
    kept: list[Segment] = []
    for number, (response, run) in enumerate(runs):
        from_end = keep_ends or not response or number < len(runs) - 1
        with_start = from_end and not response and number > 0
        kept += _cut_run(run, tokenizer, max_length, window, from_end=from_end, with_start=with_start)
    return kept


def _cut_run(
    run: list[Segment], tokenizer: Any, max_length: int, window: int, *, from_end: bool, with_start: bool
) -> list[Segment]:
    """The last or first `window` characters of segments; four times as many until they are enough tokens."""
    while window * (1 + with_start) < sum(len(segment.text) for segment in run):
        kept = _last_characters(run, window) if from_end else _first_characters(run, window)
        if sum(map(len, _ids(kept, tokenizer))) >= max_length + _MARGIN:
            return [*_first_characters(run, window), *kept] if with_start else kept
        window *= 4
    return run


def _first_characters(segments: Sequence[Segment], room: int) -> list[Segment]:
    kept = []
    for segment in segments:
        if room > 0:
            kept.append(replace(segment, text=segment.text[:room]))
            room -= len(segment.text)
    return kept


def _last_characters(segments: Sequence[Segment], room: int) -> list[Segment]:
    kept = []
    for segment in reversed(segments):
        if room > 0:
            kept.append(replace(segment, text=segment.text[-room:]))
            room -= len(segment.text)
    return kept[::-1]


def _ids(segments: Sequence[Segment], tokenizer: Any) -> list[list[int]]:
    """Token ids of each segment, each tokenised apart from the others."""
    found: list[list[int]] = [[] for _ in segments]
    for is_markup in (False, True):
        places = [place for place, segment in enumerate(segments) if segment.is_markup is is_markup]
        if not places:
            continue
        output = _call(tokenizer, [segments[place].text for place in places], split_special_tokens=not is_markup)
        for place, ids in zip(places, output["input_ids"], strict=True):
            found[place] = ids
    return found


def _call(tokenizer: Any, texts: list[str], **options: bool) -> Any:
    return tokenizer(
        texts,
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,  # no warning about the model's length: `_fit` sees to it
        **options,
    )


def _start(tokenizer: Any) -> list[int]:
    """The start token, if the tokenizer has one and puts it before a text by itself."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else []


def _end(tokenizer: Any) -> list[int]:
    eos = tokenizer.eos_token_id
    if eos is None:
        raise ConfigError(
            f"the tokenizer {tokenizer.name_or_path!r} has no end token (eos), so a model could never learn where "
            "a response ends; choose a model whose tokenizer has one"
        )
    return [eos]


def _with_start(parts: list[Part], start: list[int]) -> list[Part]:
    """The parts after the start token, unless a chat template wrote it already."""
    if parts and start and parts[0][0][:1] == start:
        return [(start, False), (parts[0][0][1:], parts[0][1]), *parts[1:]]
    return [(start, False), *parts]


# --------------------------------------------------------------------------------------- truncation


def _fit(parts: list[Part], max_length: int) -> list[Part]:
    """Cut parts (the first of which holds the start token, or nothing) to `max_length` as `encode` says."""
    start, *rest = parts
    rest = _joined(rest)
    while _tokens(rest, True) > max_length - 1 and (later := _after_first_exchange(rest)):
        rest = later
    rest = _cut_end(rest, max_length - 1)
    excess = len(start[0]) + sum(len(ids) for ids, _ in rest) - max_length
    kept = [start]
    must_stay = 0 if start[0] else 1  # the first context token: what follows is predicted from it
    for ids, is_response in rest:
        if not is_response and excess > 0 and ids:
            dropped = min(excess, len(ids) - must_stay)
            excess -= dropped
            ids, must_stay = ids[dropped:], 0
        kept.append((ids, is_response))
    return kept


def _joined(parts: list[Part]) -> list[Part]:
    """The parts, those side by side of one kind as one part, so that a prompt of several parts is cut as a whole."""
    return [
        (list(chain.from_iterable(ids for ids, _ in run)), response)
        for response, run in groupby(parts, key=lambda part: part[1])
    ]


def _after_first_exchange(parts: list[Part]) -> list[Part]:
    """What follows the first prompt and its response; nothing, if they are the only ones."""
    roles = [is_response for _, is_response in parts]
    first_response = roles.index(True)
    if False not in roles[first_response:]:
        return []
    return parts[roles.index(False, first_response) :]


def _cut_end(parts: list[Part], room: int) -> list[Part]:
    """Keep the first `room` response tokens."""
    kept = []
    for ids, is_response in parts:
        if is_response:
            ids = ids[:room]
            room -= len(ids)
        kept.append((ids, is_response))
    return kept


def _tokens(parts: Iterable[Part], is_response: bool) -> int:
    return sum(len(ids) for ids, response in parts if response is is_response)


def _encoded(row: int, row_index: int, parts: list[Part]) -> Encoded:
    ids = np.fromiter(chain.from_iterable(ids for ids, _ in parts), dtype=np.int32)
    is_response = np.repeat([response for _, response in parts], [len(ids) for ids, _ in parts])
    is_response[0] = False  # differs only where a prompt has no token at all
    return Encoded(row, row_index, ids, is_response)


def _refuse_unknown(share: float, tokenizer: Any) -> None:
    if share > _MOST_UNKNOWN:
        raise DataError(
            f"{share:.0%} of the data's tokens are unknown to the tokenizer {tokenizer.name_or_path!r}: it was made "
            "for other text; choose a model that fits the data"
        )
