"""The functions of `kernels.cpp`, compiled with the user's compiler once per processor, compiler and torch version."""

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
from filelock import FileLock, Timeout

from gradsift.errors import GradsiftError

_SOURCE = Path(__file__).with_name("kernels.cpp")
_FLAGS = ["-O3", "-march=native", "-std=c++20", "-fopenmp", "-fno-math-errno", "-ffp-contract=fast", "-shared", "-fPIC"]
_SLOWER = "bfloat16 models run on torch's own, slower kernels"
_PATIENCE = 300.0  # seconds to wait for the compiler, or for another process that compiles; usually 20 s suffice
_LOG = logging.getLogger(__name__)


def kernels() -> Any:
    """Return the compiled functions, `torch.ops.gradsift`, or raise a `GradsiftError` if they are not `available`."""
    if not available():
        raise GradsiftError("kernels.cpp cannot be compiled here; call `available` before using the kernels")
    return torch.ops.gradsift


def version() -> str:
    """Return a hash (12 hex digits) of the source and the compiler's flags, on which the kernels' results depend."""
    text = "\n".join([_SOURCE.read_text(encoding="utf-8"), *_FLAGS])
    return hashlib.sha256(text.encode()).hexdigest()[:12]


@functools.cache
def available() -> bool:
    """Compile the kernels if needed, load them, and return whether both succeeded; if not, a warning says why."""
    name = os.environ.get("CXX") or "c++"
    compiler = name.split()  # CXX may contain options or start with ccache
    if shutil.which(compiler[0]) is None:
        _LOG.warning(f"no C++ compiler {name} was found (CXX names another): {_SLOWER}")
        return False
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gradsift"
        library = folder / f"kernels-{_key(compiler)}.so"
        if not library.is_file():
            library.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(library.with_suffix(".lock"), timeout=_PATIENCE):  # one process compiles
                if not library.is_file():  # another process may have compiled meanwhile
                    _compile(compiler, library)
        torch.ops.load_library(library)
    except (OSError, RuntimeError, subprocess.SubprocessError, Timeout) as error:  # RuntimeError: no home folder
        _LOG.warning(f"kernels.cpp cannot be compiled or loaded ({_reason(error)}): {_SLOWER}")
        return False
    return True


def _reason(error: Exception) -> str:
    if isinstance(error, subprocess.TimeoutExpired | Timeout):
        return f"the compiler did not end within {_PATIENCE:.0f} s"
    text = (getattr(error, "stderr", None) or "").strip() or str(error).strip() or type(error).__name__
    lines = text.splitlines()
    return next((line for line in lines if "error" in line.lower()), lines[0])


def _key(compiler: list[str]) -> str:
    """Return a hash (16 hex digits) of everything on which the compiled file depends.

    That is the source, the flags, the compiler, torch's version and the processor.
    """
    described = subprocess.run(  # noqa: S603 - the user's own compiler
        [*compiler, "--version"], capture_output=True, text=True, check=False, timeout=_PATIENCE
    ).stdout
    # A library for another torch may not load, and one for another processor (-march=native) ends the process with an
    # illegal instruction, which Python cannot catch. Machines that share a home folder may differ in their processors.
    parts = [version(), *compiler[1:], described, torch.__version__, platform.machine(), _processor()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _processor() -> str:
    """Return the processor's instruction sets or, if they cannot be read, its name."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    return next((line for line in lines if line.lower().startswith(("flags", "features"))), platform.processor())


def _compile(compiler: list[str], library: Path) -> None:
    """Compile into a temporary folder, then move the compiled file to `library`, so `library` is never incomplete."""
    root = Path(torch.__file__).parent
    _LOG.warning("compiling kernels.cpp for this processor (once, about 20 s)")
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        part = Path(folder) / library.name
        paths = [f"-I{root / 'include'}", f"-L{root / 'lib'}", "-lc10", "-ltorch_cpu"]
        command = [*compiler, *_FLAGS, str(_SOURCE), "-o", str(part), *paths]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=_PATIENCE)  # noqa: S603
        part.replace(library)
