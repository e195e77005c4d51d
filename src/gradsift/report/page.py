"""`report.html`: one page that holds everything it shows, and files of its figures and tables beside it.

The page opens from disk, asks no host for anything and runs one script of ours, which its content security policy
names by hash. Texts of the data reach it escaped, or as JSON and base64 that the script shows as text.
"""

from __future__ import annotations

import base64
import hashlib
import json
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from markupsafe import Markup, escape
from rich.table import Table

from gradsift.names import require_no_link
from gradsift.pages import portable, presentable, templates
from gradsift.report.audit_tables import audit_tables, sweep_audit
from gradsift.report.browser import CUT, MOST, Packed, pack, pools
from gradsift.report.figures import FIGURES, Entry, write_figures
from gradsift.report.figures.style import Format
from gradsift.report.headline import headline
from gradsift.report.inline_svg import inline_svg
from gradsift.report.material import BROKEN, CONFIG_FILE, RUN_FILE, Incomplete, Material, read
from gradsift.report.paper_tables import TABLES, write_tables
from gradsift.report.tables import pws_table
from gradsift.report.text_table import TextTable
from gradsift.report.work import WORK_FILE, work_by_stage, work_table
from gradsift.tracking import FIGURES_FOLDER, TABLES_FOLDER

REPORT_FILE = "report.html"


@dataclass(frozen=True)
class Shown:
    """A figure on the page: its picture, or the reason why there is none."""

    entry: Entry
    svg: Markup | None
    reason: str
    wide: bool
    files: list[str]


@dataclass(frozen=True)
class Section:
    """A part of the page, in reading order; its figures are those of modules of `figures/`."""

    id: str
    name: str  # in the navigation
    title: str
    lead: str
    modules: tuple[str, ...] = ()
    figures: Sequence[Shown] = ()


SECTIONS = (
    Section(
        "results",
        "Results",
        "What came out",
        "PWS is 1 + (wins - losses) / pairs against the model tuned on all rows: above 1, the selection trains the "
        "better model.",
        ("pws",),
    ),
    Section(
        "sensitivity",
        "Sensitivity",
        "Does the result hang on the settings?",
        "The size of the ensemble, its snapshots, eps and the seed are choices; a result that turns with them is none.",
        ("sensitivity",),
    ),
    Section(
        "convergence",
        "Convergence",
        "Does the target learn faster from a selection?",
        "The target's training loss at equal compute. A low training loss can also mean easy rows: read it beside the "
        "held-out loss and the PWS.",
        ("convergence",),
    ),
    Section(
        "selection",
        "Selection",
        "What is selected, and by what?",
        "How the scores spread, what stands behind them, and how far the methods agree.",
        ("scores", "selection"),
    ),
    Section(
        "audit",
        "Noise audit",
        "Does a score keep known corruption out?",
        "A method is of use on this data where the spoilt share of its selection lies below that of all rows by more "
        "than a random draw varies.",
        ("audit",),
    ),
    Section(
        "ensemble",
        "Ensemble",
        "Do the members of the ensemble differ?",
        "The variance in the score is one over members. Where they collapse into one, it says nothing.",
        ("ensemble",),
    ),
    Section(
        "judge",
        "Judge",
        "What did the judge say, and what moved it?",
        "Each pair was judged in both orders. A judge that follows the place or the length of an answer is a poor one.",
        ("judge",),
    ),
    Section(
        "cost",
        "Cost",
        "What did it cost?",
        "Time by stage, and what was found in the store and not computed again.",
        ("cost",),
    ),
)


def write_report(
    folder: Path,
    to: Path | None = None,
    *,
    formats: Iterable[Format] = ("png", "svg"),
    artifacts: Path | None = None,
) -> Path:
    """Write the report of a run's or a sweep's folder: the page, `figures/` and `tables/`.

    Args:
        to: the folder that it is written to; `folder` itself if empty.
        formats: of the figures' files; SVG is always written, as the page is made of it.
        artifacts: the store, where it is neither at the paths in `run.json` nor where the config says.

    Returns:
        The path of the page.

    Raises:
        DataError: there is no run in the folder, or a file of it is broken.
        Incomplete: the page is written, but some figure or table failed with an error and is absent.
    """
    material = read(folder, artifacts)
    to = folder if to is None else to
    wanted: dict[Format, None] = dict.fromkeys([*formats, "svg"])
    no_figure = write_figures(material, to / FIGURES_FOLDER, wanted)
    no_table = write_tables(material, to / TABLES_FOLDER)
    shown = [_shown(entry, to, no_figure.get(entry.name), wanted) for entry in FIGURES]
    packed, left_out = _packed(material)
    work_file = WORK_FILE if (to / WORK_FILE).is_file() else None
    page = render(material, shown, no_table, packed, left_out, work_file)
    part = require_no_link(to / f".{REPORT_FILE}.part")
    part.write_text(page, encoding="utf-8")
    part.rename(to / REPORT_FILE)
    if broken := broken_of(no_figure, no_table):
        raise Incomplete(f"{to / REPORT_FILE} is written, but for {'; '.join(broken)}")
    return to / REPORT_FILE


