"""How an answer is compared with the reference: the cases that our reading is made of."""

from __future__ import annotations

from decimal import Decimal

import pytest

from gradsift.config import MATCHES
from gradsift.errors import DataError
from gradsift.evaluation.matching import MATCHERS, choices_match, final_statement, last_number, numbers_match


def test_the_config_names_the_rules_that_there_are() -> None:
    assert set(MATCHES) == set(MATCHERS)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("18", 18),
        ("The answer is 18.", 18),
        ("She makes $18 a day.", 18),
        ("16 - 3 - 4 = 9", 9),
        ("9 * 2 = $<<9*2=18>>18 every day\n#### 18", 18),
        ("#### 18 eggs, of which 3 are eaten", 18),  # the first behind the mark
        ("70,000 dollars", 70000),
        ("1,234,567.50", Decimal("1234567.5")),
        ("in 2010, 5", 5),
        ("a list: 1,2,3", 3),  # no groups of three
        ("12.0", 12),
        ("50%", 50),
        ("-7", -7),
        ("it is \u22127 degrees", -7),
        ("-$5", -5),
        ("from 3-5", 5),  # a range, no sign
        ("- 5 apples", 5),  # a bullet, no sign
        ("$.50", Decimal("0.5")),
        ("twelve", None),
        ("", None),
        ("####", None),
        ("4 ####", 4),  # nothing behind the mark
    ],
)
def test_the_last_number_of_an_answer(text: str, number: int | Decimal | None) -> None:
    assert last_number(text) == number


def test_numbers_are_compared_as_decimals() -> None:
    assert numbers_match("so $1,080.00 in all.", "1080")
    assert not numbers_match("1081", "1080")
    assert not numbers_match("no idea", "1080")  # no number is wrong, not an error
    with pytest.raises(DataError, match="holds no number"):
        numbers_match("12", "twelve")


@pytest.mark.parametrize(
    ("answer", "statement"),
    [
        ("(A)", "(A)"),
        ("\n  (A) it is\nbecause of B", "(A) it is"),
        ("First, B.\nSo the answer is (A).\nThanks", "(A)."),
        ("The answer is B. No: the answer is **A**", "A"),
        ("Answer:\n\nNo", "No"),
        ("The answer is", ""),
        ("", ""),
    ],
)
def test_the_final_statement(answer: str, statement: str) -> None:
    assert final_statement(answer) == statement


@pytest.mark.parametrize(
    ("answer", "reference", "right"),
    [
        ("(B)", "(B)", True),
        ("B", "(B)", True),
        ("b.", "(B)", True),
        ("B) 12/25/1937", "(B)", True),
        ("Option B: the quail", "(B)", True),
        ("Let's see.\nSo the answer is (B).", "(B)", True),
        ("It is (B) 12/25/1937.", "(B)", True),
        ("Either (A) or (B)", "(B)", False),  # two letters are no answer
        ("(A), not (B)", "(B)", False),
        ("A boat is on the left", "(A)", False),  # the article
        ("12/25/1937", "(B)", False),  # the option's text is not its letter
        ("", "(B)", False),
        ("Yes", "Yes", True),
        ("yes, you do.", "Yes", True),
        ("No", "Yes", False),
        ("You walk north.\nThe answer is no", "No", True),
        ("The argument is invalid.", "invalid", True),
        ("The argument is not valid.", "valid", False),
        ("It depends: yes or no?", "no", True),  # the last word where the first is none
        ("True", "True", True),
        ("not ( True ) is False", "False", True),
        ("Nowhere", "No", False),
        ("syndrome therefrom", "syndrome therefrom", True),
        ("Syndrome, therefrom.", "syndrome therefrom", True),
        ("therefrom syndrome", "syndrome therefrom", False),
        ("] ) >", "] ) >", True),  # brackets are words here
        ("] )", "] ) >", False),
    ],
)
def test_choices(answer: str, reference: str, right: bool) -> None:
    assert choices_match(answer, reference) is right
