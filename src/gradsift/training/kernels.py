"""What `kernels.cpp` compiles to, once a machine: the passes between a model's matrix products on a CPU."""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from gradsift.errors import GradsiftError

_SOURCE = Path(__file__).with_name("kernels.cpp")
_FLAGS = ["-O3", "-march=native", "-std=c++20", "-fopenmp", "-fno-math-errno", "-ffp-contract=fast", "-shared", "-fPIC"]
_SLOWER = "models in bfloat16 run on torch's own, slower kernels"
_LOG = logging.getLogger(__name__)


def kernels() -> Any:
    """The compiled functions, `torch.ops.gradsift`.

    Raises:
        GradsiftError: they cannot be compiled here.
    """
    if not are_there():
        raise GradsiftError("kernels.cpp cannot be compiled here, and is not needed: ask `are_there` first")
    return torch.ops.gradsift


@functools.cache
def are_there() -> bool:
    """Whether they are compiled, or could be just now; where not, what is missing is said once."""
    named = os.environ.get("CXX") or "c++"
    compiler = named.split()  # it may have options, or stand behind ccache
    if shutil.which(compiler[0]) is None:
        _LOG.warning(f"no C++ compiler {named} is found (CXX names another): {_SLOWER}")
        return False
    try:
        library = _folder() / f"kernels-{_key(compiler)}.so"
        if not library.is_file():
            library.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(library.with_suffix(".lock")):  # of several processes one compiles
                if not library.is_file():
                    _compile(compiler, library)
        torch.ops.load_library(library)
    except (OSError, RuntimeError, subprocess.CalledProcessError) as error:  # RuntimeError: no home, no file locks
        _LOG.warning(f"kernels.cpp cannot be compiled or loaded ({_reason(error)}): {_SLOWER}")
        return False
    return True


def _reason(error: Exception) -> str:
    """In one line: the compiler's first error, where it gave one."""
    said = (getattr(error, "stderr", None) or "").strip() or str(error).strip() or type(error).__name__
    lines = said.splitlines()
    return next((line for line in lines if "error" in line.lower()), lines[0])


def _folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gradsift"


def _key(compiler: list[str]) -> str:
    """Of what the compiled file depends on: its source, how it is compiled, torch, and the processor."""
    version = subprocess.run(  # noqa: S603 - the user's own compiler
        [*compiler, "--version"], capture_output=True, text=True, check=False
    ).stdout
    compiled = [_SOURCE.read_text(encoding="utf-8"), *compiler[1:], *_FLAGS, version, torch.__version__]
    parts = [*compiled, platform.machine(), _processor()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _processor() -> str:
    """What the processor can do; a home folder may be shared by several machines."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    return next((line for line in lines if line.lower().startswith(("flags", "features"))), platform.processor())


def _compile(compiler: list[str], library: Path) -> None:
    """Into a folder beside it first, for it is there whole or not at all."""
    root = Path(torch.__file__).parent
    _LOG.warning("compiling kernels.cpp for this processor (once, about 20 s)")
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        part = Path(folder) / library.name
        paths = [f"-I{root / 'include'}", f"-L{root / 'lib'}", "-lc10", "-ltorch_cpu"]
        subprocess.run(  # noqa: S603
            [*compiler, *_FLAGS, str(_SOURCE), "-o", str(part), *paths], check=True, capture_output=True, text=True
        )
        part.replace(library)
