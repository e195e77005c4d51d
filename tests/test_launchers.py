"""Laws of sweeps whose jobs run in other processes: they give the same results."""

from __future__ import annotations

import csv
import importlib.util
import os
import sys
from pathlib import Path

import pytest
from conftest import SMOKE

JOBLIB = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
SUBMITIT = ("hydra/launcher=submitit_local", "hydra.sweeper.max_batch_size=2")
RAY = ("hydra/launcher=ray", "hydra.launcher.ray.init.num_cpus=2")


def _needs(plugin: str) -> pytest.MarkDecorator:
    there = importlib.util.find_spec(plugin) is not None
    return pytest.mark.skipif(not there, reason=f"{plugin} is not installed (an optional extra)")


LAUNCHERS = [
    pytest.param(JOBLIB, id="joblib", marks=[_needs("joblib"), pytest.mark.slow]),  # CI runs it too
    pytest.param(SUBMITIT, id="submitit_local", marks=[_needs("submitit"), pytest.mark.slow]),
    pytest.param(RAY, id="ray", marks=[_needs("ray"), pytest.mark.slow]),
]


@pytest.fixture(autouse=True)
def fresh_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Start new workers, which import this checkout like the parent process."""
    source = str(Path(__file__).parents[1] / "src")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([source, os.environ.get("PYTHONPATH", "")]))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if importlib.util.find_spec("joblib") is not None:
        from joblib.externals.loky import get_reusable_executor

        get_reusable_executor().shutdown(wait=True, kill_workers=True)
    if ray := sys.modules.get("ray"):
        ray.shutdown()


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_jobs_in_other_processes_give_the_same_results(gradsift, capfd, launcher: tuple[str, ...]) -> None:
    options = ("experiment=smoke", "tracker=none", "scorer=random", "alpha=0.0001,0.1,0.2")
    assert gradsift("-m", *options, *launcher) == 2
    assert sorted(run["status"] for run in gradsift.runs()) == ["failed", "finished", "finished"]
    captured = capfd.readouterr()
    assert "failed: 0-random-0.0001" in captured.out
    assert "alpha=0.0001 of 120 rows selects no example" in captured.out
    assert "Traceback" not in captured.err + captured.out
    (table,) = gradsift.folder.glob("multirun/*/*/results.csv")
    rows = list(csv.DictReader(table.open()))
    assert {row["alpha"] for row in rows if row["scorer"] == "random"} == {"0.1", "0.2"}
    made = [stage["artifact"] for run in gradsift.runs() for stage in run["stages"] if not stage["reused"]]
    assert len(made) == len(set(made))
    if launcher is not SUBMITIT:  # what its jobs print goes to files
        share = max(1, len(os.sched_getaffinity(0)) // 2) if launcher is JOBLIB else 1  # two jobs share the cores
        assert f"float32, {share} thread{'s' if share > 1 else ''}" in captured.out


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_job_that_is_killed_is_named(gradsift, capfd, monkeypatch, launcher: tuple[str, ...]) -> None:
    (gradsift.folder / "deadly.py").write_text(
        "import os, signal\ndef scores(examples):\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(gradsift.folder), os.environ["PYTHONPATH"]]))
    monkeypatch.syspath_prepend(str(gradsift.folder))
    own = ("~scorer", "+scorer={_target_: deadly.scores, name: deadly}")
    assert gradsift("-m", *SMOKE, *own, "stop_after=selection", "alpha=0.1,0.2", *launcher) == 2
    captured = capfd.readouterr()
    assert "error: the sweep ended early with" in captured.err
    assert "failed: 0-deadly-0.1: it left no run.json, so its process was killed or is still at work" in captured.out


SEARCH = ("experiment=[smoke,search]", *SMOKE[1:], "proxy.members=2", "scorer.eps=1e-8")


@pytest.mark.slow
def test_a_trial_without_a_value_counts_as_failed_and_not_as_zero(gradsift, capsys) -> None:
    pytest.importorskip("optuna")
    minimize = ("objective=heldout_loss", "stop_after=finetune", "hydra.sweeper.direction=minimize")
    assert gradsift(*SEARCH, *minimize, "alpha=choice(0.0001,0.1)", "hydra.sweeper.n_trials=2") == 2
    runs = gradsift.runs()
    assert len(runs) == 2
    known = {run["alpha"]: run["heldout_loss"]["model"] for run in runs if run["status"] == "stopped"}
    assert list(known) == [0.1]  # the sampler is seeded
    assert f"best trial: alpha=0.1: {known[0.1]:.4g}" in capsys.readouterr().out  # a failure as 0 would be the least


@pytest.mark.slow
def test_a_search_without_any_value_ends_in_one_line(gradsift, capsys) -> None:
    pytest.importorskip("optuna")
    assert gradsift(*SEARCH, "alpha=choice(0.0001,0.0002)", "hydra.sweeper.n_trials=1") == 2
    captured = capsys.readouterr()
    assert "error: the sweep ended early with ValueError" in captured.err
    assert "Traceback" not in captured.err
