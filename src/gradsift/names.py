"""Checks names from the config that become parts of paths, makes other names safe, and refuses to follow links."""

from __future__ import annotations

import re
from pathlib import Path

from gradsift.errors import ConfigError, GradsiftError

LONGEST_NAME = 64  # characters of a name in a config
LONGEST_SLUG = 200  # bytes of a slug, which may join several names; slug and fingerprint must fit into 255
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")


def require_name(option: str, value: str) -> None:
    """Raise ConfigError for a name that is too long or could lead out of its folder, such as `../x`."""
    if len(value) > LONGEST_NAME or not _NAME.fullmatch(value):
        raise ConfigError(
            f"{option}={value!r} cannot name a folder: a name has 1 to {LONGEST_NAME} of the characters A-Z a-z 0-9 "
            f"_ . - and begins with a letter, a digit or _; give one like {slug(value)[:LONGEST_NAME]}"
        )


def slug(text: str) -> str:
    """Turn a text into a name that can be one part of a path. A name that `require_name` accepts is returned unchanged.

    Different texts may have the same slug, so a path must also contain something unique, such as a fingerprint.
    """
    if not _NAME.fullmatch(text):
        text = re.sub(r"[^A-Za-z0-9._-]+", "_", text).strip("._-") or "unnamed"
    return text[:LONGEST_SLUG]


def slug_of_path(path: str) -> str:
    """Return the slug of a model's folder or hub id: its last part in lower case."""
    return slug(path.rstrip("/").rsplit("/", 1)[-1].lower())


def require_no_link(path: Path) -> Path:
    """Return `path`; raise GradsiftError if it is a symbolic link, through which a write would go elsewhere."""
    if path.is_symlink():
        raise GradsiftError(
            f"{path} is a link, and gradsift does not write through links; remove it, and give the same command again"
        )
    return path
