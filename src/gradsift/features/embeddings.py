"""The embeddings stage: one vector of length 1 for the text of each example, computed by the run's embedder.

Equal texts are embedded once, so that exact duplicates have equal embeddings. After an interruption, the stage
continues at the block of texts that it was computing.

Shape letters: N examples, B texts of a batch, D features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from gradsift.artifacts import Artifact
from gradsift.data.examples import Example, Rejected, write_rejected
from gradsift.data.refused import REFUSED_FILE, say_refused
from gradsift.data.tokens import Encoded
from gradsift.errors import GradsiftError
from gradsift.features.vectors import fill_block, finish_features, open_features, unit_rows
from gradsift.runtime import Advance, Runtime
from gradsift.training.device import TokenBudget

VERSION = 2
_BLOCK = 4096  # texts between two entries of the journal


class Encoder(Protocol):
    """A loaded model that turns texts into vectors."""

    model: Any  # its transformer, for the token budget
    dimensions: int

    def read(self, examples: Sequence[Example], advance: Advance) -> tuple[list[Encoded], int, list[Rejected]]:
        """Return the tokens of all examples with a non-empty text, the number of cut texts, and refused examples."""
        ...

    def embed(self, texts: Sequence[Encoded]) -> np.ndarray:
        """Return vectors (B, D) float32, not necessarily of length 1, computed in one pass."""
        ...


@dataclass(frozen=True)
class Embedder:
    """An embedder with its settings and its model."""

    name: str
    settings: Mapping[str, Any]  # what the vectors depend on besides the model; JSON values
    model: Artifact
    load: Callable[[], Encoder]


def embed(
    runtime: Runtime,
    embedder: Embedder,
    source: Artifact,
    rows: Callable[[], tuple[Sequence[Example], Sequence[str]]],
) -> Artifact:
    """Return an artifact with the examples' embeddings, which `gradsift.features.vectors.read_features` reads.

    A text that is empty, or that the proxy's chat template cannot render, has a row of zeros.

    Args:
        source: the artifact that the examples come from.
        rows: returns the examples and, for a target set, the task of each; for a pool, an empty list of tasks.

    Raises:
        GradsiftError: an embedding is not finite; the message names the rows.
    """

    def make(folder: Path) -> Mapping[str, Any]:
        (examples, tasks), encoder = rows(), embedder.load()
        with runtime.display.task("read texts", len(examples)) as advance:
            texts, cut, refused = encoder.read(examples, advance)
        if cut:
            runtime.display.say(
                f"  {cut:,} of {len(examples):,} texts were cut to embedder.max_length or the model's own limit"
            )
        if refused:
            say_refused(runtime, refused, len(examples), "proxy", "texts")
            write_rejected(folder / REFUSED_FILE, refused)
        vectors = open_features(folder, len(examples), encoder.dimensions)
        vectors[np.setdiff1d(np.arange(len(examples)), [text.row for text in texts])] = 0
        _fill(runtime, folder, encoder, texts, vectors)
        finish_features(folder, vectors, [example.example_id for example in examples], tasks)
        empty = len(examples) - len(texts)
        counts = {"empty": empty, "cut": cut, "refused": len(refused)}
        return {"rows": len(examples), "dimensions": encoder.dimensions, **counts}

    settings = dict(embedder.settings)
    slug, parents = f"{embedder.name}-{source.stage}", [embedder.model, source]
    return runtime.store.obtain("embeddings", slug, settings, parents, make, version=VERSION)


def _fill(runtime: Runtime, folder: Path, encoder: Encoder, texts: Sequence[Encoded], vectors: np.memmap) -> None:
    """Write the embeddings of `texts` to their rows of `vectors` (N, D)."""
    rows_of: dict[bytes, list[int]] = {}  # rows with equal tokens
    unique: list[Encoded] = []
    for text in texts:
        rows = rows_of.setdefault(text.input_ids.tobytes(), [])
        if not rows:
            unique.append(text)
        rows.append(text.row)
    budget = TokenBudget.of(encoder.model, runtime.compute.tokens, runtime.display.say)
    journal = runtime.journal(folder)
    with runtime.display.task(f"embed {len(texts):,} texts", len(unique)) as advance:
        for start in range(0, len(unique), _BLOCK):
            block = unique[start : start + _BLOCK]
            groups = [rows_of[text.input_ids.tobytes()] for text in block]

            def make(block: Sequence[Encoded] = block, groups: Sequence[Sequence[int]] = groups) -> np.ndarray:
                unit = embedded(encoder, block, budget, advance)
                return np.repeat(unit, [len(rows) for rows in groups], axis=0)

            index = [row for rows in groups for row in rows]
            if not fill_block(journal, vectors, index, [start, start + len(block)], make):
                advance(len(block))


def embedded(
    encoder: Encoder, texts: Sequence[Encoded], budget: TokenBudget, advance: Advance = lambda done: None
) -> np.ndarray:
    """Return embeddings scaled to length 1, (len(texts), D) float32, computed in batches of texts of similar lengths.

    Raises:
        GradsiftError: an embedding is not finite; the message names the rows.
    """
    place_of = {text.row: place for place, text in enumerate(texts)}
    vectors = np.empty((len(texts), encoder.dimensions), dtype=np.float32)

    def embed_batch(batch: list[Encoded]) -> None:
        output = encoder.embed(batch)
        bad = np.flatnonzero(~np.isfinite(output).all(axis=1))
        if len(bad):
            rows = ", ".join(str(batch[place].row_index) for place in bad[:8])
            raise GradsiftError(
                f"the embedding of row {rows} is not finite; take compute.precision=float32 or another embedder"
            )
        vectors[[place_of[text.row] for text in batch]] = unit_rows(output)

    for _ in budget.passes(texts, embed_batch, advance=advance):
        pass
    return vectors
