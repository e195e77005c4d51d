"""Laws of `compute.threads=auto`: it takes the free cores, and an explicit number takes precedence."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack

import pytest
from conftest import SMOKE

from gradsift.config import ComputeConfig
from gradsift.errors import ConfigError
from gradsift.training import numerics as threads
from gradsift.training.numerics import threads_of


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Simulate a machine with a number of cores, some busy, some allowed to this process."""

    def describe(cores: int, busy: float, allowed: int) -> None:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        monkeypatch.setattr(os, "cpu_count", lambda: cores)
        monkeypatch.setattr(threads, "_TORCH_THREADS", cores)
        monkeypatch.setattr(threads, "busy_cores", lambda: busy)
        monkeypatch.setattr(threads.joblib, "cpu_count", lambda: allowed)

    return describe


@pytest.mark.parametrize(
    ("cores", "busy", "allowed", "expected"),
    [
        (8, 0.0, 8, 8),  # all are free
        (8, 5.2, 8, 3),
        (8, 7.9, 8, 1),  # never none
        (8, 0.0, 2, 2),  # a cgroup's limit
        (64, 60.0, 8, 4),
        (2, 0.3, 2, 2),  # a browser in the background
    ],
)
def test_auto_takes_the_free_cores(machine, cores: int, busy: float, allowed: int, expected: int) -> None:
    machine(cores, busy, allowed)
    assert threads_of(ComputeConfig()) == expected


def test_processes_on_a_cpu_share_the_free_cores(machine) -> None:
    machine(8, 0.0, 8)
    assert threads_of(ComputeConfig(device="cpu", strategy="ddp", devices=2)) == 4
    assert threads_of(ComputeConfig(device="cpu", strategy="ddp", devices=16)) == 1


def test_a_number_that_somebody_gave_wins(machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(8, 7.0, 8)
    assert threads_of(ComputeConfig(threads=6)) == 6
    assert threads_of(ComputeConfig(threads=None)) == 8  # torch's own choice
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    assert threads_of(ComputeConfig()) == 8


@pytest.mark.parametrize("value", ["many", "", "0", 0, -1, True, 1.5])
def test_what_is_no_number_of_threads_is_refused(value: object) -> None:
    with pytest.raises(ConfigError, match=r"compute\.threads"):
        ComputeConfig(threads=value)


@pytest.mark.slow
def test_a_busy_machine_leaves_one_thread() -> None:
    """Measure in a process of its own while as many processes as cores spin."""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    code = "from gradsift.config import ComputeConfig; from gradsift.training.numerics import threads_of; "
    code += "import sys; sys.stdin.readline(); print(threads_of(ComputeConfig()))"
    with ExitStack() as stack:
        measuring = subprocess.Popen(
            [sys.executable, "-c", code], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(os.cpu_count() or 1):
            spinning = subprocess.Popen([sys.executable, "-c", "while True: pass"])
            stack.callback(spinning.wait)
            stack.callback(spinning.kill)
        assert measuring.communicate("\n", timeout=120)[0].strip() == "1"


def test_the_plan_says_how_many_threads_and_why(gradsift, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(threads, "busy_cores", lambda: float(os.cpu_count() or 1))
    assert gradsift(*SMOKE, "compute.threads=auto", "scorer=random", "stop_after=load") == 0
    assert "1 thread (auto: " in capsys.readouterr().out
