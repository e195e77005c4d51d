"""Laws of names: they stay in their folder, writes follow no link, and no cell of a CSV is a formula."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_config import composed

from gradsift.artifacts import Store
from gradsift.config import SCHEMAS, Config
from gradsift.data.download import _file_name
from gradsift.errors import ConfigError, GradsiftError
from gradsift.manifests import UNFINISHED
from gradsift.names import LONGEST_NAME, LONGEST_SLUG, require_name, require_no_link, slug, slug_of_path
from gradsift.report.table import write_records

NAMED = [
    group
    for group, variants in SCHEMAS.items()
    if group != "tracker" and all("name" in schema.__dataclass_fields__ for schema in variants.values())
]


def test_the_name_of_every_group_is_checked() -> None:
    models = {"proxy", "embedder", "features", "target", "generator", "judge"}
    assert set(NAMED) == models | {"data", "target_set", "scorer", "selector"}


@pytest.fixture(scope="module")
def config() -> Config:
    return composed()


@pytest.mark.parametrize("group", NAMED)
def test_a_name_that_leads_out_of_the_store_is_refused(group: str, config: Config) -> None:
    with pytest.raises(ConfigError, match=rf"{group}\.name='\.\./\.\./x' cannot name a folder.* give one like x"):
        replace(config, **{group: replace(getattr(config, group), name="../../x")})


def test_the_name_of_a_users_scorer_is_checked(config: Config) -> None:
    with pytest.raises(ConfigError, match=r"scorer\.name='/tmp/x' cannot name a folder"):
        replace(config, scorer={"_target_": "mine.score", "name": "/tmp/x"})


def test_the_name_of_a_benchmark_set_is_checked(config: Config) -> None:
    catalog = {"../x": {"path": "a.json", "instruction": "q"}}
    with pytest.raises(ConfigError, match=r"benchmark\.catalog='\.\./x' cannot name a folder"):
        replace(config, benchmark=replace(config.benchmark, catalog=catalog))


def test_a_sweep_with_such_a_name_writes_nothing(gradsift: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert gradsift("-m", "scorer.name=../../../x,gsnr", "seed=0") == 2
    assert "scorer.name='../../../x' cannot name a folder" in capsys.readouterr().err
    assert not Path("multirun").exists()


@pytest.mark.parametrize(
    "name", ["", ".", "..", ".hidden", "-x", "a/b", "a\\b", "a b", "é", "x\n", "x\0", "x" * (LONGEST_NAME + 1)]
)
def test_a_name_is_of_few_characters(name: str) -> None:
    with pytest.raises(ConfigError, match="cannot name a folder"):
        require_name("data.name", name)
    safe = slug(name)
    require_name("data.name", safe[:LONGEST_NAME])  # what the message proposes is taken


@pytest.mark.parametrize("name", ["gsnr", "a-b.c_D9", "_x", "9", "x" * LONGEST_NAME])
def test_valid_names_are_unchanged(name: str) -> None:
    require_name("data.name", name)
    assert slug(name) == name


@pytest.mark.parametrize(
    ("path", "safe"),
    [
        ("meta-llama/Llama-3.1-8B", "llama-3.1-8b"),
        ("/models/My Model/", "my_model"),
        ("..", "unnamed"),
        ("a/..", "unnamed"),
        ("C:\\models\\x", "c_models_x"),
        ("", "unnamed"),
    ],
)
def test_a_models_path_becomes_one_part_of_a_path(path: str, safe: str) -> None:
    assert slug_of_path(path) == safe


def test_a_slug_cannot_leave_the_store(tmp_path: Path) -> None:
    root = tmp_path / "store"
    _, path = Store(root).place("score", "../../../x", {}, [], 1)
    assert path.parent == root / "score" and path.resolve().is_relative_to(root.resolve())
    assert len(Store(root).place("score", "y" * 1000, {}, [], 1)[1].name) < LONGEST_SLUG + 20


def test_a_downloaded_file_has_a_safe_name() -> None:
    for url in ("https://x.y/%2e%2e%2f%2e%2e%2fetc", "https://x.y/..", "https://x.y/a%00b", "https://x.y/"):
        name = _file_name(url)
        assert "/" not in name and "\0" not in name and name[8] == "-"


def _make(folder: Path) -> dict[str, Any]:
    (folder / "result.txt").write_text("work")
    return {"rows": 1}


def _obtain(root: Path) -> Any:
    store = Store(root, lambda line: None)
    return store.obtain("stage", "slug", {}, [], _make, version=1)


@pytest.mark.parametrize("place", ["part", "unfinished", "file", "lock"])
def test_work_is_not_written_through_a_link(tmp_path: Path, place: str) -> None:
    root, outside = tmp_path / "store", tmp_path / "outside"
    outside.mkdir()
    (outside / "theirs.txt").write_text("theirs")
    _, path = Store(root).place("stage", "slug", {}, [], 1)
    part = path.with_name(f"{path.name}.part")
    path.parent.mkdir(parents=True)
    if place in ("unfinished", "file"):
        part.mkdir()
    link, to = {
        "part": (part, outside),
        "unfinished": (part / UNFINISHED, outside),
        "file": (part / "result.txt", outside / "theirs.txt"),
        "lock": (path.parent / f".{path.name}.lock", outside / "theirs.txt"),
    }[place]
    link.symlink_to(to)
    with pytest.raises(GradsiftError, match="is a link, and gradsift does not write through links; remove it"):
        _obtain(root)
    assert [file.name for file in outside.iterdir()] == ["theirs.txt"]
    assert (outside / "theirs.txt").read_text() == "theirs"
    link.unlink()
    assert _obtain(root).file("result.txt").read_text() == "work"


def test_work_is_not_written_through_a_broken_link(tmp_path: Path) -> None:
    (tmp_path / "x.part").symlink_to(tmp_path / "nowhere")
    with pytest.raises(GradsiftError, match=r"x\.part is a link"):
        require_no_link(tmp_path / "x.part")


def test_no_text_in_a_csv_is_a_formula_and_numbers_stay_numbers(tmp_path: Path) -> None:
    texts = ["=1+1", "+1", "-1", "@x", "\tx", "\rx", "plain", "a=b", ""]
    numbers = [-0.5, 1, None, True]
    write_records(tmp_path / "x.csv", [{"=name": text, "number": -0.5} for text in texts] + [{"n": n} for n in numbers])
    with (tmp_path / "x.csv").open(newline="") as stream:
        header, *rows = csv.reader(stream)
    assert header == ["'=name", "number", "n"]
    shown = ["'=1+1", "'+1", "'-1", "'@x", "'\tx", "'\rx", "plain", "a=b", ""]
    assert [row[:2] for row in rows[: len(texts)]] == [[text, "-0.5"] for text in shown]
    assert [row[2] for row in rows[len(texts) :]] == ["-0.5", "1", "", "True"]
