"""Training curves: `curve.jsonl`, one line a batch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

CURVE_FILE = "curve.jsonl"


def write_curve(folder: Path, curve: Sequence[Mapping[str, float]]) -> None:
    """Write the mean loss (nats a token) and the number of tokens of each batch."""
    lines = (json.dumps({"batch": index, **entry}) + "\n" for index, entry in enumerate(curve))
    (folder / CURVE_FILE).write_text("".join(lines), encoding="utf-8")


def read_curve(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / CURVE_FILE).read_text(encoding="utf-8").splitlines()]
