"""The versions of gradsift's code and of the packages with which an artifact is made."""

from __future__ import annotations

import functools
import hashlib
import subprocess
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

_PACKAGES = ("gradsift", "torch", "transformers", "peft", "lightning", "numpy")


def differences(manifest: Mapping[str, Any]) -> str:
    """Return a text with those of an artifact's commit and package versions that differ from the current ones.

    The commit is named if the code differs. The text is empty if code and packages are the same.
    """
    differs = [] if manifest.get("code") == code_hash() else [f"commit {manifest['git_sha'] or 'unknown'}"]
    then, now = manifest.get("packages") or {}, package_versions()
    return ", ".join(differs + [f"{name} {then.get(name)}" for name in _PACKAGES if then.get(name) != now[name]])


@functools.cache
def code_hash() -> str:
    """Return 12 hex digits of a hash of this package's source files.

    Unlike a commit, the hash also exists in an installed wheel, and uncommitted edits change it.
    """
    folder = Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.suffix in (".py", ".cpp")):
        digest.update(
            f"{path.relative_to(folder).as_posix()}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode()
        )
    return digest.hexdigest()[:12]


@functools.cache
def git_sha() -> str | None:
    """Return the short commit of the git checkout that the package runs from, with `-dirty` after uncommitted edits.

    The result is None if the package does not run from a checkout, the checkout has no commit, or git is not installed.
    """
    folder = Path(__file__).parents[2]
    if not (folder / ".git").exists():
        return None
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()  # noqa: S603
    except (OSError, subprocess.SubprocessError):
        return None  # git is not installed, or the checkout has no commit


@functools.cache
def package_versions() -> dict[str, str]:
    return {name: metadata.version(name) for name in _PACKAGES}
