"""Corruption of a known share of a dataset, to audit scorers with (see `selection/audit.py`).

There are six kinds of corruption, which docs/methods.md describes. Four change an example's answer in place:
wrong_answer, mismatched_answer, truncated and garbled. Two append copies, which are redundant rather than wrong:
exact_duplicate and near_duplicate. The field `original` of a corrupted example still holds the columns of the source
row.
"""

from __future__ import annotations

import bisect
import random
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from gradsift.config import COPIES, CorruptionConfig
from gradsift.data.examples import Example, make_example
from gradsift.data.verifiable import divided
from gradsift.errors import ConfigError

Texts = tuple[str, str, str]  # instruction, input, output
Change = Callable[[Example, random.Random], Texts | None]  # returns None if it cannot change the example

_TRIES = 20  # maximum number of draws for a text that differs from the original
_NEIGHBOURS = 10  # number of next shorter answers, and of next longer answers, from which another answer is drawn
_EACH_WORDS = 10  # an instruction gets one edit per this many words
VERSION = 1  # raised whenever the same options give another result
# Kinds that apply to fewer examples come first; for example, an answer of one word cannot be truncated.
_ORDER = ("truncated", "garbled", "near_duplicate", "mismatched_answer", "wrong_answer", "exact_duplicate")
# The numbers that count the items of a list (`place`) are kept. Python converts at most 4,300 digits to an integer, so
# a number of more than 1,000 digits is changed in pieces.
_NUMBER = re.compile(r"(?m)^(?P<place>\s*\d+[.):])(?=\s+\S)|(?P<number>\d{1,1000})")
_SENTENCE = re.compile(r"[^.!?\n]+")
_VERB = re.compile(
    r"\b(?:(is|are|was|were|can|could|will|would|should|must|may|might)( not)?(?!['\u2019]t)|(cannot|can['\u2019]t))\b",
    re.IGNORECASE,
)
_VERDICT = re.compile(r"^(\W*)(yes|no|true|false)\b", re.IGNORECASE)
_OPPOSITE = {"yes": "no", "no": "yes", "true": "false", "false": "true"}


@dataclass(frozen=True)
class Corrupted:
    """A corrupted dataset: the N examples, some of them changed, followed by D copies of examples."""

    examples: list[Example]
    kind: list[str | None]  # kind of corruption; None if the example is unchanged
    origin: list[int | None]  # position of the example that a copy repeats


def corrupt(
    examples: Sequence[Example],
    changes: Mapping[str, Change],
    config: CorruptionConfig,
    next_row: int,
    sound: Sequence[int],
) -> Corrupted:
    """Corrupt or copy round(share x N) of the N examples, each at most once.

    The kinds get equal numbers of examples, up to a difference of one.

    Args:
        changes: the function of each kind (see `changes_of_text`).
        next_row: `row_index` of the first copy. The caller gives a number above the `row_index` of every source row.
        sound: positions of the examples that may be corrupted or copied; all other examples stay unchanged.

    Raises:
        ConfigError: round(share x N) is below the number of kinds, or too few examples can be changed.
    """
    share, total = config.share, round(config.share * len(examples))
    if total < len(config.kinds):
        raise ConfigError(
            f"data.corruption.share={share} of {len(examples)} rows is {total}, too few for {len(config.kinds)} kinds; "
            "give more rows, a larger share, or fewer data.corruption.kinds"
        )
    counts = divided(total, config.kinds)
    order = list(sound)
    rng = random.Random(f"corruption {config.seed}")
    rng.shuffle(order)
    occurrences: Counter[str] = Counter()  # next free occurrence number of each content hash
    for example in examples:
        number = int(example.example_id.rpartition("-")[2])
        occurrences[example.content_hash] = max(occurrences[example.content_hash], number + 1)
    result = Corrupted(list(examples), [None for _ in examples], [None for _ in examples])
    for name in sorted(config.kinds, key=_ORDER.index):
        chosen: dict[int, Texts] = {}  # new texts by position
        for position in order:
            if len(chosen) < counts[name] and (texts := changes[name](examples[position], rng)) is not None:
                chosen[position] = texts
        if len(chosen) < counts[name]:
            raise ConfigError(
                f"data.corruption.share={share} asks for {counts[name]} rows of kind {name}, but only {len(chosen)} of "
                f"the {len(examples)} rows can be changed in this way; lower the share or leave {name} out of "
                "data.corruption.kinds"
            )
        order = [position for position in order if position not in chosen]
        for position, texts in chosen.items():
            source = examples[position]
            is_copy = name in COPIES
            row = next_row + len(result.examples) - len(examples) if is_copy else source.row_index
            example = make_example(row, source.history, *texts, source.original, occurrences)
            if is_copy:
                result.examples.append(example)
                result.kind.append(name)
                result.origin.append(position)
            else:
                result.examples[position], result.kind[position] = example, name
    return result


