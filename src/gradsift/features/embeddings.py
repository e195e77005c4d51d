"""The embeddings stage: one vector of length 1 for the text of each example, from the run's embedder.

Equal texts are embedded once, so that exact duplicates tie whatever batch they would have been in. Work
is kept block by block: a run that was interrupted continues at the block it was in.

Shape letters: N examples, B texts of a batch, D features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from gradsift.artifacts import Artifact
from gradsift.data.batching import length_batches, spread_out
from gradsift.data.examples import Example
from gradsift.errors import GradsiftError
from gradsift.features.vectors import FilledBlocks, open_features, unit_rows, write_ids
from gradsift.runtime import Advance, Runtime, weighed
from gradsift.training.device import TokenBudget

VERSION = 1
_BLOCK = 4096  # texts between two notes of what is done


@dataclass(frozen=True, slots=True)
class Text:
    """What an encoder reads of an example, and the number of its tokens (0: nothing)."""

    content: Any  # hashable, and the encoder's own: token ids as bytes, or a string
    tokens: int


class Encoder(Protocol):
    """A loaded model that turns texts into vectors of any length."""

    model: Any  # its transformer, for the token budget
    dimensions: int

    def read(self, examples: Sequence[Example], advance: Advance) -> tuple[list[Text], int]:
        """Each example's text, and how many were cut to the maximal length."""
        ...

    def embed(self, texts: Sequence[Text]) -> np.ndarray:
        """(B, D) float32 of texts with at least one token each, in one pass."""
        ...


@dataclass(frozen=True)
class Embedder:
    """An embedder as it is configured."""

    name: str
    settings: Mapping[str, Any]  # what its vectors depend on besides the model; JSON values
    model: Artifact
    load: Callable[[], Encoder]


def embed(
    runtime: Runtime,
    embedder: Embedder,
    source: Artifact,
    rows: Callable[[], tuple[Sequence[Example], Sequence[str]]],
) -> Artifact:
    """Embed examples; see `gradsift.features.vectors.read_features`. An empty text has a row of zeros.

    Args:
        source: what the examples come from.
        rows: the examples, and the task of each where they are a target set's.

    Raises:
        GradsiftError: an embedding is not finite; names the rows.
    """

    def make(folder: Path) -> Mapping[str, Any]:
        (examples, tasks), encoder = rows(), embedder.load()
        with runtime.display.task("read texts", len(examples)) as advance:
            texts, cut = encoder.read(examples, advance)
        if cut:
            runtime.display.say(f"  {cut:,} of {len(texts):,} texts were cut to embedder.max_length or the model's own")
        budget = TokenBudget.of(encoder.model, runtime.compute.tokens, runtime.display.say)
        _fill(folder, encoder, texts, examples, budget, runtime)
        write_ids(folder, [example.example_id for example in examples], tasks)
        empty = sum(text.tokens == 0 for text in texts)
        return {"rows": len(texts), "dimensions": encoder.dimensions, "empty": empty, "cut": cut}

    settings = dict(embedder.settings)
    slug, parents = f"{embedder.name}-{source.stage}", [embedder.model, source]
    return runtime.store.obtain("embeddings", slug, settings, parents, make, version=VERSION, keep_part=True)


def _fill(
    folder: Path,
    encoder: Encoder,
    texts: Sequence[Text],
    examples: Sequence[Example],
    budget: TokenBudget,
    runtime: Runtime,
) -> None:
    """Write `features.npy`, from the first block that is not there yet."""
    places: dict[Text, list[int]] = {}
    for row, text in enumerate(texts):
        if text.tokens:
            places.setdefault(text, []).append(row)
    unique = list(places)
    vectors = open_features(folder, len(texts), encoder.dimensions)
    vectors[[row for row, text in enumerate(texts) if not text.tokens]] = 0

    def content(place: Sequence[int]) -> np.ndarray:
        return vectors[[row for text in unique[slice(*place)] for row in places[text]]]

    filled = FilledBlocks(folder, content, runtime.display.say)
    done = filled.places[-1][1] if filled.places else 0
    with runtime.display.task(f"embed {len(texts):,} texts", len(unique)) as advance:
        advance(done)
        for start in range(done, len(unique), _BLOCK):
            block = unique[start : start + _BLOCK]
            told = weighed(advance, len(block), sum(text.tokens for text in block))
            for batch, found in embedded(encoder, block, budget):
                rows = [places[text] for text in batch]
                _require_finite(found, [examples[each[0]] for each in rows])
                for each, vector in zip(rows, unit_rows(found), strict=True):
                    vectors[each] = vector
                told(sum(text.tokens for text in batch))
            vectors.flush()
            filled.add([start, start + len(block)])


def embedded(encoder: Encoder, texts: Sequence[Text], budget: TokenBudget) -> Iterator[tuple[list[Text], np.ndarray]]:
    """The texts in batches of like length under the token budget, and the vectors (B, D) of each batch."""
    lengths = [text.tokens for text in texts]
    for batch in spread_out(length_batches(lengths, budget.tokens)):

        def vectors_of(tokens: int, batch: Sequence[int] = batch) -> np.ndarray:
            parts = length_batches([lengths[place] for place in batch], tokens)  # keeps the order: it is sorted
            return np.concatenate([encoder.embed([texts[batch[index]] for index in part]) for part in parts])

        yield [texts[place] for place in batch], budget.run(vectors_of, [lengths[place] for place in batch])


def _require_finite(vectors: np.ndarray, examples: Sequence[Example]) -> None:
    bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
    if len(bad):
        rows = ", ".join(str(examples[place].row_index) for place in bad[:8])
        raise GradsiftError(
            f"the embedding of row {rows} is not finite; take compute.precision=float32 or another embedder"
        )
