"""Compute a PWS from two files: `python -m gradsift.evaluation.compare MODEL REFERENCE [OPTION=VALUE ...]`.

MODEL and REFERENCE are model_outputs.json files with the answers of two models, from any source; nothing is trained.
The command takes the options of a run that concern judging: judge=NAME, judge.*, compute.*, benchmark.catalog.* (how
answers are compared with a reference answer) and artifacts. Judgments are kept in the store, as in a run, so the same
command continues an interrupted comparison. The result is printed as JSON on stdout; all messages go to stderr.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradsift.composition import compose_root
from gradsift.config import CompareConfig, LocalJudgeConfig
from gradsift.errors import ConfigError, command
from gradsift.evaluation.generation import OUTPUTS_FILE, ModelOutput, read_pair, write_model_outputs
from gradsift.names import slug

if TYPE_CHECKING:
    from gradsift.artifacts import Artifact, Store

VERSION = 1
_OPTIONS = re.compile(r"\+?\+?(judge(\..+)?|compute(\..+)?|benchmark\.catalog\..+|artifacts)=.*", re.DOTALL)


def compare(config: CompareConfig, model: Path, reference: Path) -> dict[str, Any]:
    """Judge the answers in the file `model` against the answers in the file `reference`, in both orders.

    Returns:
        The result of the stage `pws`, with the names of the models and of the judge, the cost of judging, the
        diagnostics, and the paths of the answers and judgments. A dry run returns only `{"dry_run": plan}`, where
        `plan` is a text that states the number of requests and their largest cost.

    Raises:
        DataError: a file is missing or broken, or the two files answer different items.
        JudgeError: requests to the judge failed, or a spending cap was reached.
    """
    pair = read_pair(model, reference)
    from rich.console import Console

    from gradsift.artifacts import Store
    from gradsift.diagnostics import DIAGNOSTICS_FILE, read_diagnostics
    from gradsift.evaluation.judges import DryRun
    from gradsift.evaluation.stages.judging import check_judge, judge, pws, pws_of
    from gradsift.runtime import Display, Runtime

    if isinstance(config.judge, LocalJudgeConfig):  # importing torch takes seconds, and other judges do not need it
        from gradsift.pipeline import prepare

        prepare(config.compute)
    display = Display(Console(stderr=True, highlight=False))
    runtime = Runtime(Store(Path(config.artifacts), display.say), config.compute, display, seed=0)
    check_judge(runtime, config.judge)
    answers, reference_answers = (_imported(runtime.store, rows) for rows in pair)
    known = [name for name in dict.fromkeys(row["dataset"] for row in pair[0]) if name in config.benchmark.catalog]
    benchmark = replace(config.benchmark, sets=known) if known else config.benchmark
    try:
        judged = judge(runtime, config.judge, benchmark, answers, reference_answers)
    except DryRun as plan:
        return {"dry_run": str(plan)}
    summary = pws(runtime, config.judge, judged, answers, reference_answers)
    from gradsift.report.notes import warnings_of

    diagnostics = read_diagnostics(summary.path) if (summary.path / DIAGNOSTICS_FILE).exists() else {}
    for name, message in warnings_of(diagnostics).items():
        display.say(f"warning: {name}: {message}")
    return {
        "model": pair[0][0]["generator"],
        "reference": pair[1][0]["generator"],
        "judge": config.judge.name,
        **pws_of(summary),
        "diagnostics": diagnostics,
        "cost": judged.info["cost"],
        "files": {
            "model": str(answers.file(OUTPUTS_FILE)),
            "reference": str(reference_answers.file(OUTPUTS_FILE)),
            "judgments": str(judged.file("judgments.jsonl")),
        },
    }


def _imported(store: Store, rows: Sequence[ModelOutput]) -> Artifact:
    """Store answers from a file as an artifact, because the stages read only artifacts."""
    from gradsift.manifests import content_hash

    def make(folder: Path) -> Mapping[str, Any]:
        write_model_outputs(folder / OUTPUTS_FILE, rows)
        return {"rows": len(rows)}

    settings = {"answers": content_hash({"rows": list(rows)})}
    return store.obtain("imported", slug(rows[0]["generator"]), settings, [], make, version=VERSION)


def _config(options: Sequence[str]) -> CompareConfig:
    for option in options:
        if not _OPTIONS.fullmatch(option):
            raise ConfigError(
                f"{option!r} is not an option here; options are judge=NAME, judge.KEY=VALUE, compute.KEY=VALUE, "
                "benchmark.catalog.SET.KEY=VALUE and artifacts=DIR"
            )
    return compose_root("compare", CompareConfig, options)


@command
def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; exit with code 130 after an interrupt."""
    parser = argparse.ArgumentParser(prog="python -m gradsift.evaluation.compare", description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path, metavar="MODEL", help="model_outputs.json of the model")
    parser.add_argument("reference", type=Path, metavar="REFERENCE", help="model_outputs.json of the reference")
    parser.add_argument("options", nargs="*", metavar="OPTION=VALUE", help="judge=NAME, judge.KEY=VALUE ...")
    parser.add_argument("--to", type=Path, metavar="FOLDER", help="write alpaca_eval's files too (see .export)")
    options = parser.parse_intermixed_args(arguments)  # options may follow --to
    try:
        result = compare(_config(options.options), options.model, options.reference)
        if options.to is not None and "files" in result:
            from gradsift.evaluation.export import export
            from gradsift.evaluation.human.pairs import PairFiles

            export(PairFiles(**{name: Path(path) for name, path in result["files"].items()}), options.to)
        print(json.dumps(result, indent=1, allow_nan=False))
    except KeyboardInterrupt:
        print("error: interrupted; the judgments so far are kept, and the same command goes on", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    sys.exit(main())
