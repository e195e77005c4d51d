"""Finds repeated examples: exact duplicates have equal texts, near duplicates share most of their word triples.

The first row of repeated examples is kept. A row is compared with kept rows only. So if row 2 is similar to rows 1 and
3, but these two are not similar to each other, both rows 1 and 3 are kept.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from gradsift.data.examples import Example, Rejected

VERSION = 1  # raised whenever other near duplicates are dropped for the same data and options
_SHINGLE = 3  # words of a shingle
_HASHES = 128  # hash values of a MinHash signature
_MISS = 1e-3  # largest probability of missing a pair whose similarity is the threshold
# a Japanese or Chinese character, a run of other word characters, or a sign, so that 3 + 4 and 3 - 4 differ
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W\u3040-\u30ff\u3400-\u9fff]+|[^\w\s]")

Shingles = frozenset[tuple[str, ...]]


def deduplicated(
    examples: Sequence[Example], dedup: str, threshold: float, progress: Callable[[int], None] = lambda done: None
) -> tuple[list[Example], list[Rejected]]:
    """Return the examples without repetitions, and the dropped rows; their `reason` names the row that they repeat.

    Args:
        dedup: exact (drops rows with equal history, instruction, input and output) or near (also drops rows with
            similar sets of word triples).
        threshold: smallest Jaccard similarity of the word triples of near duplicates.
        progress: called only for `near`, with the number of examples that were just compared.
    """
    first: dict[str, int] = {}  # by content hash
    reasons: dict[int, str] = {}  # by position
    for position, example in enumerate(examples):
        if (original := first.setdefault(example.content_hash, position)) != position:
            reasons[position] = f"duplicate of row {examples[original].row_index}"
    if dedup == "near":
        near = near_duplicates(examples, first.values(), threshold, progress)
        for position, (original, similarity) in near.items():
            reasons[position] = f"near duplicate of row {examples[original].row_index} (Jaccard {similarity:.2f})"
    kept, dropped = [], []
    for position, example in enumerate(examples):
        if position in reasons:
            dropped.append(Rejected(example.row_index, reasons[position], None, example.original))
        else:
            kept.append(example)
    return kept, dropped


def near_duplicates(
    examples: Sequence[Example],
    positions: Iterable[int],
    threshold: float,
    progress: Callable[[int], None] = lambda done: None,
) -> dict[int, tuple[int, float]]:
    """Find the examples at `positions` (ascending) that are similar to an earlier, kept example.

    Locality-sensitive hashing of MinHash signatures finds candidates (Leskovec et al., Mining of Massive Datasets,
    chapter 3). They are then compared exactly, so the similarity of every returned pair is at least `threshold`. A pair
    whose similarity equals the threshold is missed with a probability of at most 1 in 1,000. More similar pairs are
    missed less often.

    Returns:
        For the position of each near duplicate, the position of the kept example and the pair's Jaccard similarity.
    """
    from datasketch import MinHash, MinHashLSH

    index: Any = MinHashLSH(num_perm=_HASHES, params=bands_of(threshold))
    duplicates: dict[int, tuple[int, float]] = {}
    for position in positions:
        own = shingles(examples[position])
        signature = MinHash(num_perm=_HASHES, seed=1)
        signature.update_batch(["\0".join(words).encode("utf-8") for words in own])
        candidates = [(jaccard(own, shingles(examples[other])), -other) for other in index.query(signature)]
        similarity, other = max(candidates, default=(0.0, 0))
        if similarity >= threshold:
            duplicates[position] = -other, similarity
        else:
            index.insert(position, signature, check_duplication=False)
        progress(1)
    return duplicates


def bands_of(threshold: float) -> tuple[int, int]:
    """Return the number b of bands of a MinHash signature, and the number r of hashes per band.

    A pair of similarity s agrees in all hashes of a band with probability s^r, and is missed, because it agrees in none
    of the bands, with probability (1 - s^r)^b. r is the largest number for which a pair whose similarity equals the
    threshold is missed with a probability of at most `_MISS`.
    """
    lengths = range(1, _HASHES // 2 + 1)
    rows = max(r for r in lengths if (1 - threshold**r) ** (_HASHES // r) <= _MISS)
    return _HASHES // rows, rows


def shingles(example: Example) -> Shingles:
    """Return the shingles of history, instruction, input and output."""
    return shingles_of([*prompt_texts(example), example.output])


def prompt_texts(example: Example) -> list[str]:
    """Return the texts of history, instruction and input."""
    return [*(turn.content for turn in example.history), example.instruction, example.input]


def shingles_of(texts: Sequence[str]) -> Shingles:
    """Return the shingles of texts: every three consecutive words, or one shingle of all words if there are fewer."""
    words = _WORD.findall("\n".join(texts))
    if len(words) < _SHINGLE:
        return frozenset([tuple(words)])
    return frozenset(zip(*(words[offset:] for offset in range(_SHINGLE)), strict=False))


def jaccard(first: Shingles, second: Shingles) -> float:
    """Return the size of the intersection divided by the size of the union."""
    shared = len(first & second)
    return shared / (len(first) + len(second) - shared)
