"""Read scores from a judge's reply, by one of five rules (`judge.parse`).

`strict`    accepts only two numbers, as in "8 7.5", and nothing else on the first line that is not blank
`tolerant`  also accepts, on that line, commas, "8/10 7/10", emphasis, headings ("My scores: 8 7") and labels
            ("Answer 1: 8, Answer 2: 7", also on two lines). Code fences are ignored. If the line has no scores, they
            are read from another line, a JSON object ({"answer_1": 8, "answer_2": 7}) or a verdict ([[A]])
`verdict`   accepts only a verdict, anywhere in the reply: [[A]], [[B]] or [[C]] (a tie), or a comparison such as
            [[A>>B]], [[A>B]] or [[A=B]]
`json`      accepts only a JSON object, anywhere in the reply
`legacy`    reads replies as the published evaluation scripts of Cherry and Superfiltering do, including their errors

Scores are between 0 and 10 (with `legacy`, any numbers); 0 is allowed because judges give it to empty answers. A
verdict gives the better answer the score 1 (3 for >>) and the other answer 0; a tie gives both 0. A reply has no scores
if the rule finds none in the reply, or finds two pairs of scores that differ. No rule looks for numbers within a
sentence: "both have 2 flaws and 3 merits" has no scores.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any, Literal

from gradsift import outside_json
from gradsift.evaluation.judges import Pair, Unreadable

Parse = Literal["strict", "tolerant", "legacy", "verdict", "json"]

_LONGEST = 120  # most characters of a line of scores; limits the time that a pattern takes
_MOST_BRACES = 100  # JSON objects are looked for at this many opening braces at most

_NUMBER = r"([0-9]+(?:\.[0-9]+)?)"
_STRICT = re.compile(rf"\s*{_NUMBER}\s+{_NUMBER}\s*")
_GRADE = rf"{_NUMBER}(?:\s*/\s*10|\s+out\s+of\s+10)?"
_OPEN, _CLOSE = r"[\s*_`(]*", r"[\s*_`).]*"
_BETWEEN = r"(?:\s*[,;|]\s*|\s+(?:and\s+)?|[\s*_`]+)"
_INTRODUCTION = r"(?:(?:here|these|are|is|my|the|two|both|final|overall|so)\s+)*"  # as in "Here are my"
_HEADING = rf"(?:{_INTRODUCTION}(?:scores?|grades?|ratings?)(?:\s+(?:are|is))?[\s*_`]*[:=]\s*)?"
_PLAIN = re.compile(rf"{_OPEN}{_HEADING}{_OPEN}{_GRADE}{_BETWEEN}{_GRADE}{_CLOSE}", re.IGNORECASE)
_NAME = r"(?:the\s+)?(?:answer|assistant|response|model|ai|score|grade|rating)"
_LABEL = rf"{_NAME}\s*#?([12AB])[\s*_`]*[:=\-][\s*_`]*"
_LABELLED = re.compile(
    rf"{_OPEN}{_HEADING}{_LABEL}{_GRADE}[\s*_`).]*[,;|]?(?:\s+and)?[\s*_`(]*{_LABEL}{_GRADE}{_CLOSE}", re.IGNORECASE
)
_KEY = re.compile(rf"(?:{_NAME}[\s_#-]*)?([12AB])(?:[\s_-]*(?:score|grade|rating))?", re.IGNORECASE)
_PLACES = {"1": 0, "A": 0, "2": 1, "B": 1}  # of the answers in a pair, by their labels
_SCORES_KEY = re.compile(r"(?:scores?|grades?|ratings?)", re.IGNORECASE)
_FENCE = re.compile(r"^[^\S\n]*```[\w-]*[^\S\n]*$", re.MULTILINE)
_UNFINISHED = re.compile(r"([1-9.]|(?<!1)0)\Z")  # a number with this end may lack digits; a 10 is complete
# the scores that a verdict stands for; a strong verdict (>>) counts as three, as in Arena-Hard
_VERDICTS: Mapping[str, Pair] = {
    "A": (1, 0), "A>B": (1, 0), "A>>B": (3, 0),
    "B": (0, 1), "B>A": (0, 1), "A<B": (0, 1), "B>>A": (0, 3), "A<<B": (0, 3),
    "C": (0, 0), "A=B": (0, 0), "B=A": (0, 0),
}  # fmt: skip
_VERDICT = re.compile(rf"\[\[\s*({'|'.join(_VERDICTS)})\s*\]\]")
_THINKING = re.compile(r"\s*<(think|thinking|thought|reasoning)>(.*?)(</\1>|\Z)", re.DOTALL | re.IGNORECASE)
# if the prompt's template already holds the opening tag, the reply begins inside the thinking
_REST_OF_THINKING = re.compile(r".*?^[^\S\n]*</(think|thinking|thought|reasoning)>[^\S\n]*$", re.DOTALL | re.MULTILINE)


def after_thinking(text: str) -> str:
    """Return a reply without the model's thinking at its beginning.

    The thinking is a block such as `<think>...</think>`, or all text up to a line that is only the closing tag.

    Raises:
        Unreadable: the block does not end, because the reply was cut while thinking.
    """
    match = _THINKING.match(text)
    if match is None:
        match = _REST_OF_THINKING.match(text)
    elif not match[3]:
        raise Unreadable("the reply ends while thinking, before any score")
    return text[match.end() :] if match else text


def parse_scores(text: str, how: Parse = "tolerant", *, cut: bool = False) -> Pair | None:
    """Return the scores that a reply gives to the answer shown first and to the answer shown second.

    The result is None if the rule `how` finds no scores.

    Args:
        cut: whether the reply was cut at its limit of tokens. If so, only scores at the beginning of the reply count,
            because later scores may be a draft: some servers send a model's thinking without a tag. A number at the
            very end of a cut reply does not count, because digits may be missing: 8 may be the beginning of 8.5, and 1
            the beginning of 10.

    Raises:
        Unreadable: the reply holds scores that are ambiguous or not from 0 to 10; the message says why.
    """
    if how == "legacy":
        return _parse_legacy(text)
    shown = text if how == "strict" else _FENCE.sub("", text)
    lines = [line.strip() for line in shown.splitlines() if line.strip()]
    if not lines:
        return None
    body = "\n".join(lines)
    if cut and _UNFINISHED.search(text):
        lines[-1] = ""
    if how == "strict":
        return _in_range(_STRICT.fullmatch(lines[0])) if len(lines[0]) <= _LONGEST else None
    if how == "tolerant" and (first := _scores_at(lines, 0)) is not None:
        return first
    if cut and (how == "json" or not _VERDICT.match(body)):
        body, lines = _object_at_beginning(body), []
    readings: list[Pair | None] = []
    if how == "tolerant":
        readings += [_scores_at(lines, number) for number in range(1, len(lines))]
    if how != "verdict":
        readings += map(_from_object, json_objects(body))
    if how != "json":
        readings += (_VERDICTS[verdict] for verdict in _VERDICT.findall(body))
    distinct = {reading for reading in readings if reading is not None}
    if len(distinct) > 1:
        raise Unreadable("the reply holds two different verdicts")
    if not distinct and re.match(r"\[[^\[]", body):
        raise Unreadable("the scores are a list, which does not say whose they are")
    return distinct.pop() if distinct else None


def _scores_at(lines: list[str], number: int) -> Pair | None:
    """Return the scores on line `number`, or labelled scores on this and the next line; None if there are none."""
    if len(lines[number]) > _LONGEST:
        return None
    if match := _PLAIN.fullmatch(lines[number]):
        return _in_range(match)
    for shown in (lines[number], "\n".join(lines[number : number + 2])[: 2 * _LONGEST]):
        if match := _LABELLED.fullmatch(shown):
            return _labelled(match)
    return None


def json_objects(text: str) -> Iterator[dict[str, Any]]:
    """Yield the JSON objects in a text.

    Raises:
        Unreadable: an object has a key twice.
    """
    end = 0
    for _ in range(_MOST_BRACES):
        start = text.find("{", end)
        if start < 0:
            return
        content, length = _object_at(text[start:])
        if content is not None:
            yield content
        end = start + length


def _object_at(text: str) -> tuple[dict[str, Any] | None, int]:
    """Return the JSON object at the beginning of a text, and its length; (None, 1) if no complete object is there."""
    try:
        return outside_json.loads_first(text)
    except json.JSONDecodeError:
        return None, 1
    except outside_json.RepeatedKeyError as error:
        raise Unreadable(f"the JSON of the reply cannot be trusted: {error}") from None


def _object_at_beginning(text: str) -> str:
    """Return the part of a text that is the JSON object at its beginning; empty if no complete object is there."""
    content, length = _object_at(text) if text.startswith("{") else (None, 0)
    return text[:length] if content is not None else ""


def _from_object(content: Mapping[str, Any]) -> Pair | None:
    nested = [value for key, value in content.items() if _SCORES_KEY.fullmatch(key)]
    if len(nested) == 1 and isinstance(nested[0], list):
        raise Unreadable("the scores in the reply's JSON are a list, which does not say whose they are")
    if len(nested) == 1 and isinstance(nested[0], dict):
        content = nested[0]
    scores: tuple[list[Any], list[Any]] = [], []
    for key, value in content.items():
        if match := _KEY.fullmatch(key.strip()):
            scores[_PLACES[match[1].upper()]].append(value)
    if not any(scores):
        return None
    if [len(values) for values in scores] != [1, 1]:
        raise Unreadable("the JSON of the reply does not hold one score for each answer")
    return _number(scores[0][0]), _number(scores[1][0])


def _number(value: Any) -> float:
    if isinstance(value, str) and (match := re.fullmatch(_GRADE, value.strip())):
        value = float(match[1])
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 10:  # NaN is not in the range
        raise Unreadable(f"a score in the reply's JSON is {json.dumps(value)[:40]} and no number from 0 to 10")
    return float(value)


def _parse_legacy(text: str) -> Pair | None:
    """Apply the published rule: in the first line, replace commas by spaces, split at single spaces, read two floats.

    Numbers of any scale are accepted. A first line that is empty, ends with a space, or has a comma and a space between
    the numbers ("8, 9") is not accepted. For a reply that this rule cannot read, the published scripts record the
    scores (-1, -1), which is a tie; this function returns None.
    """
    fields = text.split("\n")[0].replace(",", " ").split(" ")
    with suppress(ValueError):
        first, second = map(float, fields)
        if math.isfinite(first) and math.isfinite(second):
            return first, second
    return None


def parse_grade(text: str, low: int, high: int, how: Parse = "tolerant", *, cut: bool = False) -> float | None:
    """Return the grade in a reply; None if the rule `how` finds no grade from `low` to `high`.

    `strict` reads only the first line that is not blank, which must be a number. The other rules also accept emphasis,
    a label ("Grade: 4"), "4/5" and "4 out of 5". If the first line has no grade, these rules read a grade from another
    line or from a JSON object ({"grade": 4}). If `cut`, the reply was cut at its limit of tokens, and only a grade on
    its first line or in a JSON object at its beginning counts.

    Raises:
        Unreadable: the reply holds two different grades, a JSON object has a key twice, or a grade in JSON is not a
            number from 0 to 10.
    """
    if how != "strict":
        text = _FENCE.sub("", text)
    lines = [line.strip()[:_LONGEST] for line in text.splitlines() if line.strip()]
    if cut:
        text, lines = _object_at_beginning(text.lstrip()), lines[:1]
    tolerant = rf"{_OPEN}{_HEADING}{_OPEN}{_NUMBER}(?:\s*/\s*{high}|\s+out\s+of\s+{high})?{_CLOSE}"
    pattern = re.compile(rf"\s*{_NUMBER}\s*" if how == "strict" else tolerant, re.IGNORECASE)
    matches = [pattern.fullmatch(line) for line in (lines[:1] if how == "strict" else lines)]
    grades = [float(match[1]) for match in matches if match]
    if how != "strict" and not (matches and matches[0]):
        values = [value for each in json_objects(text) for key, value in each.items() if _SCORES_KEY.fullmatch(key)]
        grades += map(_number, values)
        if len(set(grades)) > 1:
            raise Unreadable("the reply holds two different grades")
    return grades[0] if grades and low <= grades[0] <= high else None


def _in_range(match: re.Match[str] | None) -> Pair | None:
    if match is None:
        return None
    first, second = float(match[1]), float(match[2])
    return (first, second) if max(first, second) <= 10 else None


def _labelled(match: re.Match[str]) -> Pair | None:
    """Return the scores in the order of the answers; None if both labels name the same answer or a score exceeds 10."""
    places = [_PLACES[match[group].upper()] for group in (1, 3)]
    scores = [float(match[group]) for group in (2, 4)]
    if places[0] == places[1] or max(scores) > 10:
        return None
    return (scores[0], scores[1]) if places == [0, 1] else (scores[1], scores[0])
