"""Laws of the documentation: its commands are accepted, and the targets of its links exist."""

from __future__ import annotations

import importlib
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep

from gradsift.composition import conf_folder, in_full, register_schemas
from gradsift.config import SCHEMAS, Config, load_config
from gradsift.sweep import begin

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
OWN = "steady"  # a tutorial's scorer of the reader's own: test_user_scorers.py runs it
EXPERIMENTS = sorted(path.stem for path in (conf_folder() / "experiment").glob("*.yaml"))


def commands_of(text: str) -> list[list[str]]:
    """Return the overrides of each complete `python run.py` command; text after two spaces is a remark."""
    written = re.findall(r"(?:^ {4,}|^\$ |`)python run\.py ([^`\n]+)", text, re.M)
    lines = [line.split("  ")[0].strip() for line in written]
    lines = [
        line.replace("[smoke,NAME]", "[smoke,gradfiltering_eps]").replace("NAME", "gradfiltering") for line in lines
    ]
    whole = dict.fromkeys(line for line in lines if "..." not in line and not line.startswith("--"))
    return [[word for word in shlex.split(line) if word != "-m"] for line in whole]


BARE = {("experiment=" + name,) for name in EXPERIMENTS}  # test_config.py composes these
WRITTEN = dict.fromkeys(tuple(command) for page in PAGES for command in commands_of(page.read_text()))
COMMANDS = [
    pytest.param(list(command), id=" ".join(command))
    for command in WRITTEN
    if command not in BARE and OWN not in " ".join(command)
]


def _first(overrides: list[str]) -> list[str]:
    """Return the overrides, with only the first value of those that list several."""
    values = []
    for override in OverridesParser.create().parse_overrides(overrides):
        value = override.value()
        if isinstance(value, IntervalSweep):
            first = str(value.start)
        elif override.is_sweep_override():
            first = next(override.sweep_string_iterator())
        else:
            first = override.get_value_element_as_str()
        values.append(f"{override.get_key_element()}={first}")
    return values


@pytest.fixture(autouse=True)
def composing(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("GRADSIFT_DATA", "somewhere")
    register_schemas()
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        yield


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_docs_is_accepted(command: list[str]) -> None:
    load_config(compose("config", overrides=in_full(_first(command))))


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_job_of_an_experiment_is_accepted(name: str) -> None:
    composed = compose("config", overrides=[f"experiment={name}"], return_hydra_config=True)
    composed.hydra.job.config_name = "config"
    assert begin(composed).folder


def test_every_choice_has_its_place_in_the_page_on_methods() -> None:
    text = (ROOT / "docs" / "methods.md").read_text()
    groups = ("method", "scorer", "selector", "target_set", "features", "embedder")
    choices = [path.stem for group in groups for path in (conf_folder() / group).glob("*.yaml")]
    assert [choice for choice in choices if not re.search(rf"\b{choice}\b", text)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if link.startswith("http"):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in _anchors(target.read_text()), link


def test_the_readme_is_short_and_no_page_is_missing_from_the_site() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
    nav = (ROOT / "mkdocs.yml").read_text()
    pages = [page.relative_to(ROOT / "docs").as_posix() for page in PAGES if page.is_relative_to(ROOT / "docs")]
    assert [page for page in pages if f": {page}\n" not in nav] == []


def test_the_tree_in_the_docs_names_every_module_and_every_file_that_it_points_to_is_there() -> None:
    text = (ROOT / "docs" / "reference" / "internals.md").read_text()
    package = ROOT / "src" / "gradsift"
    modules = [path.name for path in package.glob("*.py") if path.name != "__init__.py"]
    folders = [f"{path.parent.name}/" for path in package.glob("*/__init__.py")]
    assert [name for name in modules + folders if name not in text] == []
    assert [path for path in re.findall(r"`((?:src|conf)/[\w./]+)", text) if not (ROOT / path).exists()] == []


def test_every_option_says_what_it_means(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "docs")
    tables = importlib.import_module("option_tables")
    schemas = [("", Config), *((f"{group}.", schema) for group in SCHEMAS for schema in SCHEMAS[group].values())]
    rows = [row for prefix, schema in schemas for row in tables.options_of(prefix, schema)]
    assert {option for option, _, _, meaning, _ in rows if not meaning} == set()
    page = tables.options_page()
    assert "| `proxy.members` | `int` | `5` | number of members, M in the paper | at least 1 |" in page
    assert "| `data.path` | `Any` | required |" in page
    # the warm-up's own default, not the class's
    assert "| `features.warmup.lora.rank` | `int` | `128` | rank of A and B | at least 1 |" in page
    files = [path for group in SCHEMAS for path in (conf_folder() / group).glob("*.yaml") if path.stem != "catalog"]
    described = [path.stem for path in files if path.parent.name == "benchmark" or "/schema/" in path.read_text()]
    assert [choice for choice in described if f"={choice}" not in page] == []


def test_the_citation_and_the_package_name_the_same_version_and_licence() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert (cited["title"], cited["version"], cited["license"]) == tuple(
        project[name] for name in ("name", "version", "license")
    )


def _anchors(text: str) -> set[str]:
    """Return the anchors that GitHub makes from headings."""
    headings = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
