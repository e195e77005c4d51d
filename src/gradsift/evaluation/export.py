"""Write runs as alpaca_eval's own files: `python -m gradsift.evaluation.export RUN... --to FOLDER`.

    FOLDER/GENERATOR/model_outputs.json                 the answers of each model, including the reference
    FOLDER/GENERATOR/JUDGE/annotations.json             one row per item: the outcome of both orders together
    FOLDER/GENERATOR/JUDGE/annotations_forward.json     one order per file, the outputs in the order shown
    FOLDER/GENERATOR/JUDGE/annotations_reverse.json

In annotations.json output_2 is the model's answer, and `preference` is 2 for a win, 1 for a loss, 1.5 for a tie and
null for an invalid item. So alpaca_eval's `get_winrate` counts the same outcomes as PWS, and its win rate (in percent)
is 50 x PWS. In the files of one order, `preference` is the annotator's preference, between 1 and 2, if the judge is one
of alpaca_eval's annotators; for other judges it is 1, 1.5 or 2.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gradsift.errors import DataError, command
from gradsift.evaluation.generation import OUTPUTS_FILE, ModelOutput, item_key, read_pair, without_turns
from gradsift.evaluation.human.pairs import PairFiles, files_of_run
from gradsift.evaluation.judges import Combine, Order, with_input
from gradsift.evaluation.judges.alpaca_eval import NAMES
from gradsift.evaluation.judgments import ORDERS, Judgment
from gradsift.evaluation.pws import in_both_orders, outcome
from gradsift.evaluation.records import read_records
from gradsift.names import require_no_link, slug

ANNOTATIONS_FILE = "annotations.json"
_ORDER_FILES = {order: f"annotations_{order}.json" for order in ORDERS}
_PREFERENCES = {"win": 2.0, "tie": 1.5, "lose": 1.0, "invalid": None}


def export(files: PairFiles, folder: Path) -> list[Path]:
    """Write the answers of two models, and their judgments if there are any; return the paths of the files.

    Raises:
        DataError: the files of the run do not fit together, or a file to be written exists with other content.
    """
    pair = [without_turns(rows) for rows in read_pair(files.model, files.reference)]
    model, reference = (rows[0]["generator"] for rows in pair)
    remedy = "give the rows of one file another `generator`"
    if model == reference:
        raise DataError(
            f"{files.model} and {files.reference} are both by the generator {model!r}, so nobody could tell whose the "
            f"wins are; {remedy}"
        )
    if slug(model) == slug(reference):
        raise DataError(
            f"the generators {model!r} and {reference!r} would share the folder {slug(model)}, and one model's answers "
            f"would replace the other's; {remedy}"
        )
    contents: dict[Path, list[dict[str, Any]]] = {
        # alpaca_eval matches models' rows by instruction and does not show `input`
        folder / slug(name) / OUTPUTS_FILE: [
            {key: value for key, value in row.items() if key not in ("input", "after")}
            | {"instruction": with_input(row["instruction"], row["input"])}
            for row in rows
        ]
        for name, rows in zip((model, reference), pair, strict=True)
    }
    if files.judgments is not None:
        records = read_records(files.judgments)
        judges = sorted({judgment.judge for judgment in records.judgments})
        if len(judges) != 1:
            raise DataError(
                f"{files.judgments} must hold judgments of one judge, and holds {', '.join(judges) or 'none'}"
            )
        annotations = _annotations(records.judgments, records.combine, *pair)
        contents |= {folder / slug(model) / slug(judges[0]) / name: rows for name, rows in annotations.items()}
    for path, rows in contents.items():
        # ASCII escapes: text from the web may hold half a surrogate pair
        content = (json.dumps(rows, indent=1, allow_nan=False) + "\n").encode("ascii")
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            part = require_no_link(path.with_suffix(".part"))
            part.write_bytes(content)
            part.replace(path)
        elif path.read_bytes() != content:
            raise DataError(f"{path} is there with other content; name another folder with --to")
    return list(contents)


def _annotations(
    judgments: Sequence[Judgment], combine: Combine, rows: Sequence[ModelOutput], reference_rows: Sequence[ModelOutput]
) -> dict[str, list[dict[str, Any]]]:
    """Return the rows of each file of annotations, by the file's name."""
    of_model, of_reference = ({item_key(row): row for row in each} for each in (rows, reference_rows))
    by_file: dict[str, list[dict[str, Any]]] = {name: [] for name in (ANNOTATIONS_FILE, *_ORDER_FILES.values())}
    for key, orders in in_both_orders(judgments).items():
        if key not in of_model:
            raise DataError(
                f"the judgments are about the item {'/'.join(key)}, which the answers lack; name those judged"
            )
        pair = of_model[key], of_reference[key]
        result = outcome(orders.get("forward"), orders.get("reverse"), combine)
        row = _row(*pair, "reverse", judgments[0].judge)
        by_file[ANNOTATIONS_FILE].append({**row, "preference": _PREFERENCES[result]})
        for order, judgment in orders.items():
            reply = {"preference": _preference(judgment), "raw_completion": judgment.reply}
            by_file[_ORDER_FILES[order]].append({**_row(*pair, order, judgment.judge), **reply})
    return by_file


def _row(model: ModelOutput, reference: ModelOutput, order: Order, judge: str) -> dict[str, Any]:
    first, second = (model, reference) if order == "forward" else (reference, model)
    return {
        "instruction": with_input(model["instruction"], model["input"]),
        "output_1": first["output"],
        "generator_1": first["generator"],
        "dataset": model["dataset"],
        "item_id": model["item_id"],
        "output_2": second["output"],
        "generator_2": second["generator"],
        "annotator": judge,
    }


def _preference(judgment: Judgment) -> float | None:
    """Return a preference from 1 (the answer shown first is better) to 2 (the second is better); None if invalid."""
    if judgment.score_model is None or judgment.score_reference is None:
        return None
    first, second = judgment.score_model, judgment.score_reference
    if judgment.order == "reverse":
        first, second = second, first
    if judgment.judge.startswith(NAMES):
        return 1 + second
    return 1.5 if first == second else 2.0 if second > first else 1.0


@command
def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m gradsift.evaluation.export", description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a finished run")
    parser.add_argument("--to", required=True, type=Path, metavar="FOLDER", help="where the files are written")
    options = parser.parse_args(arguments)
    written = [path for run in options.runs for path in export(files_of_run(run), options.to)]
    print(*dict.fromkeys(written), sep="\n")


if __name__ == "__main__":
    sys.exit(main())
