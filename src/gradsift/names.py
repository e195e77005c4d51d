"""Names that become a part of a path, and files that a write must not reach through a link.

Whatever names a folder in the store or a file in a report passes through this module: an option's name is checked
where the config is, and what others have named (a model, a generator, the last part of an address) is made safe.
"""

from __future__ import annotations

import re
from pathlib import Path

from gradsift.errors import ConfigError, GradsiftError

LONGEST_NAME = 64  # characters of a name that a config gives
LONGEST_SLUG = 200  # bytes of a slug, which may join several names; file systems take 255 with what is added
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")


def require_name(option: str, value: str) -> None:
    """Refuse a name that could lead out of the folder that it is a part of.

    Raises:
        ConfigError: `value` has other characters than letters, digits, `_`, `.` and `-`, begins with `.` or `-`, or is
            empty or longer than `LONGEST_NAME`.
    """
    if len(value) > LONGEST_NAME or not _NAME.fullmatch(value):
        shown = repr(value) if len(value) <= LONGEST_NAME else f"{value[:20]!r}... ({len(value):,} characters)"
        raise ConfigError(
            f"{option}={shown} cannot name a folder: a name has 1 to {LONGEST_NAME} of the characters A-Z a-z 0-9 "
            f"_ . - and begins with a letter, a digit or _; give one like {slug(value)[:LONGEST_NAME]}"
        )


def slug(text: str) -> str:
    """Text as one part of a path; a text that `require_name` takes stays as it is.

    Different texts may have one slug: a fingerprint or a check beside it has to tell them apart.
    """
    if not _NAME.fullmatch(text):
        text = re.sub(r"[^A-Za-z0-9._-]+", "_", text).strip("._-") or "unnamed"
    return text[:LONGEST_SLUG]


def slug_of_path(path: str) -> str:
    """The slug of a model's folder or hub id: its last part, in small letters."""
    return slug(path.rstrip("/").rsplit("/", 1)[-1].lower())


def require_no_link(path: Path) -> Path:
    """The path, which is about to be written to.

    Raises:
        GradsiftError: it is a symbolic link, and what is written would land elsewhere.
    """
    if path.is_symlink():
        raise GradsiftError(
            f"{path} is a link, and work is not written through links; remove it, and give the same command again"
        )
    return path
