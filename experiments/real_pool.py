"""Write a pool of real rows, some of which are known to be bad because human cleaners edited or removed them.

    python -m experiments.real_pool FILE.jsonl [--rows 1200] [--untouched] [--seed 0]        needs GRADSIFT_DATA

Writes `--rows` random rows of alpaca_5000.json, and all bad rows of alpaca_cleaning_diff.jsonl as they were before
cleaning. The column `cleaning` has the cleaners' label of a bad row and is empty for all other rows; no scorer reads
it. Bad rows with an empty answer are omitted, because loading would reject them. With --untouched, writes `--rows`
random rows of alpaca_cleaned_51k.json.gz instead, whose prompts are neither in alpaca_5000.json nor in a bad row. The
last form of the contrast was chosen on the draw of `--seed 1`; the other draws are test sets.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
from pathlib import Path

BAD = ("output_edited", "removed_or_rewritten", "input_and_output_edited")
PARTS = ("instruction", "input", "output")


def bad_rows(folder: Path) -> list[dict[str, str]]:
    """Return the bad rows as they were before the cleaners edited their answers or removed them."""
    changes = [json.loads(line) for line in (folder / "alpaca_cleaning_diff.jsonl").read_text().splitlines()]
    return [
        {part: change["original"][part] for part in PARTS} | {"cleaning": change["label"]}
        for change in changes
        if change["label"] in BAD and change["original"]["output"].strip()
    ]


def pool(folder: Path, count: int, seed: int = 0) -> list[dict[str, str]]:
    """Return `count` random Alpaca rows that are not among the bad rows, and all bad rows, in random order."""
    bad = bad_rows(folder)
    known = {tuple(row[part] for part in PARTS) for row in bad}
    rows = json.loads((folder / "alpaca_5000.json").read_text())
    plain = [
        {part: row[part] for part in PARTS} | {"cleaning": ""}
        for row in rows
        if tuple(row[part] for part in PARTS) not in known
    ]
    draw = random.Random(seed)
    mixed = draw.sample(plain, count) + bad
    draw.shuffle(mixed)
    return mixed


def untouched(folder: Path, count: int, seed: int = 0) -> list[dict[str, str]]:
    """Return `count` random rows of the cleaned file whose prompts are neither in alpaca_5000.json nor in a bad row."""
    used = [*json.loads((folder / "alpaca_5000.json").read_text()), *bad_rows(folder)]
    known = {(row["instruction"], row["input"]) for row in used}
    with gzip.open(folder / "alpaca_cleaned_51k.json.gz", "rt", encoding="utf-8") as stream:
        others = [row for row in json.load(stream) if (row["instruction"], row["input"]) not in known]
    return [{part: row[part] for part in PARTS} | {"cleaning": ""} for row in random.Random(seed).sample(others, count)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--rows", type=int, default=1200)
    parser.add_argument("--untouched", action="store_true")
    parser.add_argument("--seed", type=int, default=0, help="seed of the draw (default 0)")
    arguments = parser.parse_args()
    draw = untouched if arguments.untouched else pool
    rows = draw(Path(os.environ["GRADSIFT_DATA"]) / "instruct", arguments.rows, arguments.seed)
    arguments.file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    print(f"{len(rows)} rows, {sum(bool(row['cleaning']) for row in rows)} of them bad: {arguments.file}")


if __name__ == "__main__":
    main()
