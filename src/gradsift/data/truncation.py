"""Truncation to a number of tokens: of an encoded example, and of long texts before they are tokenised.

Prompt tokens go first, from the left; at least one token of context stays, and it is the start token if there is one.
Response tokens go only if they do not fit by themselves: a conversation then loses its earliest exchanges as a whole,
a single response loses its end.

Tokenising 100 MB of text takes 20 GB of memory, so `shorten` drops most of what would be cut off anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import chain, groupby

from gradsift.data.chat_templates import Segment

Part = tuple[list[int], bool]  # token ids, is_response
_WINDOW = 20_000, 64  # characters, and characters per token of the limit: shorter texts are not cut
_MARGIN = 64  # tokens kept beyond the limit, so that the cut in a text does not change the tokens within it


def truncate(parts: Sequence[Part], max_length: int) -> list[Part]:
    """Return the parts cut to `max_length` tokens.

    Args:
        parts: the first one holds the start token, or nothing.
    """
    start, *rest = parts
    rest = [  # adjacent parts of one kind are joined, so that a prompt of several parts is cut as one
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
    must_stay = 0 if start[0] else 1  # the first context token, which the next one is predicted from
    kept = [start]
    for ids, is_response in fitting:
        if not is_response and excess > 0 and ids:
            dropped = min(excess, len(ids) - must_stay)
            excess -= dropped
            ids, must_stay = ids[dropped:], 0
        kept.append((ids, is_response))
    return kept


def tokens_in(parts: Iterable[Part], is_response: bool) -> int:
    """Return the number of tokens in parts of one kind."""
    return sum(len(ids) for ids, response in parts if response is is_response)


def _after_first_exchange(parts: list[Part]) -> list[Part]:
    """Return what follows the first prompt and its response; empty if nothing does."""
    kinds = [is_response for _, is_response in parts]
    first_response = kinds.index(True)
    return parts[kinds.index(False, first_response) :] if False in kinds[first_response:] else []


def shorten(
    segments: list[Segment],
    count_tokens: Callable[[list[Segment]], int],
    max_length: int,
    *,
    keep_ends: bool = False,
) -> list[Segment]:
    """Return the segments without most of what truncation to `max_length` tokens removes.

    Truncation cuts prompts on the left, responses on the right, and the earliest exchanges, of which at most
    `max_length` can stay. So a prompt keeps its end and the last response its start, each with slightly more than
    `max_length` tokens. An earlier response that is cut here is removed as a whole by truncation; it keeps its end
    because a token may reach from there into the next prompt, which therefore keeps its start too.

    Args:
        count_tokens: returns the number of tokens of segments.
        keep_ends: keep the end of the last response, because it is context.
    """
    window = max(_WINDOW[0], _WINDOW[1] * max_length)
    if sum(len(segment.text) for segment in segments) <= window:
        return segments
    runs = [(is_response, list(run)) for is_response, run in groupby(segments, key=lambda segment: segment.is_response)]
    runs = runs[-2 * max_length :]  # a prompt and a response per exchange
    kept: list[Segment] = []
    for number, (is_response, run) in enumerate(runs):
        from_end = keep_ends or not is_response or number < len(runs) - 1
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
