"""The check for GPUs, rehearsed on the CPU with tiny models; a law that fails ends it with exit code 1."""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu

pytestmark = pytest.mark.filterwarnings("ignore")


def check(monkeypatch: pytest.MonkeyPatch, folder: Path, *options: str) -> tuple[int, dict]:
    out = folder / "gpu.json"
    monkeypatch.setattr(sys, "argv", ["gpu", "--out", str(out), *options])
    return gpu.main(), json.loads(out.read_text())


@pytest.fixture(autouse=True)
def no_gpu_and_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(host: str | None, *arguments: object, **options: object) -> list[tuple]:
        if host in (None, "localhost", "127.0.0.1", socket.gethostname()):
            return resolve(host, *arguments, **options)
        raise AssertionError(f"the check asks for {host}, but it has to run offline")

    resolve = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", refused)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.usefixtures("one_thread")
def test_a_rehearsal_runs_and_claims_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys) -> None:
    """All checks but the line, which runs the command line twice, and the throughput."""
    code, written = check(monkeypatch, tmp_path, "--smallest", "--only=exactness,ranking,divided,memory,large,answers")
    table = capsys.readouterr().out
    assert code == 0, table
    assert "REHEARSAL, its numbers claim nothing" in table
    assert written["rehearsal"]
    assert written["card"] == "CPU"
    rows = written["rows"]
    assert {row["check"] for row in rows} == {"exactness", "ranking", "divided", "memory", "large", "answers"}
    laws = [row for row in rows if row["check"] in ("exactness", "divided")]
    assert len(laws) == 8
    assert all(row["holds"] for row in laws)


@pytest.mark.slow
def test_a_rehearsal_of_the_whole_check(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    code, written = check(monkeypatch, tmp_path, "--smallest")
    assert code == 0
    assert {row["check"] for row in written["rows"]} == set(gpu.CHECKS)


@pytest.mark.parametrize("broken", ["law", "error"])
def test_a_law_that_fails_or_an_error_ends_with_1(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, broken: str) -> None:
    def fails(setting: gpu.Setting):
        if broken == "error":
            raise RuntimeError("no kernel")
        yield gpu.Row("exactness", "norms", 0.3, "< 0.1", holds=False)

    def passes(setting: gpu.Setting):
        yield gpu.Row("answers", "seconds", 1.0)

    monkeypatch.setattr(gpu, "CHECKS", {"exactness": fails, "answers": passes})
    code, written = check(monkeypatch, tmp_path, "--smallest", "--only=exactness,answers")
    assert code == 1
    first, second = written["rows"]
    assert first["holds"] is False
    assert broken == "law" or first["value"] == "RuntimeError: no kernel"
    assert second["check"] == "answers"


def test_without_a_gpu_only_the_rehearsal_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys) -> None:
    for options, message in (((), "finds no CUDA device"), (("--only=speed",), "--only=speed is not known")):
        with pytest.raises(SystemExit):
            check(monkeypatch, tmp_path, *options)
        assert message in capsys.readouterr().err
