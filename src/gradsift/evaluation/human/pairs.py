"""The pairs that people compare: the answers of a model and of a reference model, from a run or from two files."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from gradsift.errors import DataError
from gradsift.evaluation.generation import OUTPUTS_FILE, item_key, read_pair, without_turns
from gradsift.manifests import content_hash, read_manifest
from gradsift.run_folder import RUN_FILE

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
    """The names of two models and all pairs of their answers; `content` is a hash of all texts."""

    model: str
    reference: str
    items: dict[Key, Pair]
    content: str


@dataclass(frozen=True)
class PairFiles:
    """The files with both models' answers and, if an LLM judge has judged the answers, the file with the judgments."""

    model: Path
    reference: Path
    judgments: Path | None = None


def read_pairs(files: PairFiles) -> Pairs:
    """Read both models' answers.

    Raises:
        DataError: the models did not answer the same items, or a name or an id contains a lone surrogate, which SQLite
            cannot store.
    """
    rows, reference_rows = map(without_turns, read_pair(files.model, files.reference))
    outputs = {item_key(row): row["output"] for row in reference_rows}
    items = {
        item_key(row): Pair(row["instruction"], row["input"], row["output"], outputs[item_key(row)]) for row in rows
    }
    for name in (rows[0]["generator"], reference_rows[0]["generator"], *chain.from_iterable(items)):
        if any("\ud800" <= character <= "\udfff" for character in name):  # SQLite cannot store it
            raise DataError(
                f"{files.model}, {files.reference}: {name!a} contains a lone surrogate; give another name or id"
            )
    content = content_hash({"pairs": sorted([*key, *vars(pair).values()] for key, pair in items.items())})
    return Pairs(rows[0]["generator"], reference_rows[0]["generator"], items, content)


def files_of_run(folder: Path) -> PairFiles:
    """Return a run's files: the answers of its two models and, if the judge has finished, the judgments.

    Raises:
        DataError: `folder` is not the folder of a run, or the run has no answers of two models.
    """
    path = folder / RUN_FILE
    try:
        stages = [
            (stage["name"], Path(stage["artifact"]), stage["fingerprint"])
            for stage in json.loads(path.read_text(encoding="utf-8"))["stages"]
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} cannot be read as the record of a run ({error}); give the folder of a run, as in outputs/DATE/TIME"
        ) from error
    answers = {fingerprint: artifact / OUTPUTS_FILE for name, artifact, fingerprint in stages if name == "generate"}
    if judged := [artifact for name, artifact, _ in stages if name == "judge"]:
        model, reference = (answers[parent] for parent in _manifest(judged[-1])["parents"][:2])
        return PairFiles(model, reference, judged[-1] / "judgments.jsonl")
    # The judge has not finished: take the answers of the first two finetunes (on the selection, on all rows) to the
    # same items. The run may also have answers to the questions about forgetting, but only by the first of the two.
    tuned = [fingerprint for name, _, fingerprint in stages if name == "finetune"][:2]
    by_model: dict[tuple[str, str], Path] = {}  # by hash of the items and fingerprint of the model
    for file in answers.values():
        manifest = _manifest(file.parent)
        by_model |= {(manifest["config"].get("items", ""), parent): file for parent in manifest["parents"]}
    for (items, adapter), file in by_model.items():
        if len(tuned) == 2 and adapter == tuned[0] and (items, tuned[1]) in by_model:
            return PairFiles(file, by_model[items, tuned[1]])
    raise DataError(
        f"{folder}: the run has no answers of two models (it stopped early, failed, or tunes the full-data model "
        "alone); name two model_outputs.json with --model and --reference"
    )


def _manifest(artifact: Path) -> dict[str, Any]:
    manifest, damage = read_manifest(artifact)
    if damage:
        raise DataError(
            f"{artifact} cannot be read as an artifact of the run ({damage}); start this command in the folder in "
            "which the run was started, or give the run's command again"
        )
    return manifest
