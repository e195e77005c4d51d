"""The line of a run that is given by its overrides, as `python run.py OVERRIDES` would walk it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gradsift.artifacts import Store
from gradsift.composition import compose_config
from gradsift.line import Line
from gradsift.pipeline import prepare
from gradsift.runtime import Display, Runtime


def line_of(overrides: Sequence[str]) -> Line:
    """Its artifacts are found in the store, or made when they are asked for."""
    config = compose_config(overrides)
    prepare(config.compute)
    display = Display()
    return Line(config, Runtime(Store(Path(config.artifacts), display.say), config.compute, display, config.seed))
