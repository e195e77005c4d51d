"""What a diagnostic is, and its file `diagnostics.json` beside what it speaks of.

The diagnostics answer the failure signatures of GRADFILTERING (arXiv 2601.13697). Those of the ensemble
stand in `gradients/diagnostics.py`, those of the selection in `selection/checks.py`, and the
comparison with random selection, which needs several runs, in `report/notes.py`. They judge and change nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from gradsift.errors import GradsiftError

DIAGNOSTICS_FILE = "diagnostics.json"

Verdict = Literal["ok", "warning", "unknown"]  # unknown: there is nothing to judge by


@dataclass(frozen=True)
class Diagnostic:
    """One finding."""

    name: str
    verdict: Verdict
    values: Mapping[str, float | None]  # the one that is judged first; None where it is not defined
    message: str  # what was seen and, of a warning, what to check

    @classmethod
    def judged(cls, name: str, bad: bool, values: Mapping[str, float | None], seen: str, check: str) -> Diagnostic:
        """A warning with what to check if `bad`, else what was seen."""
        return cls(name, "warning", values, f"{seen}; check {check}") if bad else cls(name, "ok", values, seen)

    @classmethod
    def unknown(cls, name: str, value: str, reason: str) -> Diagnostic:
        """No verdict: the value is not defined here, and nothing stands in for it."""
        return cls(name, "unknown", {value: None}, reason)

    def as_json(self) -> dict[str, Any]:
        return {"verdict": self.verdict, "values": dict(self.values), "message": self.message}


def write_diagnostics(folder: Path, diagnostics: Sequence[Diagnostic]) -> None:
    """Write verdict, values and message by name; a value that is no finite number is an error.

    Raises:
        GradsiftError: two have one name, so that one of them would be lost.
    """
    content = {diagnostic.name: diagnostic.as_json() for diagnostic in diagnostics}
    if len(content) < len(diagnostics):
        names = [diagnostic.name for diagnostic in diagnostics]
        twice = ", ".join(name for name in content if names.count(name) > 1)
        raise GradsiftError(f"two diagnostics are named {twice}; a scorer or selector gives its own names of their own")
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    (folder / DIAGNOSTICS_FILE).write_text(text, encoding="utf-8")


def read_diagnostics(folder: Path) -> dict[str, dict[str, Any]]:
    """What `write_diagnostics` wrote."""
    content: dict[str, dict[str, Any]] = json.loads((folder / DIAGNOSTICS_FILE).read_text(encoding="utf-8"))
    return content
