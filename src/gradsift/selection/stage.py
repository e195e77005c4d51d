"""The select stage: the exact budget of examples, each written out whole."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gradsift.artifacts import Artifact
from gradsift.data.examples import Example
from gradsift.diagnostics import write_diagnostics
from gradsift.errors import GradsiftError
from gradsift.features.vectors import Features
from gradsift.runtime import Runtime
from gradsift.scoring.scores import SCORED, Scores
from gradsift.scoring.stage import scores_of
from gradsift.selection.budget import budget
from gradsift.selection.choice import Choice
from gradsift.selection.diagnostics import COVERED_WITHIN, coverage, diagnose_selection
from gradsift.sources import Method, Source

VERSION = 4
SELECTION_FILE = "selection.jsonl"


def select(
    runtime: Runtime,
    selector: Method,
    scored: Artifact,
    pool: Callable[[], Sequence[Example]],
    sources: Mapping[str, Source],
    measures: Callable[[], Mapping[str, np.ndarray]],
    alpha: float,
    base: str,
    corruption: Mapping[int, str],
    embeddings: Callable[[], Features] | None = None,
) -> Artifact:
    """Keep floor(alpha x N) examples; what is lacking where fewer have a score is a reported shortfall.

    Args:
        measures: for the diagnostics (see `diagnose_selection`); of what the scores were made of and nothing else.
        base: what N counts: `accepted` rows, or `scored` ones.
        corruption: what was injected at which position, from the loaded data; the selection says so of these rows.
        embeddings: of the pool, where the scorer or the selector asked for them: the selection's coverage is told.
    """

    def make(folder: Path) -> Mapping[str, Any]:
        scores, examples = scores_of(scored), pool()
        count = len(examples) if base == "accepted" else int((scores.status == SCORED).sum())
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
        np.save(folder / "positions.npy", positions)
        found = diagnose_selection(positions, examples, measures(), scores.parts.get("drop"))
        if embeddings is not None:
            found.append(coverage(embeddings(), positions, COVERED_WITHIN))
        write_diagnostics(folder, [*found, *choice.diagnostics])
        return {"rows": len(positions), "budget": size, "shortfall": size - len(positions)}

    settings = {"selector": selector.settings(sources), "alpha": alpha, "budget_base": base}
    slug = f"{scored.path.name.rsplit('-', 1)[0]}-{selector.name}-{alpha}"
    parents = [scored, *selector.parents(sources)]
    return runtime.store.obtain("select", slug, settings, parents, make, version=VERSION)


def write_selection(
    path: Path,
    positions: np.ndarray,
    scores: Scores,
    examples: Sequence[Example],
    corruption: Mapping[int, str] | None = None,
) -> None:
    """One line an example, best first: the original row, and under `gradsift` its rank, score and ids.

    The original row is the source's also where the example was corrupted for an audit; `corruption` names the kind.
    """
    with path.open("w", encoding="utf-8") as stream:
        for rank, position in enumerate(positions, start=1):
            example = examples[position]
            own = {
                "rank": rank,
                "score": float(scores.score[position]),
                "example_id": example.example_id,
                "row_index": example.row_index,
            }
            if corruption and int(position) in corruption:
                own["corruption"] = corruption[int(position)]
            row = {**example.original, "gradsift": own}
            stream.write(_json_line(row) + "\n")


def _json_line(row: Mapping[str, Any]) -> str:
    text = json.dumps(row, ensure_ascii=False, default=str)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # half a surrogate pair in some column: only escapes can hold it
        return json.dumps(row, default=str)
    return text


def positions_of(selection: Artifact) -> np.ndarray:
    """Positions of the selected examples in the pool, best first."""
    positions: np.ndarray = np.load(selection.file("positions.npy"), allow_pickle=False)
    return positions
