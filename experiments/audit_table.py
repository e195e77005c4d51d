"""Print the audits of a sweep as one table of means over the seeds.

    python -m experiments.audit_table SWEEP [OPTION ...]          such as proxy.members proxy.snapshots

SWEEP is the folder of a sweep that ran with `audit.enabled=true`. A row of the table has the means over the runs with
the same scorer and the same values of the options. Prints Markdown: the spoilt share of the selection for each alpha of
the audit, the effective number of families at the second alpha, and the AUROC of clean rows against spoilt rows and
against each kind of spoilt rows.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

FAMILIES_AT = 1  # index of the alpha for which families are counted


def audits_by_setting(sweep: Path, options: Sequence[str]) -> dict[tuple[str, ...], list[dict[str, Any]]]:
    """Return the audits of the sweep's runs by scorer and values of the options, without runs that have no audit."""
    audits: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for file in sorted(sweep.glob("*/audit.json"), key=lambda file: int(file.parent.name.split("-")[0])):
        run = json.loads(file.with_name("run.json").read_text(encoding="utf-8"))
        overrides = dict(override.split("=", 1) for override in run["overrides"])
        setting = (run["scorer"], *(overrides.get(option, "default") for option in options))
        audits.setdefault(setting, []).append(json.loads(file.read_text(encoding="utf-8")))
    return audits


def row_of(setting: Sequence[str], audits: Sequence[dict[str, Any]]) -> str:
    """Return a line of the Markdown table: means over the audits."""
    selections = [audit["selections"] for audit in audits]
    shares = [f"{fmean(each[place]['spoilt'] for each in selections):.3f}" for place in range(len(selections[0]))]
    families = fmean(each[FAMILIES_AT]["families"] for each in selections)
    kinds = [f"{fmean(audit['kinds'][kind]['auroc'] for audit in audits):.2f}" for kind in kinds_of(audits)]
    area = fmean(audit["auroc_spoilt"] for audit in audits)
    cells = [*setting, str(len(audits)), " / ".join(shares), f"{families:.1f}", f"{area:.3f}", *kinds]
    return f"| {' | '.join(cells)} |"


def kinds_of(audits: Sequence[dict[str, Any]]) -> list[str]:
    """Return the kinds of spoilt rows and copies that all audits have."""
    return [kind for kind in audits[0]["kinds"] if all(kind in audit["kinds"] for audit in audits)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", type=Path)
    parser.add_argument("options", nargs="*")
    given = parser.parse_args()
    audits = audits_by_setting(given.sweep, given.options)
    if not audits:
        raise SystemExit(f"{given.sweep} has no run with an audit; run the sweep with audit.enabled=true")
    first = next(iter(audits.values()))
    alphas = " / ".join(f"{selection['alpha']:.0%}" for selection in first[0]["selections"])
    titles = ["scorer", *given.options, "runs", f"spoilt at {alphas}", "families", "AUROC", *kinds_of(first)]
    print(f"| {' | '.join(titles)} |\n|{'---|' * len(titles)}")
    for setting, runs in audits.items():
        print(row_of(setting, runs))


if __name__ == "__main__":
    main()
