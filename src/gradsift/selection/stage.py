"""The select stage: the selector chooses as many examples as the budget allows, and the stage writes their rows."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from gradsift.artifacts import Artifact
from gradsift.data.examples import read_blocks
from gradsift.data.load import EXAMPLES_FILE
from gradsift.diagnostics import write_diagnostics
from gradsift.errors import GradsiftError
from gradsift.features.vectors import Features
from gradsift.runtime import Runtime
from gradsift.scoring.scores import SCORED, Scores
from gradsift.scoring.stage import scores_of
from gradsift.selection.budget import budget
from gradsift.selection.checks import COVERED_WITHIN, coverage, diagnose_selection
from gradsift.selection.choice import Choice
from gradsift.sources import Method, Source

VERSION = 6
SELECTION_FILE = "selection.jsonl"


def select(
    runtime: Runtime,
    selector: Method,
    scored: Artifact,
    loaded: Artifact,
    sources: Mapping[str, Source],
    measures: Callable[[], Mapping[str, np.ndarray]],
    alpha: float,
    base: str,
    corruption: Mapping[int, str],
    embeddings: Callable[[], Features] | None = None,
) -> Artifact:
    """Select floor(alpha x N) examples; if the selector returns fewer, the number missing is recorded as `shortfall`.

    Args:
        measures: function that returns the measures for `diagnose_selection`. The measures may depend only on the
            inputs of the scores, because the measures are not part of the identity of the selection's artifact.
        alpha: share of the N examples to select.
        base: what N counts: all rows that were `accepted` when the data was loaded, or only the `scored` rows.
        corruption: kind of corruption of each example that was corrupted for an audit, by its position. The kind is
            written into the example's row of the selection file.
        embeddings: function that returns the pool's embeddings, which measure the coverage of the pool; None if neither
            the scorer nor the selector uses embeddings, in which case coverage is not measured.
    """

    def make(folder: Path) -> Mapping[str, Any]:
        scores, examples = scores_of(scored), loaded.file(EXAMPLES_FILE)
        count = len(scores.score) if base == "accepted" else int((scores.status == SCORED).sum())
        size = budget(alpha, count)
        if not (scores.status == SCORED).any():
            reasons = ", ".join(sorted({str(r) for r in scores.reason if r}))
            raise GradsiftError(f"no example has a score, so none can be selected ({reasons}); choose another scorer")
        choice: Choice = selector(scores, size, sources=sources)
        positions = choice.positions
        if not len(positions):
            why = "; ".join(diagnostic.message for diagnostic in choice.diagnostics) or "it does not say why"
            raise GradsiftError(f"selector={selector.name} selected no example ({why}); choose another selector")
        write_selection(folder / SELECTION_FILE, positions, scores, examples, corruption)
        # for later stages; the JSON lines are for people and other trainers
        np.save(folder / "positions.npy", positions)
        diagnostics = diagnose_selection(positions, examples, measures(), scores.parts.get("drop"))
        if embeddings is not None:
            diagnostics.append(coverage(embeddings(), positions, COVERED_WITHIN))
        write_diagnostics(folder, [*diagnostics, *choice.diagnostics])
        return {"rows": len(positions), "budget": size, "shortfall": size - len(positions)}

    settings = {"selector": selector.settings(sources), "alpha": alpha, "budget_base": base}
    slug = f"{scored.path.name.rsplit('-', 1)[0]}-{selector.name}-{alpha}"
    parents = [scored, *selector.parents(sources)]
    return runtime.store.obtain("select", slug, settings, parents, make, version=VERSION)


def write_selection(
    path: Path,
    positions: np.ndarray,
    scores: Scores,
    examples: Path,
    corruption: Mapping[int, str] | None = None,
) -> None:
    """Write one line per selected example, best first: its original row, to which the key `gradsift` is added.

    `gradsift` holds rank, score, example_id and row_index. The original row is the row of the source, even if the
    example was corrupted for an audit; in this case `gradsift` also holds the kind of corruption.

    Neither the pool nor the selection has to fit in memory: the pool is read in its own order, and the lines of the
    selected examples are kept in a temporary file until they are written in order of rank.
    """
    ranks = np.zeros(len(scores.score), dtype=np.int64)  # from 1; 0 if not selected
    ranks[positions] = np.arange(1, len(positions) + 1)
    begins, sizes = np.zeros((2, len(positions)), dtype=np.int64)  # in bytes of the temporary file, by rank
    with tempfile.TemporaryFile(dir=path.parent) as lines, path.open("wb") as stream:
        for position, row in _rows(examples, ranks):
            rank = int(ranks[position])
            own: dict[str, Any] = {"rank": rank, "score": float(scores.score[position])}
            own |= {name: row[name] for name in ("example_id", "row_index")}
            if corruption and position in corruption:
                own["corruption"] = corruption[position]
            text = json.dumps({**json.loads(row["original"]), "gradsift": own}, ensure_ascii=False, default=str)
            line = text.encode("utf-8", "backslashreplace") + b"\n"  # a lone surrogate as JSON's escape
            begins[rank - 1], sizes[rank - 1] = lines.tell(), len(line)
            lines.write(line)
        for begin, size in zip(begins.tolist(), sizes.tolist(), strict=True):
            lines.seek(begin)
            stream.write(lines.read(size))


def _rows(examples: Path, ranks: np.ndarray) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the position and the column values of each example whose rank in `ranks` is not 0, in file order."""
    start = 0
    for block in read_blocks(examples, ("row_index", "example_id", "original")):
        chosen = np.flatnonzero(ranks[start : start + block.num_rows])
        yield from zip((start + chosen).tolist(), block.take(pa.array(chosen)).to_pylist(), strict=True)
        start += block.num_rows


def positions_of(selection: Artifact) -> np.ndarray:
    """Return the positions of the selected examples in the pool, best first."""
    positions: np.ndarray = np.load(selection.file("positions.npy"), allow_pickle=False)
    return positions
