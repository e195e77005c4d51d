"""Helpers of the scripts: the `Line` of a run, the norms and losses of its members, and the defaults of `contrast`.

Shape letters: M members, N examples.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from gradsift.artifacts import Artifact, Store
from gradsift.composition import compose_config
from gradsift.config.methods import ContrastConfig
from gradsift.gradients.statistics import by_example, norm_of
from gradsift.line import Line
from gradsift.pipeline import prepare
from gradsift.runtime import Display, Runtime

CONTRAST = ContrastConfig(name="contrast")


def line_of(overrides: Sequence[str]) -> Line:
    """Return the `Line` (the stages) of `python run.py OVERRIDES`. A missing artifact is made at its first use."""
    config = compose_config(overrides)
    prepare(config.compute)
    display = Display()
    return Line(config, Runtime(Store(Path(config.artifacts), display.say), config.compute, display, config.seed))


def norms_at(line: Line, epoch: int) -> np.ndarray:
    """Return the members' norms after an epoch, (M, N), in the scope of `proxy.norm_scope`; NaN without a response."""
    return np.stack([norms_of(line, shards) for shards in line.norms(epoch)])


def norms_of(line: Line, shards: Sequence[Artifact]) -> np.ndarray:
    """Return the norms of one member, (N,), from its artifacts."""
    info = shards[0].info
    table = by_example(shards, ("norm_A", "norm_B"), line.rows)
    return norm_of(table, line.config.proxy.norm_scope, info["size_A"], info["size_B"])


def losses_at(line: Line, epoch: int) -> np.ndarray:
    """Return the members' losses after an epoch, (M, N); NaN for an example without a response."""
    return np.stack([by_example(shards, ("loss",), line.rows)["loss"] for shards in line.norms(epoch)])
