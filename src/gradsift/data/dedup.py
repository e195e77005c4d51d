"""Repeated examples: equal texts, and texts that share most of their words.

The first row stays. A near duplicate is compared with the rows that stay, and with nothing that was
dropped: of a chain in which each row resembles the next one, more than the first row may stay.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from gradsift.data.examples import Example, Rejected

VERSION = 1  # of the near duplicates: raised whenever other rows are found
_SHINGLE = 3  # words
_HASHES = 128  # of a MinHash signature
_MISS = 1e-3  # largest chance to overlook a pair that is exactly as similar as the threshold
# a character of a script without spaces, a run of other word characters, or a sign: 3 + 4 and 3 - 4 differ
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W\u3040-\u30ff\u3400-\u9fff]+|[^\w\s]")

Shingles = frozenset[tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class Duplicate:
    """An example that repeats another one; both as positions in the list."""

    position: int
    of: int
    similarity: float | None  # Jaccard similarity of their shingles; None where the texts are equal


def deduplicated(
    examples: Sequence[Example], dedup: str, threshold: float, progress: Callable[[int], None] = lambda done: None
) -> tuple[list[Example], list[Rejected]]:
    """The examples without repetitions, and the rows that were dropped, with the row that each of them repeats.

    Args:
        dedup: exact (history, instruction, input and output are equal) or near (most of their words; includes exact).
        threshold: Jaccard similarity of near duplicates.
        progress: called with the number of examples that were just compared.
    """
    found = exact_duplicates(examples)
    if dedup == "near":
        repeated = {duplicate.position for duplicate in found}
        others = [position for position in range(len(examples)) if position not in repeated]
        found += near_duplicates(examples, others, threshold, progress)
    dropped = {duplicate.position: duplicate for duplicate in found}
    kept = [example for position, example in enumerate(examples) if position not in dropped]
    rows = [example.row_index for example in examples]
    rejected = [
        Rejected(
            rows[position], _reason(rows[dropped[position].of], dropped[position]), None, examples[position].original
        )
        for position in sorted(dropped)
    ]
    return kept, rejected


def _reason(row: int, duplicate: Duplicate) -> str:
    if duplicate.similarity is None:
        return f"duplicate of row {row}"
    return f"near duplicate of row {row} (Jaccard {duplicate.similarity:.2f})"


def exact_duplicates(examples: Sequence[Example]) -> list[Duplicate]:
    """Examples whose content hash an earlier one has."""
    first: dict[str, int] = {}
    found = []
    for position, example in enumerate(examples):
        if (of := first.setdefault(example.content_hash, position)) != position:
            found.append(Duplicate(position, of, None))
    return found


def near_duplicates(
    examples: Sequence[Example],
    positions: Sequence[int],
    threshold: float,
    progress: Callable[[int], None] = lambda done: None,
) -> list[Duplicate]:
    """Which of `positions` (ascending) are at least as similar as `threshold` to one that stays before them.

    Candidates come from locality-sensitive hashing of MinHash signatures (Leskovec et al., Mining of Massive Datasets,
    chapter 3) and are then compared exactly, so nothing is dropped that is not similar. A pair at the threshold is
    overlooked with a chance of at most 1 in 1,000, a more similar one more rarely.
    """
    from datasketch import MinHash, MinHashLSH

    bands = bands_of(threshold)
    index: Any = MinHashLSH(num_perm=_HASHES, params=bands)
    found = []
    for position in positions:
        own = shingles(examples[position])
        signature = MinHash(num_perm=_HASHES, seed=1)
        signature.update_batch(["\0".join(words).encode("utf-8") for words in own])
        candidates = [(jaccard(own, shingles(examples[other])), -other) for other in index.query(signature)]
        similarity, other = max(candidates, default=(0.0, 0))
        if similarity >= threshold:
            found.append(Duplicate(position, -other, similarity))
        else:
            index.insert(position, signature, check_duplication=False)
        progress(1)
    return found


def bands_of(threshold: float) -> tuple[int, int]:
    """Bands and hashes a band: the longest bands that overlook a pair at the threshold as rarely as they should.

    A pair of similarity s agrees in a whole band of r hashes with probability s^r, and in none of b
    bands with (1 - s^r)^b.
    """
    lengths = range(1, _HASHES // 2 + 1)
    rows = max(r for r in lengths if (1 - threshold**r) ** (_HASHES // r) <= _MISS)
    return _HASHES // rows, rows


def shingles(example: Example) -> Shingles:
    """Of history, instruction, input and output."""
    return shingles_of([*prompt_texts(example), example.output])


def prompt_texts(example: Example) -> list[str]:
    """History, instruction and input."""
    return [*(turn.content for turn in example.history), example.instruction, example.input]


def shingles_of(texts: Sequence[str]) -> Shingles:
    """Every three words in a row; all words where they are fewer."""
    words = _WORD.findall("\n".join(texts))
    if len(words) < _SHINGLE:
        return frozenset([tuple(words)])
    return frozenset(zip(*(words[offset:] for offset in range(_SHINGLE)), strict=False))


def jaccard(first: Shingles, second: Shingles) -> float:
    """Shared shingles over all shingles of both."""
    shared = len(first & second)
    return shared / (len(first) + len(second) - shared)
