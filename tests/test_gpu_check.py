"""The check for GPUs, rehearsed on the CPU with tiny models; a law that fails ends it with exit code 1."""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path

import numpy as np
import peft
import pytest
import torch

from benchmarks import gpu
from gradsift.config import ComputeConfig
from gradsift.training.adapted import AdaptedLinear

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


@pytest.mark.usefixtures("one_thread")
def test_bergsons_gradients_have_the_norms_of_the_loop() -> None:
    """So its row of the throughput is the rate of the same work."""
    pytest.importorskip("bergson", reason="bergson is not installed")
    setting = gpu.Setting(ComputeConfig(device="cpu"), torch.device("cpu"), is_smallest=True)
    adapted, rows = gpu.adapted_of(gpu.model_of(setting, "gpt2", "float32"), setting.device), setting.rows(8, 512)
    for layer in (layer for layer in adapted.modules() if isinstance(layer, AdaptedLinear)):
        layer.__class__ = peft.tuners.lora.Linear
    norms: list[torch.Tensor] = []

    def keep(kept: dict[str, torch.Tensor]) -> None:
        parts = {factor: [each for name, each in kept.items() if factor in name] for factor in ("lora_A", "lora_B")}
        norms.append(torch.stack([torch.cat(each, 1).norm(dim=1) for each in parts.values()], 1))

    gpu.bergson_gradients(setting, adapted, [rows[:3], rows[3:]], keep)
    np.testing.assert_allclose(torch.cat(norms).numpy(), gpu.loop_norms(adapted, rows), rtol=1e-4)


@pytest.mark.slow
def test_a_rehearsal_of_the_whole_check(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    code, written = check(monkeypatch, tmp_path, "--smallest")
    assert code == 0
    assert {row["check"] for row in written["rows"]} == set(gpu.CHECKS)
    ways = {row["name"].split(",")[0].split(":")[0] for row in written["rows"] if row["check"] == "throughput"}
    assert {each.lower() for each in ways} >= {"ours", "loop", "transformers' trainer", "opacus", "bergson"}


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
