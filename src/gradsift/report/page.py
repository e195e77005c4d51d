"""`report.html`, one self-contained page. Its figures and tables are also written as files, in folders beside it.

The page can be opened from disk and makes no network request. Its content security policy allows only one script and
one style sheet, which are files of this package and are identified by their hashes. Texts of the data cannot act as
HTML: they are either escaped, or stored as JSON in base64, and the script shows them as plain text.
"""

from __future__ import annotations

import base64
import hashlib
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from markupsafe import Markup, escape

from gradsift.names import require_no_link
from gradsift.pages import portable, presentable, templates
from gradsift.report.audit_tables import audit_tables, sweep_audit
from gradsift.report.browser import CUT, packed_pools, pools
from gradsift.report.figures import FIGURES, write_figures, write_tables
from gradsift.report.figures.style import Entry
from gradsift.report.headline import headline
from gradsift.report.inline_svg import inline_svg
from gradsift.report.judged import CUT as CUT_PAIR
from gradsift.report.judged import judged_pairs
from gradsift.report.material import BROKEN, Incomplete, Material, read
from gradsift.report.paper_tables import TABLES
from gradsift.report.run_tables import WORK_FILE, results_table, work_table
from gradsift.report.table import groups_of
from gradsift.run_folder import CONFIG_FILE, FIGURES_FOLDER, REPORT_FILE, RUN_FILE, TABLES_FOLDER, read_yaml

_WIDE = 450  # points; the page shows two figures of at most this width side by side


@dataclass
class Shown:
    """A figure on the page: its SVG, or the reason why it was not drawn."""

    entry: Entry
    svg: Markup | None = None
    reason: str | None = None
    is_wide: bool = False
    files: Sequence[str] = ()


def write_report(
    folder: Path,
    to: Path | None = None,
    *,
    formats: Iterable[str] = ("png", "svg"),
    artifacts: Path | None = None,
) -> Path:
    """Write the report of the run or sweep in `folder`: `report.html`, `figures/` and `tables/`.

    Args:
        to: the folder to write to; by default `folder`.
        formats: formats of the figures' files. SVG is always written, as the page contains it.
        artifacts: the store's folder, if the store has moved (see `material.read`).

    Returns:
        The path of the page.

    Raises:
        DataError: see `material.read`.
        Incomplete: errors prevented some parts of the page; the other parts are written.
    """
    material = read(folder, artifacts)
    to = folder if to is None else to
    wanted = list(dict.fromkeys([*formats, "svg"]))
    no_figure = write_figures(material, to / FIGURES_FOLDER, wanted)
    tables, no_table = write_tables(material, to / TABLES_FOLDER)
    judged, no_pairs = judged_pairs(material)
    values = {
        "figures": [_shown(entry, to, no_figure.get(entry.name), wanted) for entry in FIGURES],
        "tables": [(name, tables.get(name), no_table.get(name)) for name in TABLES],
        "work_file": WORK_FILE if (to / WORK_FILE).is_file() else None,
        "pools": packed_pools(pools(material)),
        "judged": judged,
        "no_pairs": no_pairs,
    }
    part = require_no_link(to / f".{REPORT_FILE}.part")
    part.write_text(render(material, values), encoding="utf-8")
    part.rename(to / REPORT_FILE)
    absent = [(f"figure {name}", reason) for name, reason in no_figure.items()]
    absent += [(f"table {name}", reason) for name, reason in no_table.items()]
    absent += [("sample of judged answers", reason) for reason in no_pairs]
    if broken := [f"the {what}, which {reason}" for what, reason in absent if reason.startswith(BROKEN)]:
        raise Incomplete(f"{to / REPORT_FILE} is written, but for {'; '.join(broken)}")
    return to / REPORT_FILE