def broken_of(no_figure: Mapping[str, str], no_table: Mapping[str, str]) -> list[str]:
    """Of the figures and tables that are absent, those that failed with an error, and the error."""
    absent = [*(("figure", *one) for one in no_figure.items()), *(("table", *one) for one in no_table.items())]
    return [f"the {kind} {name}, which {reason}" for kind, name, reason in absent if reason.startswith(BROKEN)]


def _shown(entry: Entry, to: Path, reason: str | None, formats: Iterable[Format]) -> Shown:
    files = [f"{FIGURES_FOLDER}/{entry.name}.{form}" for form in formats]
    files += [path for path in [f"{TABLES_FOLDER}/{entry.name}.csv"] if (to / path).is_file()]
    if reason is not None:
        return Shown(entry, None, reason, False, [])
    text = (to / FIGURES_FOLDER / f"{entry.name}.svg").read_text(encoding="utf-8")
    label = f"{entry.title}. {entry.caption}"
    svg = inline_svg(text, entry.name, label)
    return Shown(entry, svg, "", _is_wide(text), files)


def _is_wide(svg: str) -> bool:
    """Whether a figure needs the page's whole width."""
    width = svg.partition('viewBox="0 0 ')[2].partition(" ")[0]  # points
    return float(width) > 450  # two narrower ones stand side by side


# ------------------------------------------------------------------------------------------- the page


def render(
    material: Material,
    figures: Sequence[Shown],
    no_table: Mapping[str, str],
    packed: Sequence[Packed],
    left_out: Sequence[str] = (),
    work_file: str | None = None,
) -> str:
    """The page as HTML.

    Args:
        no_table: reasons of the tables that could not be made.
        packed, left_out: pools of examples that the page holds, and the names of those that it does not.
        work_file: a sweep's table of work beside the page.
    """
    style, script = (_source(name) for name in ("report.css", "report.js"))
    values = {
        "style": Markup(style),  # noqa: S704 - our own file
        "script": Markup(script),  # noqa: S704 - our own file
        "policy": _policy(style, script),
        "head": headline(material),
        "material": material,
        "sections": sections_of(figures),
        "tables": [(name, *_table(make, material, no_table.get(name))) for name, make in TABLES.items()],
        "runs_table": _runs_table(material),
        "audits": _audits(material),
        "work": _as_text(work_table(work_by_stage([run.record for run in material.runs]))),
        "work_file": work_file,
        "unfinished": [run for run in material.runs if run.status not in ("finished", "stopped")],
        "gaps": material.gaps,
        "pools": packed,
        "left_out": left_out,
        "cut": CUT,
        "megabytes": sum(len(one.data) for one in packed) / 1e6,
        "repeat": repeat(material),
        "versions": versions(material),
        "config": _config(material),
        "folder": material.folder.name,
    }
    environment = templates("gradsift.report", "templates")
    environment.filters["clean"] = lambda text: presentable(portable(str(text)))
    environment.filters["breakable"] = lambda text: escape(text).replace("_", Markup("_<wbr>"))
    environment.globals |= {"groups_of": groups_of, "words_of": words_of}
    return environment.get_template("report.html").render(values)


@dataclass(frozen=True)
class Group:
    """Neighbouring columns of a table, named `ALPHA: METHOD`, that share their alpha."""

    title: str
    names: list[str]


def groups_of(header: Sequence[str]) -> list[Group]:
    """The groups of all columns but the first; empty where these are named otherwise, or none shares its alpha."""
    pairs = [name.partition(": ") for name in header[1:]]
    groups: list[Group] = []
    for title, _, name in pairs:
        if not groups or groups[-1].title != f"alpha {title}":
            groups.append(Group(f"alpha {title}", []))
        groups[-1].names.append(name)
    return groups if all(colon for _, colon, _ in pairs) and len(groups) < len(pairs) else []


def words_of(table: TextTable) -> set[int]:
    """Places of the columns that hold words and no figure: these stand at the left."""
    columns = enumerate(zip(*table.rows, strict=True))
    return {place for place, cells in columns if any(map(_is_word, cells)) and not any(map(_is_figure, cells))}


def _is_word(cell: str) -> bool:
    return cell[:1].isalpha() or cell.startswith("(")


def _is_figure(cell: str) -> bool:
    return cell.lstrip("+-")[:1].isdigit()


