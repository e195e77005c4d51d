"""Diagnostics, which detect known failures of GRADFILTERING (arXiv 2601.13697) and change no result.

The checks are in `gradients/ensemble_checks.py`, `selection/checks.py` and `report/notes.py`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from gradsift.errors import GradsiftError

DIAGNOSTICS_FILE = "diagnostics.json"


@dataclass(frozen=True)
class Diagnostic:
    """One diagnostic of a run."""

    name: str
    verdict: Literal["ok", "warning", "unknown"]  # unknown: the value is not defined
    values: Mapping[str, float | None]  # the value that the verdict is about comes first; None if not defined
    message: str  # what was observed and, for a warning, what to check

    @classmethod
    def judged(cls, name: str, bad: bool, values: Mapping[str, float | None], observed: str, check: str) -> Diagnostic:
        """Return a diagnostic with the verdict `warning` if `bad`, otherwise `ok`.

        The message says what was `observed` and, if `bad`, what to `check`.
        """
        return cls(name, "warning", values, f"{observed}; check {check}") if bad else cls(name, "ok", values, observed)

    @classmethod
    def unknown(cls, name: str, value: str, reason: str) -> Diagnostic:
        """Return a diagnostic with the verdict `unknown`; `value` names what is not defined, and `reason` says why."""
        return cls(name, "unknown", {value: None}, reason)


def write_diagnostics(folder: Path, diagnostics: Sequence[Diagnostic]) -> None:
    """Write `diagnostics.json`.

    Raises:
        GradsiftError: two diagnostics have the same name.
        ValueError: a value is NaN or infinite.
    """
    counts = Counter(diagnostic.name for diagnostic in diagnostics)
    if repeated := ", ".join(name for name, count in counts.items() if count > 1):
        raise GradsiftError(f"two diagnostics are named {repeated}; give the scorer's or selector's own another name")
    content = {
        each.name: {"verdict": each.verdict, "values": dict(each.values), "message": each.message}
        for each in diagnostics
    }
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    (folder / DIAGNOSTICS_FILE).write_text(text, encoding="utf-8")


def read_diagnostics(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the verdict, values and message of each diagnostic, by name, as `write_diagnostics` wrote them."""
    content: dict[str, dict[str, Any]] = json.loads((folder / DIAGNOSTICS_FILE).read_text(encoding="utf-8"))
    return content
