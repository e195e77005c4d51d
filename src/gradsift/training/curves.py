"""Files of a training: `curve.jsonl`, a line per optimiser step, and `trajectory.safetensors`, an adapter's path."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

CURVE_FILE = "curve.jsonl"
TRAJECTORY_FILE = "trajectory.safetensors"


def write_curve(folder: Path, curve: Sequence[Mapping[str, float]]) -> None:
    """Write the loss (nats per response token) and the number of tokens, prompts included, of each optimiser step."""
    lines = (json.dumps({"batch": index, **entry}) + "\n" for index, entry in enumerate(curve))
    (folder / CURVE_FILE).write_text("".join(lines), encoding="utf-8")


def read_curve(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / CURVE_FILE).read_text(encoding="utf-8").splitlines()]


def read_trajectory(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return the P points of a trajectory (`gradsift.proxy.trajectory`): optimiser steps (P,) and coordinates (P, D).

    The steps of a point are counted from the start of the training.
    """
    tensors = load_file(folder / TRAJECTORY_FILE)
    return tensors["steps"], tensors["points"]
