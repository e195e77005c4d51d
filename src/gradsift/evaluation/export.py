"""Runs in alpaca_eval's own files: `python -m gradsift.evaluation.export RUN... --to FOLDER`.

    FOLDER/GENERATOR/model_outputs.json                 the answers of each model, the reference too
    FOLDER/GENERATOR/JUDGE/annotations.json             one row an item: what became of it in both orders together
    FOLDER/GENERATOR/JUDGE/annotations_forward.json     one order a file, the outputs in the order shown
    FOLDER/GENERATOR/JUDGE/annotations_reverse.json

In annotations.json output_2 is the model and `preference` 2 a win, 1 a loss, 1.5 a tie and null an invalid item, so
that alpaca_eval's `get_winrate` counts what PWS counts, and its win rate is 50 PWS. An alpaca_eval annotator's own
preferences between 1 and 2 stand in the files of one order.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gradsift.errors import DataError, GradsiftError
from gradsift.evaluation.generation import OUTPUTS_FILE, ModelOutput, item_key, read_pair
from gradsift.evaluation.human.pairs import PairFiles, files_of_run
from gradsift.evaluation.judges import Combine, Order
from gradsift.evaluation.judges.alpaca_eval import NAMES, with_input
from gradsift.evaluation.judgments import ORDERS, Judgment
from gradsift.evaluation.pws import in_both_orders, outcome
from gradsift.evaluation.records import read_records
from gradsift.names import require_no_link, slug

ANNOTATIONS_FILE = "annotations.json"
_VERDICTS = {"win": 2.0, "tie": 1.5, "lose": 1.0, "invalid": None}


def export(files: PairFiles, folder: Path) -> list[Path]:
    """Write the answers of two models, and the judgments about them if there are any; returns the files.

    Raises:
        DataError: a file is missing or broken, the two models have one name, judgments are about other items, or a
            file is there already with other content.
    """
    pair = read_pair(files.model, files.reference)
    model, reference = (rows[0]["generator"] for rows in pair)
    if model == reference:
        raise DataError(
            f"{files.model} and {files.reference} are both by the generator {model!r}, so nobody could tell whose the "
            "wins are; give the rows of one file another `generator`"
        )
    if slug(model) == slug(reference):
        raise DataError(
            f"the generators {model!r} and {reference!r} would share the folder {slug(model)}, and one model's answers "
            "would replace the other's; give the rows of one file another `generator`"
        )
    contents: dict[Path, list[dict[str, Any]]] = {
        folder / slug(rows[0]["generator"]) / OUTPUTS_FILE: [_output(row) for row in rows] for rows in pair
    }
    if files.judgments is not None:
        records = read_records(files.judgments)
        judges = sorted({judgment.judge for judgment in records.judgments})
        if len(judges) != 1:
            raise DataError(
                f"{files.judgments} must hold judgments of one judge, and holds {', '.join(judges) or 'none'}"
            )
        annotations = _annotations(records.judgments, files.combine or records.combine, *pair)
        contents |= {folder / slug(model) / slug(judges[0]) / name: rows for name, rows in annotations.items()}
    for path, rows in contents.items():
        _write(path, rows)
    return list(contents)


def _output(row: ModelOutput) -> dict[str, Any]:
    """A row for alpaca_eval, which joins models by the instruction and shows no `input`."""
    return {
        "instruction": with_input(row["instruction"], row["input"]),
        "output": row["output"],
        "generator": row["generator"],
        "dataset": row["dataset"],
        "datasplit": row["datasplit"],
        "item_id": row["item_id"],
        "reference": row["reference"],
    }


def _annotations(
    judgments: Sequence[Judgment], combine: Combine, rows: Sequence[ModelOutput], reference_rows: Sequence[ModelOutput]
) -> dict[str, list[dict[str, Any]]]:
    """The rows of each file of annotations, by its name."""
    ours, theirs = ({item_key(row): row for row in found} for found in (rows, reference_rows))
    verdicts: list[dict[str, Any]] = []
    by_order: dict[Order, list[dict[str, Any]]] = {order: [] for order in ORDERS}
    for key, orders in in_both_orders(judgments).items():
        if key not in ours:
            raise DataError(
                f"the judgments are about the item {'/'.join(key)}, which the answers lack; name those judged"
            )
        pair = {"model": ours[key], "reference": theirs[key]}
        found = outcome(orders.get("forward"), orders.get("reverse"), combine)
        verdicts.append(_row(pair, "reverse", judgments[0].judge) | {"preference": _VERDICTS[found]})
        for order, judgment in orders.items():
            said = {"preference": _preference(judgment), "raw_completion": judgment.reply}
            by_order[order].append(_row(pair, order, judgment.judge) | said)
    return {ANNOTATIONS_FILE: verdicts} | {f"annotations_{order}.json": shown for order, shown in by_order.items()}


def _row(pair: Mapping[str, ModelOutput], order: Order, judge: str) -> dict[str, Any]:
    first, second = ("model", "reference") if order == "forward" else ("reference", "model")
    return {
        "instruction": with_input(pair["model"]["instruction"], pair["model"]["input"]),
        "output_1": pair[first]["output"],
        "generator_1": pair[first]["generator"],
        "dataset": pair["model"]["dataset"],
        "item_id": pair["model"]["item_id"],
        "output_2": pair[second]["output"],
        "generator_2": pair[second]["generator"],
        "annotator": judge,
    }


def _preference(judgment: Judgment) -> float | None:
    """From 1 (the answer shown first) to 2; what an annotator said, otherwise which grade was higher."""
    if judgment.score_model is None or judgment.score_reference is None:
        return None
    first, second = judgment.score_model, judgment.score_reference
    if judgment.order == "reverse":
        first, second = second, first
    if judgment.judge.startswith(NAMES):
        return 1 + second
    return 1.5 if first == second else 2.0 if second > first else 1.0


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    # ASCII escapes: text from the web may hold half a surrogate pair
    content = (json.dumps(rows, indent=1, allow_nan=False) + "\n").encode("ascii")
    if path.exists():
        if path.read_bytes() != content:
            raise DataError(f"{path} is there with other content; name another folder with --to, or delete the file")
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = require_no_link(path.with_suffix(".part"))
    part.write_bytes(content)
    part.replace(path)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 0, or 2 with one line on stderr."""
    parser = argparse.ArgumentParser(prog="python -m gradsift.evaluation.export", description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a finished run")
    parser.add_argument("--to", required=True, type=Path, metavar="FOLDER", help="where the files are written")
    options = parser.parse_args(arguments)
    try:
        written = [path for run in options.runs for path in export(files_of_run(run), options.to)]
    except (GradsiftError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for path in dict.fromkeys(written):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
