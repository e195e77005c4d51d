"""Token ids of segments, and the truncation of examples before and after they are tokenised.

Prompt tokens are cut first, from the left. At least one token is kept before the response: the start token or, if there
is none, the last token of the first prompt. Response tokens are cut only if all responses together do not fit. In this
case a conversation loses whole exchanges (a prompt and its response), the earliest first. If the last response alone
does not fit, its end is cut.

Tokenising 100 MB of text takes 20 GB of memory. Before the text is tokenised, `shorten` therefore removes most of the
text whose tokens `truncate` would cut off.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import chain, groupby
from typing import Any

from gradsift.data.chat_templates import Segment

Part = tuple[list[int], bool]  # token ids, is_response
_WINDOW = 20_000, 64  # `shorten` cuts no text of up to 20,000 characters, or up to 64 per token of `max_length`
_MARGIN = 64  # tokens kept beyond the limit, so that the cut in the text changes no token within the limit


def truncate(parts: Sequence[Part], max_length: int) -> list[Part]:
    """Return the parts, cut to `max_length` tokens (see the module's docstring for what is cut).

    The first part must hold the start token or no token.
    """
    start, *rest = parts
    rest = [  # join adjacent parts of one kind, so that a prompt of several parts is cut as a whole
        (list(chain.from_iterable(ids for ids, _ in run)), is_response)
        for is_response, run in groupby(rest, key=lambda part: part[1])
    ]
    while tokens_in(rest, True) > max_length - 1 and (later := _after_first_exchange(rest)):
        rest = later
    room = max_length - 1  # for response tokens
    fitting: list[Part] = []
    for ids, is_response in rest:
        if is_response:
            ids = ids[:room]
            room -= len(ids)
        fitting.append((ids, is_response))
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
    """Return the parts after the first prompt and its response."""
    kinds = [is_response for _, is_response in parts]
    first_response = kinds.index(True)
    return parts[kinds.index(False, first_response) :] if False in kinds[first_response:] else []


def ids_of_texts(texts: Sequence[str], tokenizer: Any, **options: bool) -> Any:
    return tokenizer(
        list(texts),
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,  # no warning about texts that are too long for the model, because `truncate` cuts them
        **options,
    )


def ids_of_segments(segments: Sequence[Segment], tokenizer: Any) -> list[list[int]]:
    """Return the token ids of each segment, which is tokenised separately.

    Special tokens are recognised only in markup segments.
    """
    ids: list[list[int]] = [[] for _ in segments]
    for is_markup in (False, True):
        places = [place for place, segment in enumerate(segments) if segment.is_markup is is_markup]
        if places:
            texts = [segments[place].text for place in places]
            output = ids_of_texts(texts, tokenizer, split_special_tokens=not is_markup)
            for place, ids_of_text in zip(places, output["input_ids"], strict=True):
                ids[place] = ids_of_text
    return ids


def shorten(segments: list[Segment], tokenizer: Any, max_length: int) -> list[Segment]:
    """Return the segments without most of the text that `truncate` to `max_length` tokens would remove.

    Only the last `max_length` exchanges are kept. Long texts are cut to at least `max_length` + 64 tokens. A prompt
    keeps its end, and the last response keeps its start. An earlier response keeps its end, and the prompt that follows
    it keeps its start too, because one token may hold characters of this response and of this prompt.
    """
    window = max(_WINDOW[0], _WINDOW[1] * max_length)
    if _characters(segments) <= window:
        return segments
    runs = [(is_response, list(run)) for is_response, run in groupby(segments, key=lambda segment: segment.is_response)]
    runs = runs[-2 * max_length :]  # a prompt and a response per exchange
    kept: list[Segment] = []
    for number, (is_response, run) in enumerate(runs):
        from_end = not is_response or number < len(runs) - 1
        with_start = from_end and not is_response and number > 0
        width = window
        while width * (1 + with_start) < _characters(run):
            cut = _cut(run, width, from_end=from_end)
            if sum(map(len, ids_of_segments(cut, tokenizer))) >= max_length + _MARGIN:
                run = [*_cut(run, width, from_end=False), *cut] if with_start else cut
                break
            width *= 4
        kept += run
    return kept


def _characters(segments: Iterable[Segment]) -> int:
    return sum(len(segment.text) for segment in segments)


def _cut(segments: Sequence[Segment], room: int, *, from_end: bool) -> list[Segment]:
    """Return segments with only the first `room` characters of the text, or with only the last if `from_end`."""
    kept = []
    for segment in reversed(segments) if from_end else segments:
        if room > 0:
            kept.append(replace(segment, text=segment.text[-room:] if from_end else segment.text[:room]))
            room -= len(segment.text)
    return kept[::-1] if from_end else kept
