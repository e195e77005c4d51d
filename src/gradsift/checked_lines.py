"""Lines of a file that is written as work goes on, each with a checksum: what a crash or a disk changed is noticed."""

from __future__ import annotations

import hashlib

JOURNAL_FILE = "journal.jsonl"  # in the `unfinished/` of an artifact in the making
_DIGITS = 16  # hex digits of SHA-256 before each line


def sealed(text: str) -> bytes:
    """A line of ASCII text without line ends, with its checksum and its end."""
    return f"{_checksum(text.encode('ascii'))} {text}\n".encode("ascii")


def unsealed(line: bytes) -> bytes | None:
    """The text of a line that is as `sealed` made it; None for one that was cut or changed."""
    checksum, text = line[:_DIGITS], line[_DIGITS + 1 : -1]
    whole = line == checksum + b" " + text + b"\n" and checksum == _checksum(text).encode("ascii")
    return text if whole else None


def _checksum(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()[:_DIGITS]
