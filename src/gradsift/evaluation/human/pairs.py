"""The pairs that people compare: the answers of a model and of a reference model, from a run or from two files."""

from __future__ import annotations

import json
from dataclasses import dataclass
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
    """All pairs of answers by two models, and the models' names; `content` is a hash of all texts."""

    model: str
    reference: str
    items: dict[Key, Pair]
    content: str


@dataclass(frozen=True)
class PairFiles:
    """The files with both models' answers and, if an LLM judge has judged these, the file with its judgments."""

    model: Path
    reference: Path
    judgments: Path | None = None


def read_pairs(files: PairFiles) -> Pairs:
    """Read both models' answers; raise DataError if they do not answer the same items or an id is not valid Unicode."""
    rows, reference_rows = map(without_turns, read_pair(files.model, files.reference))
    outputs = {item_key(row): row["output"] for row in reference_rows}
    items = {
        item_key(row): Pair(row["instruction"], row["input"], row["output"], outputs[item_key(row)]) for row in rows
    }
    for key in items:
        if any("\ud800" <= character <= "\udfff" for character in "".join(key)):
            raise DataError(f"{files.model}: item {'/'.join(key)!a} holds half a surrogate pair; give it another id")
    content = content_hash({"pairs": sorted([*key, *vars(pair).values()] for key, pair in items.items())})
    return Pairs(rows[0]["generator"], reference_rows[0]["generator"], items, content)


def files_of_run(folder: Path) -> PairFiles:
    """Return a run's files: the answers of its two models and, if the judge has finished, the judgments.

    Raises:
        DataError: `folder` is not the folder of a run, or answers of two models are not there.
    """
    path = folder / RUN_FILE
    try:
        stages = [
            (stage["name"], Path(stage["artifact"]), stage["fingerprint"])
            for stage in json.loads(path.read_text(encoding="utf-8"))["stages"]
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} cannot be read as a run's ({error}); give the folder of a finished run, as in outputs/DATE/TIME"
        ) from error
    answers = {fingerprint: artifact / OUTPUTS_FILE for name, artifact, fingerprint in stages if name == "generate"}
    if judged := [artifact for name, artifact, _ in stages if name == "judge"]:
        parents = _manifest(judged[-1])["parents"][:2]  # the model's answers, then the reference's
        if missing := [parent for parent in parents if parent not in answers]:
            raise DataError(
                f"{folder}: run.json does not name the judged answers {', '.join(missing)}; give its command again"
            )
        model, reference = (answers[parent] for parent in parents)
        return PairFiles(model, reference, judged[-1] / "judgments.jsonl")
    # the judge has not finished, so take the answers that the first two finetunes (on the selection, on all rows) gave
    # to the same items
    tuned = [fingerprint for name, _, fingerprint in stages if name == "finetune"][:2]
    by_items: dict[str, dict[str, Path]] = {}  # by hash of the items: {finetune: file of answers}
    for file in answers.values():
        manifest = _manifest(file.parent)
        same_items = by_items.setdefault(str(manifest["config"].get("items")), {})
        same_items |= {parent: file for parent in manifest["parents"] if parent in tuned}
    # only the first model answers the questions about forgetting
    for same_items in by_items.values():
        if len(same_items) == 2:
            return PairFiles(same_items[tuned[0]], same_items[tuned[1]])
    raise DataError(
        f"{folder}: the run has no answers of two models (it stopped early, failed, or is of the full-data model "
        "itself); name two model_outputs.json with --model and --reference"
    )


def _manifest(artifact: Path) -> dict[str, Any]:
    manifest, damage = read_manifest(artifact)
    if damage:
        raise DataError(
            f"{artifact} cannot be read as a run's ({damage}); run this from the folder in which the run was started, "
            "or give the run's command again"
        )
    return manifest