def sections_of(figures: Sequence[Shown]) -> list[Section]:
    """The sections with their figures; those of a module without a section stand in the last one."""
    by_module: dict[str, list[Shown]] = {}
    for shown in sorted(figures, key=lambda shown: shown.svg is None):  # those that are there first
        by_module.setdefault(shown.entry.draw.__module__.rpartition(".")[2], []).append(shown)
    found = [
        replace(section, figures=_laid_out([shown for name in section.modules for shown in by_module.pop(name, [])]))
        for section in SECTIONS
    ]
    rest = [shown for group in by_module.values() for shown in group]
    return [*found, Section("more", "More", "More figures", "", figures=_laid_out(rest))] if rest else found


def _laid_out(figures: list[Shown]) -> list[Shown]:
    """The figures, the last narrow one made wide where it would stand alone in its row."""
    narrow = [place for place, shown in enumerate(figures) if shown.svg is not None and not shown.wide]
    if len(narrow) % 2:
        figures[narrow[-1]] = replace(figures[narrow[-1]], wide=True)
    return figures


def _source(name: str) -> str:
    return resources.files("gradsift.report").joinpath("templates", name).read_text(encoding="utf-8")


def _policy(style: str, script: str) -> str:
    """A content security policy that lets these two in, pictures inside figures, and nothing else."""
    style_hash, script_hash = (
        base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii") for text in (style, script)
    )
    return (
        f"default-src 'none'; style-src 'sha256-{style_hash}'; script-src 'sha256-{script_hash}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def _packed(material: Material) -> tuple[list[Packed], list[str]]:
    """The pools that fit into one page, and the names of the others."""
    found: list[Packed] = []
    left_out: list[str] = []
    room = MOST
    for pool in pools(material):
        if found and len(pool.examples) > room:
            left_out.append(pool.name)
            continue
        found.append(pack(pool))
        room -= found[-1].rows
    return found, left_out


def _table(
    make: Callable[[Material], TextTable], material: Material, reason: str | None
) -> tuple[TextTable | None, str]:
    return (make(material), "") if reason is None else (None, reason)


def _runs_table(material: Material) -> TextTable | None:
    """The table that the terminal shows."""
    return _as_text(pws_table([run.record for run in material.finished])) if material.finished else None


def _as_text(table: Table) -> TextTable:
    columns = [[str(cell) for cell in column.cells] for column in table.columns]
    header = [str(column.header) for column in table.columns]
    return TextTable(str(table.title), header, [list(row) for row in zip(*columns, strict=True)])


def _audits(material: Material) -> list[TextTable]:
    audit = sweep_audit([(run.folder / RUN_FILE, run.record) for run in material.runs])
    return audit_tables(audit, brief=True) if audit else []


# ------------------------------------------------------------------------------------- how to repeat it


def repeat(material: Material) -> list[str]:
    """Commands that do it again."""
    if not material.is_sweep:
        overrides = material.runs[0].record.get("overrides") or []
        return [_command(overrides), f"python run.py --replay {shlex.quote(str(material.folder))}"]
    overrides = _sweep_overrides(material.folder)
    if overrides is not None:
        return [_command(["-m", *overrides])]
    return [_command(run.record.get("overrides") or []) for run in material.runs]


def _command(words: Sequence[str]) -> str:
    if words and str(words[0]).startswith("--replay"):
        return f"python run.py {words[0]}"
    return shlex.join(["python", "run.py", *map(str, words)])


def _sweep_overrides(folder: Path) -> list[str] | None:
    """What Hydra was given; None where it left no file, or another one."""
    try:
        found = yaml.safe_load((folder / "multirun.yaml").read_text(encoding="utf-8"))
        return [str(override) for override in found["hydra"]["overrides"]["task"]]
    except (OSError, yaml.YAMLError, KeyError, TypeError):
        return None


def versions(material: Material) -> list[tuple[str, str]]:
    """Commit and packages that made the last artifact of the last run that has one."""
    for run in reversed(material.runs):
        for made in reversed([artifact for found in run.artifacts.values() for artifact in found]):
            packages = made.manifest.get("packages") or {}
            found = [("commit", str(made.manifest.get("git_sha")))] if made.manifest.get("git_sha") else []
            return [*found, *((name, str(version)) for name, version in packages.items())]
    return []


def _config(material: Material) -> str:
    """`config.yaml` of the first run that has one, without the folder of the store."""
    for run in material.runs:
        if run.config:
            values: dict[str, Any] = {key: value for key, value in run.config.items() if key != "artifacts"}
            text = yaml.safe_dump(json.loads(json.dumps(values)), sort_keys=False, allow_unicode=True, width=100)
            return f"# {run.name}/{CONFIG_FILE}\n{text}"
    return ""