def changes_of_text(examples: Sequence[Example]) -> dict[str, Change]:
    """Return the function of each kind of corruption that changes free text.

    If a kind replaces an answer with another answer, the other answer is drawn from `examples`.
    """
    answers = sorted((example.output for example in examples), key=lambda answer: len(answer.split()))
    lengths = [len(answer.split()) for answer in answers]

    def like(output: str, rng: random.Random) -> str | None:
        middle = bisect.bisect_left(lengths, len(output.split()))
        near = answers[max(0, middle - _NEIGHBOURS) : middle + _NEIGHBOURS]
        others = [answer for answer in near if answer != output]
        return rng.choice(others) if others else foreign(output, rng)

    def foreign(output: str, rng: random.Random) -> str | None:
        for _ in range(_TRIES):
            if (answer := rng.choice(answers)) != output:
                return answer
        others = [answer for answer in answers if answer != output]
        return rng.choice(others) if others else None

    def near_duplicate(example: Example, rng: random.Random) -> Texts | None:
        instruction = edited(example.instruction, rng)
        return None if instruction is None else (instruction, example.input, example.output)

    return {
        "wrong_answer": of_output(lambda output, rng: contradicted(output, rng) or like(output, rng)),
        "mismatched_answer": of_output(foreign),
        "truncated": of_output(truncated),
        "garbled": of_output(garbled),
        "exact_duplicate": lambda example, rng: (example.instruction, example.input, example.output),
        "near_duplicate": near_duplicate,
    }


def stand_ins(examples: Sequence[Example], kind: Sequence[str | None]) -> int:
    """Return the number of wrong_answer rows whose answer was replaced with another example's answer.

    This happens if `contradicted` can change nothing in the answer.

    Args:
        examples: N examples before they were corrupted.
        kind: kind of corruption of each example, None if unchanged. Entries after the first N belong to copies and are
            ignored.
    """
    wrong = [example for example, name in zip(examples, kind, strict=False) if name == "wrong_answer"]
    return sum(contradicted(example.output, random.Random(0)) is None for example in wrong)


def of_output(change: Callable[[str, random.Random], str | None]) -> Change:
    """Return a `Change` that applies `change` to the answer only."""

    def changed(example: Example, rng: random.Random) -> Texts | None:
        output = change(example.output, rng)
        return None if output is None else (example.instruction, example.input, output)

    return changed


def contradicted(answer: str, rng: random.Random) -> str | None:
    """Return the answer with other numbers, the opposite verdict and negated sentences; None if nothing changes.

    A verdict is a `yes`, `no`, `true` or `false` at the start of the answer.

    Only English sentences are negated: the first verb such as `is`, `can` or `will` in a sentence gains or loses a
    `not`.
    """
    text = _NUMBER.sub(lambda match: match[0] if match["place"] else _other_number(match[0], rng), answer)
    text = _VERDICT.sub(lambda match: match[1] + _in_case_of(match[2], _OPPOSITE[match[2].lower()]), text)
    text = _SENTENCE.sub(lambda match: _VERB.sub(_negated, match[0], count=1), text)
    return None if text == answer else text


def _other_number(digits: str, rng: random.Random) -> str:
    """Return the digits of a random number that has as many digits as `digits` but another value."""
    least = 10 ** (len(digits) - 1) if len(digits) > 1 and digits[0] != "0" else 0
    while True:
        number = str(rng.randrange(least, 10 ** len(digits))).zfill(len(digits))
        if number != digits:
            return number


def _in_case_of(model: str, word: str) -> str:
    return word.upper() if model.isupper() else word.capitalize() if model[0].isupper() else word


def _negated(match: re.Match[str]) -> str:
    verb, negation, cannot = match.groups()
    if cannot:
        return _in_case_of(cannot, "can")
    return str(verb) if negation else f"{verb} not"


def truncated(answer: str, rng: random.Random) -> str | None:
    """Return the answer up to the end of a random word that is not the last; None if it has fewer than two words."""
    ends = [match.end() for match in re.finditer(r"\S+", answer)]
    return answer[: rng.choice(ends[:-1])] if len(ends) > 1 else None


def garbled(answer: str, rng: random.Random) -> str | None:
    """Return the answer's words in random order, with shuffled letters; None if every draw equals the answer."""
    words = answer.split()
    for _ in range(_TRIES):
        text = " ".join("".join(rng.sample(word, len(word))) for word in rng.sample(words, len(words)))
        if text != answer:
            return text
    return None


def edited(instruction: str, rng: random.Random) -> str | None:
    """Return the instruction with random edits, one for every ten words and at least one; None if it has no word.

    An edit leaves out a word, repeats a word, or swaps two adjacent words.
    """
    words = re.findall(r"\S+\s*", instruction)
    if not words:
        return None
    for _ in range(max(1, len(words) // _EACH_WORDS)):
        place = rng.randrange(len(words))
        way = rng.choice(("leave out", "say twice", "swap"))
        following = words[place + 1] if place + 1 < len(words) else None
        if way == "leave out" and len(words) > 2:
            del words[place]
        elif way == "swap" and following and following.split() != words[place].split():
            words[place : place + 2] = [_with_word_of(words[place], following), _with_word_of(following, words[place])]
        else:
            words.insert(place, words[place].rstrip() + " ")
    text = "".join(words).strip()
    return text if text != instruction else f"{text} {text.split()[-1]}"


def _with_word_of(piece: str, other: str) -> str:
    """Return the word in `other`, followed by the white space that follows the word in `piece`."""
    return other.rstrip() + piece[len(piece.rstrip()) :]
