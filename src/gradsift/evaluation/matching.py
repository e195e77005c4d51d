"""Rules that decide whether an answer is right, given the benchmark's reference answer.

exact   the same words in the same order (the rule of the embedded world)
number  for GSM8K and similar sets: the same number. The number of a text is the first number after its last `####`,
        or else the last number of the text
choice  for BIG-Bench Hard: the same option letter, fixed word (yes, no, true, ...) or free text in the final statement

The benchmarks define which answers are right, but not how to extract an answer from free text. gradsift extracts the
answer by rules of its own, which tests/test_matching.py shows case by case. Which part of the answer counts may depend
on the kind of the reference (letter, fixed word or free text), but not on which letter, word or text is right.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from decimal import Decimal

from gradsift.data.verifiable import answers_match
from gradsift.errors import DataError

Match = Callable[[str, str], bool]  # (answer, reference answer) -> right
# a minus sign counts unless it may be a subtraction or a range (3-5); commas count only between groups of three digits
_NUMBER = re.compile(
    r"(?P<sign>(?<![\w)\].])[-\u2212])?[$\u20ac\u00a3]?"
    r"(?:(?P<whole>[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?P<part>\.[0-9]+)?|(?<![\w.])(?P<below_one>\.[0-9]+))"
)
_ANSWER_IS = re.compile(r"\banswer\s*(?:is\b|:)\s*:?", re.IGNORECASE)
_CLOSED = ("yes", "no", "true", "false", "valid", "invalid")
_EDGES = " \t\"'.,;:!?\u201c\u201d\u2018\u2019"  # removed around a statement; no brackets, which may be the answer
_LETTER = re.compile(r"\(([A-Z])\)")
_BARE_LETTER = re.compile(r"(?:option\s+)?\(?([A-Z])(?:[).:,]|$)", re.IGNORECASE)


def numbers_match(answer: str, reference: str) -> bool:
    """Return whether answer and reference have equal numbers (see `last_number`): 12, 12.0 and $12 are equal."""
    wanted = last_number(reference)
    if wanted is None:
        raise DataError(f"the reference {reference!r} holds no number; correct it, or take another rule for its set")
    return last_number(answer) == wanted


def last_number(text: str) -> Decimal | None:
    """Return the first number after the last `####`, or else the last number of the text; None if it has no number."""
    _, marker, after = text.rpartition("####")
    number = _NUMBER.search(after) if marker else None
    if number is None:
        numbers = list(_NUMBER.finditer(text))
        if not numbers:
            return None
        number = numbers[-1]
    value = Decimal(number["below_one"] or number["whole"].replace(",", "") + (number["part"] or ""))
    return -value if number["sign"] else value


def choices_match(answer: str, reference: str) -> bool:
    """Return whether the answer's final statement agrees with the reference.

    - The statement is the rest of the line after the last "answer is" or "answer:". If the rest of the line is blank,
      the statement is the next line that is not blank. If the answer has neither phrase, the statement is its first
      line that is not blank. Markdown's marks for bold text and code are removed.
    - For a reference like (B), the letter at the statement's beginning counts, if it is alone, in brackets or before
      one of `).:,`. Otherwise a letter in brackets counts, if the statement has only one such letter.
    - For yes, no, true, false, valid and invalid, the statement's first word counts. If the first word is none of these
      six, the last word counts, unless "not" precedes it.
    - For any other reference, the statement must have the same words in the same order. Case, commas and surrounding
      punctuation are ignored.
    """
    statement, wanted = final_statement(answer), reference.strip()
    if letter := _LETTER.fullmatch(wanted):
        return _letter(statement) == letter[1]
    if wanted.casefold() in _CLOSED:
        return _closed_word(statement) == wanted.casefold()
    return _words(statement) == _words(wanted)


def final_statement(answer: str) -> str:
    """Return the final statement of an answer, as `choices_match` defines it; empty for an empty answer."""
    text = answer.replace("**", "").replace("`", "")
    stated = list(_ANSWER_IS.finditer(text))
    lines = (text[stated[-1].end() :] if stated else text).splitlines()
    return next((line.strip() for line in lines if line.strip()), "")


def _letter(statement: str) -> str | None:
    if first := _BARE_LETTER.match(statement.lstrip(_EDGES)):
        return first[1].upper()
    letters = set(_LETTER.findall(statement))
    return letters.pop() if len(letters) == 1 else None


def _closed_word(statement: str) -> str | None:
    words = [word.strip(_EDGES + "()") for word in statement.casefold().split()]
    if words and words[0] in _CLOSED:
        return words[0]
    if len(words) > 1 and words[-1] in _CLOSED and words[-2] != "not":
        return words[-1]
    return None


def _words(text: str) -> list[str]:
    return text.casefold().replace(",", " ").strip(_EDGES).split()


MATCHERS: Mapping[str, Match] = {"exact": answers_match, "number": numbers_match, "choice": choices_match}