def _shown(entry: Entry, to: Path, reason: str | None, formats: Iterable[str]) -> Shown:
    if reason is not None:
        return Shown(entry, reason=reason)
    files = [f"{FIGURES_FOLDER}/{entry.name}.{form}" for form in formats]
    if (to / TABLES_FOLDER / f"{entry.name}.csv").is_file():
        files.append(f"{TABLES_FOLDER}/{entry.name}.csv")
    text = (to / FIGURES_FOLDER / f"{entry.name}.svg").read_text(encoding="utf-8")
    width = float(text.partition('viewBox="0 0 ')[2].partition(" ")[0])  # points
    svg = inline_svg(text, entry.name, f"{entry.title}. {entry.caption}")
    return Shown(entry, svg, is_wide=width > _WIDE, files=files)


def render(material: Material, values: Mapping[str, Any]) -> str:
    """Return the page as HTML. `values` are further variables of the template, which the caller has computed."""
    style, script = (
        resources.files("gradsift.report").joinpath("templates", name).read_text(encoding="utf-8")
        for name in ("report.css", "report.js")
    )
    audit = sweep_audit([(run.folder / RUN_FILE, run.record) for run in material.runs])
    style_hash, script_hash = (
        base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii") for text in (style, script)
    )
    artifacts = [artifact for run in material.runs for group in run.artifacts.values() for artifact in group]
    manifest = artifacts[-1].manifest if artifacts else {}
    commit = {"commit": manifest["git_sha"]} if manifest.get("git_sha") else {}
    environment = templates("gradsift.report", "templates")
    environment.filters["clean"] = lambda text: presentable(portable(str(text)))
    environment.filters["breakable"] = lambda text: escape(text).replace("_", Markup("_<wbr>"))
    environment.globals |= {"groups_of": groups_of, "figures_of": figures_of}
    return environment.get_template("report.html").render(
        **values,
        style=Markup(style),  # noqa: S704 - a file of this package
        script=Markup(script),  # noqa: S704 - a file of this package
        style_hash=style_hash,
        script_hash=script_hash,
        head=headline(material),
        material=material,
        runs_table=results_table([run.record for run in material.finished]) if material.finished else None,
        audits=audit_tables(audit, brief=True) if audit else [],
        work=work_table([run.record for run in material.runs]),
        unfinished=[run for run in material.runs if run.status not in ("finished", "stopped")],
        cut=CUT,
        cut_pair=CUT_PAIR,
        repeat=_commands(material),
        versions=commit | (manifest.get("packages") or {}),
        config=_config(material),
    )


def figures_of(figures: Sequence[Shown], section: str) -> list[Shown]:
    """Return the figures of a section; those that were not drawn come last.

    If the number of narrow figures is odd, the last one is made wide, as it would be alone in its row.
    """
    own = [shown for shown in figures if shown.entry.section == section]
    narrow = [shown for shown in own if shown.svg is not None and not shown.is_wide]
    if len(narrow) % 2:
        narrow[-1].is_wide = True
    return sorted(own, key=lambda shown: shown.svg is None)


def _commands(material: Material) -> list[str]:
    """Return the commands that repeat the run or the sweep."""
    commands = [["python", "run.py", *(run.record.get("overrides") or [])] for run in material.runs]
    if not material.is_sweep:
        replay = ["python", "run.py", "--replay", str(material.folder)]
        is_replay = commands[0][2:] and commands[0][2].startswith("--replay")
        return [shlex.join(words) for words in ([replay] if is_replay else [commands[0], replay])]
    try:
        task = read_yaml(material.folder / "multirun.yaml")["hydra"]["overrides"]["task"]
        return [shlex.join(["python", "run.py", "-m", *task])]
    except (KeyError, TypeError):  # Hydra did not write the file, or it was changed
        return [shlex.join(words) for words in commands]


def _config(material: Material) -> str:
    """Return the config of the first run that has one, as YAML without the store's folder; "" if no run has one."""
    run = next((run for run in material.runs if run.config), None)
    if run is None:
        return ""
    values = {key: value for key, value in run.config.items() if key != "artifacts"}
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=100)
    return f"# {run.name}/{CONFIG_FILE}\n{text}"
