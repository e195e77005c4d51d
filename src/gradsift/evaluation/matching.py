"""Whether an answer is right: how it is compared with the benchmark's reference answer.

exact   the same words in the same order (the embedded world's rule).
number  GSM8K and its like: the answer's last number, or the first one behind its last `####`.
choice  BIG-Bench Hard's targets: an option letter, a closed word (yes, no, true, ...) or free words, looked for
        in the answer's final statement.

The benchmarks say what is right, not how a free answer is read; how is our reading, and the tests show it case by
case. No rule ever looks at the reference to decide which part of the answer counts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from decimal import Decimal

from gradsift.data.verifiable import answers_match

Match = Callable[[str, str], bool]  # (answer, reference answer) -> right

# a sign counts only where nothing is subtracted, commas only between groups of three digits
_NUMBER = re.compile(
    r"(?P<sign>(?<![\w)\].])[-\u2212])?[$\u20ac\u00a3]?"
    r"(?:(?P<whole>[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?P<part>\.[0-9]+)?|(?<![\w.])(?P<below_one>\.[0-9]+))"
)
_MARKER = "####"
_ANSWER_IS = re.compile(r"\banswer\s*(?:is\b|:)\s*:?", re.IGNORECASE)
_CLOSED = ("yes", "no", "true", "false", "valid", "invalid")
_EDGES = " \t\"'.,;:!\u201c\u201d\u2018\u2019"  # around a statement; no brackets, which are answers to some tasks
_LETTER = re.compile(r"\(([A-Z])\)")
_BARE_LETTER = re.compile(r"(?:option\s+)?\(?([A-Z])(?:[).:,]|$)", re.IGNORECASE)


def numbers_match(answer: str, reference: str) -> bool:
    """Whether the answer ends in the reference's number: equal as decimals, so that 12, 12.0 and $12 are one.

    Raises:
        ValueError: the reference has no number (`load_benchmark` refuses such rows).
    """
    wanted = last_number(reference)
    if wanted is None:
        raise ValueError(f"the reference {reference!r} holds no number")
    return last_number(answer) == wanted


def has_number(text: str) -> bool:
    return _NUMBER.search(text) is not None


def last_number(text: str) -> Decimal | None:
    """The first number behind the last `####`, or else the last number; None without any."""
    _, marked, behind = text.rpartition(_MARKER)
    if marked and (found := _NUMBER.search(behind)):
        return _value(found)
    numbers = list(_NUMBER.finditer(text))
    return _value(numbers[-1]) if numbers else None


def _value(found: re.Match[str]) -> Decimal:
    value = Decimal(found["below_one"] or found["whole"].replace(",", "") + (found["part"] or ""))
    return -value if found["sign"] else value


def choices_match(answer: str, reference: str) -> bool:
    """Whether the answer's final statement says what the reference says.

    - The statement: what follows the last "answer is" or "answer:" on its line (or the next line that is not blank);
      the first line that is not blank where the answer has no such words. Bold and code marks are dropped.
    - A reference like (B): the statement begins with that letter, alone, in brackets or before one of `).:,`; or
      else names one bracketed letter and no other.
    - yes, no, true, false, valid, invalid: the statement's first word, or else its last one, unless "not" precedes.
    - Anything else: the same words in the same order; case, commas and the marks around it do not count.
    """
    statement, wanted = final_statement(answer), reference.strip()
    if letter := _LETTER.fullmatch(wanted):
        return _letter(statement) == letter[1]
    if wanted.casefold() in _CLOSED:
        return _closed_word(statement) == wanted.casefold()
    return _words(statement) == _words(wanted)


def final_statement(answer: str) -> str:
    """The part of an answer that counts as its last word on the matter; empty for an empty answer."""
    text = answer.replace("**", "").replace("`", "")
    stated = list(_ANSWER_IS.finditer(text))
    lines = (text[stated[-1].end() :] if stated else text).splitlines()
    return next((line.strip() for line in lines if line.strip()), "")


def _letter(statement: str) -> str | None:
    if first := _BARE_LETTER.match(statement.lstrip(_EDGES)):
        return first[1].upper()
    named = set(_LETTER.findall(statement))
    return named.pop() if len(named) == 1 else None


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
