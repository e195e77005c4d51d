"""The pairs that people compare: the answers of a model and of its reference, from a run or from two files."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradsift.artifacts import MANIFEST, content_hash
from gradsift.errors import DataError
from gradsift.evaluation.generation import item_key, read_pair
from gradsift.evaluation.judges import Combine

OUTPUTS_FILE = "model_outputs.json"  # as in evaluation.stages, which needs torch
Key = tuple[str, str]  # (benchmark, item id)


@dataclass(frozen=True)
class Pair:
    """One question and the two answers to it."""

    instruction: str
    input: str
    model: str
    reference: str


@dataclass(frozen=True)
class Pairs:
    """All pairs of two models; `content` is a hash of every text, and so tells these pairs from any others."""

    model: str  # generator names
    reference: str
    items: dict[Key, Pair]
    content: str


@dataclass(frozen=True)
class PairFiles:
    """Where the answers lie, and the judgments that an LLM judge has made about them."""

    model: Path
    reference: Path
    judgments: Path | None = None
    combine: Combine | None = None  # None: as the file of judgments tells


def read_pairs(files: PairFiles) -> Pairs:
    """Read both models' answers.

    Raises:
        DataError: a file is missing or broken, the two do not answer the same items, or an id is no Unicode text.
    """
    rows, reference_rows = read_pair(files.model, files.reference)
    theirs = {item_key(row): row["output"] for row in reference_rows}
    items = {
        item_key(row): Pair(row["instruction"], row["input"], row["output"], theirs[item_key(row)]) for row in rows
    }
    for key in items:
        if any("\ud800" <= character <= "\udfff" for character in "".join(key)):
            raise DataError(f"{files.model}: item {'/'.join(key)!a} holds half a surrogate pair; give it another id")
    content = content_hash({"pairs": sorted([*key, *vars(pair).values()] for key, pair in items.items())})
    return Pairs(rows[0]["generator"], reference_rows[0]["generator"], items, content)


def files_of_run(folder: Path) -> PairFiles:
    """The answers that the judge stage of a run compared, and its judgments.

    Raises:
        DataError: `folder` holds no run, the run never judged two models, or its artifacts are gone.
    """
    stages = _stages(folder)
    judged = [Path(stage["artifact"]) for stage in stages if stage["name"] == "judge"]
    if not judged:
        raise DataError(
            f"{folder}: the run has compared no two models (it stopped early, failed, or is of the full-data model "
            "itself); name two model_outputs.json with --model and --reference"
        )
    try:
        manifest = json.loads((judged[-1] / MANIFEST).read_text(encoding="utf-8"))
        combine: Combine = manifest["info"]["combine"]
        parents = manifest["parents"][:2]  # the answers, then the reference's
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{folder}: the judge's artifact {judged[-1]} cannot be read ({error}); run this from the folder "
            "in which the run was started, or give the run's command again"
        ) from error
    answers = {stage["fingerprint"]: Path(stage["artifact"]) for stage in stages if stage["name"] == "generate"}
    lacking = [parent for parent in parents if parent not in answers]
    if lacking or len(parents) < 2:
        raise DataError(
            f"{folder}: run.json does not name the judged answers {', '.join(lacking)}; give its command again"
        )
    model, reference = (answers[parent] / OUTPUTS_FILE for parent in parents)
    return PairFiles(model, reference, judged[-1] / "judgments.jsonl", combine)


def _stages(folder: Path) -> list[dict[str, Any]]:
    path = folder / "run.json"
    try:
        stages = json.loads(path.read_text(encoding="utf-8"))["stages"]
        return [{name: str(stage[name]) for name in ("name", "artifact", "fingerprint")} for stage in stages]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} cannot be read as a run's ({error}); give the folder of a finished run, as in outputs/DATE/TIME"
        ) from error
