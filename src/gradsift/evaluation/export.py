"""Write the answers and judgments of runs in alpaca_eval's format.

    python -m gradsift.evaluation.export RUN... --to FOLDER

    FOLDER/GENERATOR/model_outputs.json        one file for the model, one for the reference model
    FOLDER/GENERATOR/JUDGE/annotations.json    one row per item: the outcome of both orders together

In annotations.json, `output_2` is the model's answer, and `preference` is 2 for a win, 1 for a loss, 1.5 for a tie and
null for an invalid item. So alpaca_eval's `get_winrate` counts the same outcomes as the PWS does, and the win rate (in
percent) is 50 x PWS.
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
from gradsift.evaluation.judges import with_input
from gradsift.evaluation.pws import Outcomes, outcomes_of
from gradsift.evaluation.records import read_records
from gradsift.names import require_no_link, slug

_PREFERENCES = {"win": 2.0, "tie": 1.5, "lose": 1.0, "invalid": None}


def export(files: PairFiles, folder: Path) -> list[Path]:
    """Write the answers of two models, and the judgments if there are any, below `folder`; return the files' paths.

    Raises:
        DataError: the models did not answer the same items or have equal names, the judgments are not by one judge, or
            a file to be written exists with different content.
    """
    pair = [without_turns(rows) for rows in read_pair(files.model, files.reference)]
    model, reference = (rows[0]["generator"] for rows in pair)
    if slug(model) == slug(reference):
        raise DataError(
            f"the generators {model!r} ({files.model}) and {reference!r} ({files.reference}) would share the folder "
            f"{slug(model)}; give the rows of one file another `generator`"
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
                f"{files.judgments} must have judgments of one judge, but has those of {', '.join(judges) or 'none'}"
            )
        annotations = _annotations(outcomes_of(records.judgments, records.combine), judges[0], *pair)
        contents[folder / slug(model) / slug(judges[0]) / "annotations.json"] = annotations
    for path, rows in contents.items():
        # ASCII escapes: texts from the web can contain lone surrogates
        content = (json.dumps(rows, indent=1, allow_nan=False) + "\n").encode("ascii")
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            part = require_no_link(path.with_suffix(".part"))
            part.write_bytes(content)
            part.replace(path)
        elif path.read_bytes() != content:
            raise DataError(f"{path} exists with different content; name another folder with --to")
    return list(contents)


def _annotations(
    outcomes: Outcomes, judge: str, rows: Sequence[ModelOutput], reference_rows: Sequence[ModelOutput]
) -> list[dict[str, Any]]:
    of_model, of_reference = ({item_key(row): row for row in each} for each in (rows, reference_rows))
    annotations = []
    for key, outcome in outcomes.items():
        if key not in of_model:
            raise DataError(f"item {'/'.join(key)} has judgments but no answers; give the files of the judged answers")
        model, reference = of_model[key], of_reference[key]
        annotations.append(
            {
                "instruction": with_input(model["instruction"], model["input"]),
                "output_1": reference["output"],
                "generator_1": reference["generator"],
                "dataset": model["dataset"],
                "item_id": model["item_id"],
                "output_2": model["output"],
                "generator_2": model["generator"],
                "annotator": judge,
                "preference": _PREFERENCES[outcome],
            }
        )
    return annotations


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
