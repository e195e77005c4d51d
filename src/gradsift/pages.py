"""Helpers for HTML pages: templates that escape every value, and functions that clean texts."""

from __future__ import annotations

import re

from jinja2 import Environment, PackageLoader, StrictUndefined

_PATH = re.compile(r"(?<![\w.:/~])(?:~|[A-Za-z]:)?[/\\](?:[^\s/\\'\",;:()\[\]]+[/\\])+(?=[^\s/\\'\",;:()\[\]]+)")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f]")


def templates(package: str, folder: str) -> Environment:
    """Return the Jinja templates in a package's folder. They escape all values and raise errors for undefined names."""
    return Environment(
        loader=PackageLoader(package, folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def presentable(text: str) -> str:
    """Return `text` with U+FFFD in place of control characters and lone surrogates, and with newlines as line ends."""
    valid = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return _CONTROL.sub("\ufffd", valid.replace("\r\n", "\n").replace("\r", "\n"))


def portable(text: str) -> str:
    """Return `text` with absolute paths cut to their last part, because the other parts depend on the machine."""
    return _PATH.sub("\u2026/", text)
