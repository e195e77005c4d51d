"""The stage `metrics`: metrics of the answers that are computed without a judge."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gradsift.artifacts import Artifact
from gradsift.config import BenchmarkConfig
from gradsift.errors import DataError
from gradsift.evaluation.benchmarks import Item
from gradsift.evaluation.generation import OUTPUTS_FILE, read_model_outputs
from gradsift.evaluation.lm_harness import check_lm_eval
from gradsift.evaluation.text_metrics import check_wordnet, measure, read_wordnet
from gradsift.manifests import file_hash
from gradsift.runtime import Runtime

VERSION = 1
METRICS_FILE = "metrics.json"


def check_metrics(config: BenchmarkConfig) -> None:
    """Raise an error early if a metric cannot be computed, because files are missing or a task is unknown."""
    check_wordnet(config.wordnet_dir)
    if config.lm_eval_folder is not None and not Path(config.lm_eval_folder).is_dir():
        raise DataError(
            f"benchmark.lm_eval_folder={config.lm_eval_folder} is no folder; name one with tasks of lm-eval"
        )
    check_lm_eval(config.lm_eval_tasks, config.lm_eval_folder)


def metrics(runtime: Runtime, config: BenchmarkConfig, answers: Artifact, items: Sequence[Item]) -> Artifact | None:
    """Compute accuracy, ROUGE-L, BLEU and METEOR per benchmark and pooled (see `gradsift.evaluation.text_metrics`).

    Args:
        answers: the answers of the stage `generate` to these items.

    Returns:
        An artifact for `metrics_of`; None if no item has a reference answer.
    """
    asked = sorted({item.benchmark for item in items if item.reference is not None})
    if not asked:
        return None
    wordnet = check_wordnet(config.wordnet_dir)
    settings = {
        "match": {name: config.match_of(name) for name in asked},
        "wordnet": None if wordnet is None else [file_hash(file) for file in sorted(wordnet.glob("data.*"))],
    }

    def make(folder: Path) -> Mapping[str, Any]:
        rows = read_model_outputs(answers.file(OUTPUTS_FILE))
        known = sum(row["reference"] is not None for row in rows)
        with runtime.display.task(f"metrics of {known:,} answers", 2 * known) as advance:
            values = measure(rows, config.match_of, None if wordnet is None else read_wordnet(wordnet), advance)
        (folder / METRICS_FILE).write_text(json.dumps(values, indent=1, allow_nan=False), encoding="utf-8")
        return {"rows": values["pooled"]["items"]}

    slug = answers.path.name.rsplit("-", 1)[0]
    return runtime.store.obtain("metrics", slug, settings, [answers], make, version=VERSION)


def metrics_of(made: Artifact | None) -> dict[str, Any] | None:
    """Return the contents of the artifact of `metrics`; None if `made` is None."""
    return None if made is None else json.loads(made.file(METRICS_FILE).read_text(encoding="utf-8"))
