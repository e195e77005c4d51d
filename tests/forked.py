"""Runs `python run.py ARGUMENTS` in processes that are forked from one with all imports, so that they start faster."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Mapping, Sequence
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

_FORKS = multiprocessing.get_context("forkserver")
_LOADED = ("gradsift.cli", "gradsift.line", "gradsift.pipeline", "gradsift.report.terminal", "lightning", "openai")
_MODELS = ("transformers.models.gpt2.modeling_gpt2", "transformers.models.llama.modeling_llama")


def _run_py(folder: Path, arguments: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.chdir(folder)
    os.environ.update(environment)
    sys.argv = ["run.py", *arguments]
    from composing import compose_from_memory

    from gradsift.cli import main

    compose_from_memory()
    main()


def begin(folder: Path, *arguments: str, environment: Mapping[str, str], log: Path, name: str) -> BaseProcess:
    """Start the command in `folder`; its output and errors are appended to `log`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))  # of the process that is forked
        _FORKS.set_forkserver_preload([*_LOADED, "peft", *_MODELS])
        forkserver.ensure_running()
    process = _FORKS.Process(target=_run_py, args=(folder, arguments, environment, log), name=name)
    process.start()
    return process
