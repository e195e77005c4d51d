"""The pairs that people compare: the answers of a model and of its reference, from a run or from two files."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradsift.errors import DataError
from gradsift.evaluation.generation import OUTPUTS_FILE, item_key, read_pair
from gradsift.evaluation.judges import Combine
from gradsift.manifests import MANIFEST, content_hash

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
    """The two models' answers of a run, and its judge's judgments if it came to an end.

    Raises:
        DataError: `folder` holds no run, the run made no two models' answers, or its artifacts are gone.
    """
    stages = _stages(folder)
    judged = [Path(stage["artifact"]) for stage in stages if stage["name"] == "judge"]
    if not judged:
        return _unjudged(folder, stages)
    manifest = _manifest(folder, judged[-1])
    parents = manifest["parents"][:2]  # the answers, then the reference's
    answers = {stage["fingerprint"]: Path(stage["artifact"]) for stage in stages if stage["name"] == "generate"}
    lacking = [parent for parent in parents if parent not in answers]
    if lacking or len(parents) < 2:
        raise DataError(
            f"{folder}: run.json does not name the judged answers {', '.join(lacking)}; give its command again"
        )
    model, reference = (answers[parent] / OUTPUTS_FILE for parent in parents)
    return PairFiles(model, reference, judged[-1] / "judgments.jsonl", manifest["info"]["combine"])


def _unjudged(folder: Path, stages: list[dict[str, Any]]) -> PairFiles:
    """The answers of a run whose judge is not done: those of its first two finetunes, to the same items."""
    tuned = [stage["fingerprint"] for stage in stages if stage["name"] == "finetune"][:2]  # selection, all rows
    found: dict[str, dict[str, Path]] = {}  # by a hash of the items: finetune, answers
    for stage in stages:
        if stage["name"] == "generate":
            artifact = Path(stage["artifact"])
            manifest = _manifest(folder, artifact)
            answers = found.setdefault(str(manifest["config"].get("items")), {})
            answers |= {parent: artifact / OUTPUTS_FILE for parent in manifest["parents"] if parent in tuned}
    # the questions about forgetting are answered by the first alone
    both = [answers for answers in found.values() if len(answers) == 2]
    if not both:
        raise DataError(
            f"{folder}: the run has no answers of two models (it stopped early, failed, or is of the full-data model "
            "itself); name two model_outputs.json with --model and --reference"
        )
    return PairFiles(both[0][tuned[0]], both[0][tuned[1]])


def _manifest(folder: Path, artifact: Path) -> dict[str, Any]:
    try:
        manifest: dict[str, Any] = json.loads((artifact / MANIFEST).read_text(encoding="utf-8"))
        if not {"config", "info", "parents"} <= manifest.keys():
            raise KeyError("config, info or parents")
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise DataError(
            f"{folder}: the run's artifact {artifact} cannot be read ({error}); run this from the folder "
            "in which the run was started, or give the run's command again"
        ) from error
    return manifest


def _stages(folder: Path) -> list[dict[str, Any]]:
    path = folder / "run.json"
    try:
        stages = json.loads(path.read_text(encoding="utf-8"))["stages"]
        return [{name: str(stage[name]) for name in ("name", "artifact", "fingerprint")} for stage in stages]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} cannot be read as a run's ({error}); give the folder of a finished run, as in outputs/DATE/TIME"
        ) from error
