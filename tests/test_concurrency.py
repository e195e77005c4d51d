"""Laws of several processes on one store: no unit is made twice, and no incomplete unit is read."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import time
from collections import Counter
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import forked
import pytest
from conftest import SMOKE

SCORES = (*SMOKE, "stop_after=scores", "data.seed=1", "data.size=60")


def begin(gradsift: Any, name: str, *arguments: str) -> BaseProcess:
    """Start the command line in a new process and folder; its output goes to `NAME.log`."""
    folder = gradsift.folder / name
    folder.mkdir()
    environment = {"GRADSIFT_ARTIFACTS": str(gradsift.store)}
    log = gradsift.folder / f"{name}.log"
    return forked.begin(folder, *arguments, environment=environment, log=log, name=name)


def ended_well(gradsift: Any, *processes: BaseProcess) -> None:
    for process in processes:
        process.join(240)
        assert process.exitcode == 0, (gradsift.folder / f"{process.name}.log").read_text()


def made(gradsift: Any) -> Counter[str]:
    """Return how often each unit was made, over every `run.json` of every process."""
    runs = [json.loads(path.read_text()) for path in gradsift.folder.glob("*/*/*/*/**/run.json")]
    return Counter(stage["artifact"] for run in runs for stage in run["stages"] if not stage["reused"])


def require_whole(store: Path) -> int:
    """Assert that every artifact is as its manifest says and that there is nothing else; return their number."""
    folders = [path for path in store.glob("*/*") if path.is_dir()]
    for folder in folders:
        assert not folder.name.endswith(".part")
        assert ".damaged-" not in folder.name
        files = json.loads((folder / "manifest.json").read_text())["files"]
        assert set(files) | {"manifest.json"} == {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
        for name, said in files.items():
            assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == said["sha256"]
    return len(folders)


def test_four_sweeps_at_once_make_every_unit_once(gradsift) -> None:
    before = require_whole(gradsift.store)
    sweeps = {
        "a": ("scorer=gsnr,late_loss",),
        "b": ("scorer=gsnr,late_loss",),
        "c": ("scorer=gsnr", "proxy.members=3,2"),
        "d": ("scorer=random,gsnr", "alpha=0.05"),
    }
    ended_well(gradsift, *[begin(gradsift, name, "-m", *SCORES, *given) for name, given in sweeps.items()])
    units = made(gradsift)
    assert set(units.values()) == {1}
    assert require_whole(gradsift.store) == before + len(units)
    stages = Counter(Path(unit).parent.name for unit in units)
    # three members of two epochs; scores of gsnr for two sizes of ensemble, and of two scorers more
    assert (stages["load"], stages["member"], stages["score"]) == (1, 6, 4)
    assert len(list(gradsift.folder.glob("?/multirun/*/*/*/run.json"))) == 4 * 2


def test_a_dead_holders_lock_is_taken_over_by_one_of_those_who_wait(gradsift) -> None:
    holder = begin(gradsift, "holder", *SCORES)
    _stop_at_work(holder, gradsift.store / "member")
    waiting = [begin(gradsift, name, *SCORES) for name in ("first", "second")]
    logs = [gradsift.folder / f"{process.name}.log" for process in waiting]
    word = f"waiting for another process (process {holder.pid} on "
    _until(lambda: all(log.exists() and word in log.read_text() for log in logs))
    assert holder.pid is not None
    os.kill(holder.pid, signal.SIGKILL)
    ended_well(gradsift, *waiting)
    units = made(gradsift)  # the holder left no run.json, what it had finished is there
    assert set(units.values()) == {1}
    require_whole(gradsift.store)
    assert len(list(gradsift.store.glob("member/m*"))) == 4


def _stop_at_work(process: BaseProcess, stage: Path) -> None:
    """Stop a process that is making a unit."""
    assert process.pid is not None
    while True:
        _until(lambda: list(stage.glob("*.part")))
        os.kill(process.pid, signal.SIGSTOP)
        if list(stage.glob("*.part")):
            return
        os.kill(process.pid, signal.SIGCONT)


def _until(condition: Any) -> None:
    deadline = time.monotonic() + 240
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="processes are forked and stopped by signals")
