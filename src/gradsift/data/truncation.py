"""Truncation of encoded examples to a number of tokens, and of long texts before they are tokenised.

Prompt tokens are cut first, from the left. At least one token is kept before the response: the start token or, if
there is none, the last token of the first prompt.
Response tokens are cut only if they do not fit even without the prompt. Then a conversation loses whole exchanges, the
earliest first. If a single response is left that does not fit, its end is cut.

Tokenising 100 MB of text takes 20 GB of memory. So `shorten` drops most of the text that `truncate` would cut off.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import chain, groupby

from gradsift.data.chat_templates import Segment

Part = tuple[list[int], bool]  # token ids, is_response
_WINDOW = 20_000, 64  # `shorten` cuts no text of up to this many characters, or this many per token of `max_length`
_MARGIN = 64  # tokens kept beyond the limit, so that the cut in the text changes no token within the limit


def truncate(parts: Sequence[Part], max_length: int) -> list[Part]:
    """Return the parts cut to `max_length` tokens.

    Args:
        parts: the parts of an example; the first part holds the start token, or nothing.
    """
    start, *rest = parts
    rest = [  # adjacent parts of one kind are joined, so that a prompt of several parts is cut as a whole
        (list(chain.from_iterable(ids for ids, _ in run)), is_response)
        for is_response, run in groupby(rest, key=lambda part: part[1])
    ]
    while tokens_in(rest, True) > max_length - 1 and (later := _after_first_exchange(rest)):
        rest = later
    room = max_length - 1  # for response tokens
    fitting: list[Part] = []
    for ids, is_response in rest:
        fitting.append((ids[:room] if is_response else ids, is_response))
        room -= len(ids) if is_response else 0
        room = max(room, 0)
    excess = len(start[0]) + sum(len(ids) for ids, _ in fitting) - max_length
    must_stay = 0 if start[0] else 1  # the first token, from which the next token is predicted
    kept = [start]
    for ids, is_response in fitting:
        if not is_response and excess > 0 and ids:
            dropped = min(excess, len(ids) - must_stay)
            excess -= dropped
            ids, must_stay = ids[dropped:], 0
        kept.append((ids, is_response))
    return kept


def tokens_in(parts: Iterable[Part], is_response: bool) -> int:
    """Return the number of tokens in the response parts, or in the prompt parts if `is_response` is False."""
    return sum(len(ids) for ids, response in parts if response is is_response)


def _after_first_exchange(parts: list[Part]) -> list[Part]:
    """Return the parts after the first prompt and its response; an empty list if there are none."""
    kinds = [is_response for _, is_response in parts]
    first_response = kinds.index(True)
    return parts[kinds.index(False, first_response) :] if False in kinds[first_response:] else []


def shorten(segments: list[Segment], count_tokens: Callable[[list[Segment]], int], max_length: int) -> list[Segment]:
    """Return the segments without most of the text that `truncate` to `max_length` tokens would remove.

    `truncate` cuts prompts on the left and responses on the right, and removes the earliest exchanges. At most
    `max_length` exchanges can stay. So a long prompt keeps only its end, and a long last response only its start, each
    with at least `max_length` + 64 tokens. `truncate` removes every earlier response that is cut here. Such a response
    keeps its end, and the next prompt also keeps its start, because one token may hold characters of both.

    Args:
        count_tokens: function that returns the number of tokens in segments.
    """
    window = max(_WINDOW[0], _WINDOW[1] * max_length)
    if sum(len(segment.text) for segment in segments) <= window:
        return segments
    runs = [(is_response, list(run)) for is_response, run in groupby(segments, key=lambda segment: segment.is_response)]
    runs = runs[-2 * max_length :]  # a prompt and a response per exchange
    kept: list[Segment] = []
    for number, (is_response, run) in enumerate(runs):
        from_end = not is_response or number < len(runs) - 1
        with_start = from_end and not is_response and number > 0
        width = window
        while width * (1 + with_start) < sum(len(segment.text) for segment in run):
            cut = _last_characters(run, width) if from_end else _first_characters(run, width)
            if count_tokens(cut) >= max_length + _MARGIN:
                run = [*_first_characters(run, width), *cut] if with_start else cut
                break
            width *= 4
        kept += run
    return kept


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
