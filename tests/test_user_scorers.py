"""Laws of a user's own scorer, as in the README: it is found in `./conf`, imported, and computed again after edits."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import SMOKE

ROOT = Path(__file__).parents[1]
OPTIONS = (*SMOKE, "stop_after=selection", "scorer=long_answers")


@pytest.fixture(autouse=True)
def forget_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let each test import the files of its own folder."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "my_scorers", raising=False)


def write_example(folder: Path, page: str = "README.md", name: str = "long_answers") -> None:
    """Write the two files that a page shows."""
    text = (ROOT / page).read_text(encoding="utf-8")
    for file in ("my_scorers.py", f"conf/scorer/{name}.yaml"):
        (content,) = re.findall(rf"```\w+\n# {re.escape(file)}\n(.*?)```", text, re.S)
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(content, encoding="utf-8")


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "run.py"), *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def stages(file: Path) -> dict[str, Any]:
    return {stage["name"]: stage for stage in json.loads(file.read_text())["stages"]}


@pytest.mark.parametrize(
    "launcher",
    [
        pytest.param((), id="one process"),
        pytest.param(
            ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2"),
            id="joblib",
            marks=[
                pytest.mark.slow,  # CI runs it too
                pytest.mark.skipif(
                    importlib.util.find_spec("hydra_plugins.hydra_joblib_launcher") is None,
                    reason="joblib's launcher is not installed (an optional extra)",
                ),
            ],
        ),
    ],
)
def test_an_empty_folder_with_the_two_files_runs_and_sweeps(gradsift, launcher: tuple[str, ...]) -> None:
    folder = gradsift.folder
    write_example(folder)
    assert gradsift(*OPTIONS) == 0
    (first,) = folder.glob("outputs/*/*/run.json")
    made = stages(first)["score"]
    assert not made["reused"]

    sweep = ("-m", *OPTIONS, "scorer.most=400,5", *launcher)
    if launcher:  # in a process of its own, as a user gives it
        done = run(folder, *sweep)
        assert done.returncode == 0, done.stderr
    else:
        assert gradsift(*sweep) == 0
    same, other = (stages(file)["score"] for file in sorted(folder.glob("multirun/*/*/*/run.json")))
    assert (same["artifact"], same["reused"]) == (made["artifact"], True)
    assert not other["reused"]


def test_an_edited_function_is_scored_again_and_a_run_is_replayed(gradsift) -> None:
    write_example(gradsift.folder)
    assert gradsift(*OPTIONS) == 0
    assert gradsift(*OPTIONS) == 0
    (first, second) = (run["stages"] for run in gradsift.runs())
    assert [stage["reused"] for stage in second] == [True] * len(first)
    module = gradsift.folder / "my_scorers.py"
    module.write_text(module.read_text().replace("example.output", "example.instruction"))
    assert gradsift(*OPTIONS) == 0
    edited = gradsift.runs()[2]
    assert [stage["name"] for stage in edited["stages"] if not stage["reused"]] == ["score", "select"]
    folder = next(path.parent for path in gradsift.folder.glob("outputs/*/*/run.json"))
    assert gradsift("--replay", str(folder)) == 0
    assert all(stage["reused"] for stage in gradsift.runs()[3]["stages"])


def test_the_scorer_of_the_tutorial_runs(gradsift) -> None:
    write_example(gradsift.folder, "docs/tutorials/your-own-scorer.md", "steady")
    assert gradsift(*SMOKE, "stop_after=selection", "scorer=steady") == 0
    (run,) = gradsift.runs()
    assert "statistics" in {stage["name"] for stage in run["stages"]}


def test_other_groups_of_the_user_are_found_too(gradsift) -> None:
    (gradsift.folder / "my_selectors.py").write_text(
        "import numpy as np\n"
        "from gradsift.selection.choice import Choice\n"
        "def first_rows(scores, size):\n    return Choice(np.arange(size))\n"
    )
    for group, text in {
        "selector/first_rows": "_target_: my_selectors.first_rows\nname: first_rows\n",
        "experiment/mine": "# @package _global_\nalpha: 0.05\n",
    }.items():
        file = gradsift.folder / "conf" / f"{group}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    own = ("experiment=[smoke,mine]", *SMOKE[1:], "scorer=random", "selector=first_rows", "stop_after=selection")
    assert gradsift(*own) == 0
    (run,) = gradsift.runs()
    assert (run["alpha"], run["selection"]["rows"]) == (0.05, 6)


def test_a_file_of_a_name_that_gradsift_has_is_said_to_be_unused(gradsift, capsys) -> None:
    (gradsift.folder / "conf" / "scorer").mkdir(parents=True)
    (gradsift.folder / "conf" / "scorer" / "random.yaml").write_text("_target_: nowhere.f\nname: random\n")
    assert gradsift(*SMOKE, "stop_after=selection", "scorer=random") == 0
    assert "conf/scorer/random.yaml is not used: gradsift has a file of that name" in capsys.readouterr().err


@pytest.mark.parametrize("place", [".", "conf"])
def test_gradsifts_own_conf_is_searched_once(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from gradsift.composition import compose_config

    monkeypatch.chdir(ROOT / place)
    assert compose_config(["scorer=random"]).scorer_name == "random"
