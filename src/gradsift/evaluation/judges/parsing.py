"""Scores from a judge's reply.

`strict`    the first line that is not blank is two numbers and nothing else
`tolerant`  also halves, commas, "8/10 7/10", emphasis and labels ("Answer 1: 8, Answer 2: 7") on that line; labels
            may extend over the first two lines
`legacy`    the rule of the published evaluation scripts of Cherry and Superfiltering, with its errors

Scores are between 0 and 10; judges give 0 to empty answers. A reply that the first two rules cannot read has no
scores. No rule looks for numbers further down: "both have 2 flaws and 3 merits" is not a grade.
"""

from __future__ import annotations

import re
from typing import Literal

from gradsift.evaluation.judges import Pair

Parse = Literal["strict", "tolerant", "legacy"]

_LONGEST = 120  # characters of a line of scores; limits the time of a pattern

UNREAD: Pair = (-1.0, -1.0)  # the published scripts' scores of an unreadable reply

_NUMBER = r"([0-9]+(?:\.[0-9]+)?)"
_STRICT = re.compile(rf"\s*{_NUMBER}\s+{_NUMBER}\s*")
_GRADE = rf"{_NUMBER}(?:\s*/\s*10|\s+out\s+of\s+10)?"
_OPEN, _CLOSE = r"[\s*_`(\[]*", r"[\s*_`)\].]*"
_BETWEEN = r"(?:\s*[,;|]\s*|\s+(?:and\s+)?|[\s*_`]+)"
_HEADING = r"(?:(?:scores?|grades?|ratings?)\s*[:=]\s*)?"
_PLAIN = re.compile(rf"{_OPEN}{_HEADING}{_OPEN}{_GRADE}{_BETWEEN}{_GRADE}{_CLOSE}", re.IGNORECASE)
_LABEL = r"(?:the\s+)?(?:answer|assistant|response|model|ai|score|grade|rating)\s*#?([12AB])[\s*_`]*[:=\-][\s*_`]*"
_LABELLED = re.compile(
    rf"{_OPEN}{_HEADING}{_LABEL}{_GRADE}[\s*_`)\].]*[,;|]?(?:\s+and)?[\s*_`(\[]*{_LABEL}{_GRADE}{_CLOSE}", re.IGNORECASE
)


def parse_scores(text: str, how: Parse = "tolerant") -> Pair | None:
    """Return the two scores of a reply in the order shown, or None if the rule does not find them."""
    if how == "legacy":
        return parse_legacy(text)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines or len(lines[0]) > _LONGEST:
        return None
    if how == "strict":
        return _in_range(_STRICT.fullmatch(lines[0]))
    if match := _PLAIN.fullmatch(lines[0]):
        return _in_range(match)
    for shown in (lines[0], "\n".join(lines[:2])[: 2 * _LONGEST]):
        if match := _LABELLED.fullmatch(shown):
            return _labelled(match)
    return None


def parse_legacy(text: str) -> Pair:
    """Apply the published rule: the first line, commas made spaces, split at single spaces, two floats.

    An unreadable reply scores (-1, -1), a tie of its order. So "8, 9", a trailing space and a leading empty line are
    ties, and numbers of any scale are accepted.
    """
    fields = text.split("\n")[0].replace(",", " ").split(" ")
    try:
        return (float(fields[0]), float(fields[1])) if len(fields) == 2 else UNREAD
    except ValueError:
        return UNREAD


def parse_grade(text: str, low: int, high: int, how: Parse = "tolerant") -> float | None:
    """Return the grade from `low` to `high` on the first line that is not blank, or None.

    Unless `strict`, emphasis, a label ("Grade: 4"), "4/5" and "4 out of 5" are accepted.
    """
    line = next((line.strip() for line in text.splitlines() if line.strip()), "")[:_LONGEST]
    tolerant = rf"{_OPEN}{_HEADING}{_OPEN}{_NUMBER}(?:\s*/\s*{high}|\s+out\s+of\s+{high})?{_CLOSE}"
    pattern = rf"\s*{_NUMBER}\s*" if how == "strict" else tolerant
    match = re.fullmatch(pattern, line, re.IGNORECASE)
    grade = float(match[1]) if match else None
    return grade if grade is not None and low <= grade <= high else None


def _in_range(match: re.Match[str] | None) -> Pair | None:
    if match is None:
        return None
    first, second = float(match[1]), float(match[2])
    return (first, second) if max(first, second) <= 10 else None


def _labelled(match: re.Match[str]) -> Pair | None:
    """Return scores by their labels, in either order; two labels of the same answer are not scores."""
    places = [{"1": 0, "A": 0, "2": 1, "B": 1}[match[group].upper()] for group in (1, 3)]
    scores = [float(match[group]) for group in (2, 4)]
    if places[0] == places[1] or max(scores) > 10:
        return None
    return (scores[0], scores[1]) if places == [0, 1] else (scores[1], scores[0])
