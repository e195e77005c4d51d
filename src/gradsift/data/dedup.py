"""Finds repeated examples. Exact duplicates have equal texts; near duplicates share most of their word triples.

Of repeated examples, the first is kept. A row is compared only with kept rows. For example, if row 2 is similar to rows
1 and 3, but rows 1 and 3 are not similar to each other, row 2 is dropped, and rows 1 and 3 are kept.
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
    """Return the kept examples and the dropped rows. The `reason` of a dropped row names the row that it repeats.

    Args:
        dedup: exact (drops rows with equal history, instruction, input and output) or near (also drops rows with
            similar sets of word triples).
        threshold: rows are near duplicates if the Jaccard similarity of their word triples is at least this; used only
            for `near`.
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
    """Find the examples at `positions` (in ascending order) that are similar to an earlier, kept example.

    Locality-sensitive hashing of MinHash signatures finds candidates (Leskovec et al., Mining of Massive Datasets,
    chapter 3). The word triples of each candidate pair are then compared exactly, so the Jaccard similarity of every
    returned pair is at least `threshold`. A pair whose similarity equals the threshold is missed with a probability of
    at most 1 in 1,000. A pair with a higher similarity is missed less often.

    Returns:
        A dict from the position of each near duplicate to the position of the kept example that it repeats, and the
        pair's Jaccard similarity.
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

    The signatures of two examples with similarity s agree in all r hashes of one band with probability s^r. The pair is
    missed if the signatures agree in none of the bands, which has the probability (1 - s^r)^b. r is the largest number
    for which a pair whose similarity equals the threshold is missed with a probability of at most `_MISS`.
    """
    lengths = range(1, _HASHES // 2 + 1)
    rows = max(r for r in lengths if (1 - threshold**r) ** (_HASHES // r) <= _MISS)
    return _HASHES // rows, rows


def shingles(example: Example) -> Shingles:
    """Return the shingles (word triples) of an example's history, instruction, input and output."""
    return shingles_of([*prompt_texts(example), example.output])


def prompt_texts(example: Example) -> list[str]:
    """Return the texts of an example's prompt: history, instruction and input."""
    return [*(turn.content for turn in example.history), example.instruction, example.input]


def shingles_of(texts: Sequence[str]) -> Shingles:
    """Return the shingles of texts: all runs of three consecutive words, or all words if there are fewer than three."""
    words = _WORD.findall("\n".join(texts))
    if len(words) < _SHINGLE:
        return frozenset([tuple(words)])
    return frozenset(zip(*(words[offset:] for offset in range(_SHINGLE)), strict=False))


def jaccard(first: Shingles, second: Shingles) -> float:
    """Return the Jaccard similarity of two sets: the size of their intersection divided by the size of their union."""
    shared = len(first & second)
    return shared / (len(first) + len(second) - shared)
