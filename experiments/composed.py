"""The line (`gradsift.line.Line`) of the run that `python run.py OVERRIDES` would start."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gradsift.artifacts import Store
from gradsift.composition import compose_config
from gradsift.line import Line
from gradsift.pipeline import prepare
from gradsift.runtime import Display, Runtime


def line_of(overrides: Sequence[str]) -> Line:
    """Return the line of a run; each of its artifacts is found in the store, or made when it is first used."""
    config = compose_config(overrides)
    prepare(config.compute)
    display = Display()
    return Line(config, Runtime(Store(Path(config.artifacts), display.say), config.compute, display, config.seed))
