"""The type `Diagnostic`, and the file `diagnostics.json` in the folder of an artifact or of a sweep.

Diagnostics detect the failure signatures of GRADFILTERING (arXiv 2601.13697) and change no result. Diagnostics of the
ensemble are in `gradients/ensemble_checks.py`, diagnostics of the selection in `selection/checks.py`, and the
comparison with random selection, which needs several runs, in `report/notes.py`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from gradsift.errors import GradsiftError

DIAGNOSTICS_FILE = "diagnostics.json"

Verdict = Literal["ok", "warning", "unknown"]  # unknown: the value is not defined


@dataclass(frozen=True)
class Diagnostic:
    """One diagnostic of a run."""

    name: str
    verdict: Verdict
    values: Mapping[str, float | None]  # the value that the verdict is about comes first; None if not defined
    message: str  # what was observed and, for a warning, what to check

    @classmethod
    def judged(cls, name: str, bad: bool, values: Mapping[str, float | None], observed: str, check: str) -> Diagnostic:
        """Return a diagnostic: if `bad`, a `warning` whose message also says what to `check`; otherwise `ok`."""
        return cls(name, "warning", values, f"{observed}; check {check}") if bad else cls(name, "ok", values, observed)

    @classmethod
    def unknown(cls, name: str, value: str, reason: str) -> Diagnostic:
        """Return a diagnostic with the verdict `unknown`, because `value` is not defined for this run."""
        return cls(name, "unknown", {value: None}, reason)

    def as_json(self) -> dict[str, Any]:
        return {"verdict": self.verdict, "values": dict(self.values), "message": self.message}


def write_diagnostics(folder: Path, diagnostics: Sequence[Diagnostic]) -> None:
    """Write the verdict, values and message of each diagnostic, by name, to `diagnostics.json`.

    Raises:
        GradsiftError: two diagnostics have the same name.
        ValueError: a value is not a finite number.
    """
    content = {diagnostic.name: diagnostic.as_json() for diagnostic in diagnostics}
    if len(content) < len(diagnostics):
        names = [diagnostic.name for diagnostic in diagnostics]
        twice = ", ".join(name for name in content if names.count(name) > 1)
        raise GradsiftError(f"two diagnostics are named {twice}; give the scorer's or selector's own another name")
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    (folder / DIAGNOSTICS_FILE).write_text(text, encoding="utf-8")


def read_diagnostics(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the verdict, values and message of each diagnostic, by name, as `write_diagnostics` wrote them."""
    content: dict[str, dict[str, Any]] = json.loads((folder / DIAGNOSTICS_FILE).read_text(encoding="utf-8"))
    return content
