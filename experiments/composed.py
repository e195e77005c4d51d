"""The line of a run that is given by its overrides, as `python run.py OVERRIDES` would walk it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hydra import compose, initialize_config_dir

from gradsift.artifacts import Store
from gradsift.cli import conf_folder
from gradsift.config import load_config, register_schemas
from gradsift.line import Line
from gradsift.pipeline import prepare
from gradsift.runtime import Display, Runtime


def line_of(overrides: Sequence[str]) -> Line:
    """Its artifacts are found in the store, or made when they are asked for."""
    register_schemas()
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        config = load_config(compose("config", overrides=list(overrides)))
    prepare(config)
    display = Display()
    return Line(config, Runtime(Store(Path(config.artifacts), display.say), config.compute, display, config.seed))
