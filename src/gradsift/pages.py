"""What every HTML page of ours is made with: templates that escape, and texts that a page can hold."""

from __future__ import annotations

import re

from jinja2 import Environment, PackageLoader, StrictUndefined

_PATH = re.compile(r"(?<![\w.:/~])(?:~|[A-Za-z]:)?[/\\](?:[^\s/\\'\",;:()\[\]]+[/\\])+(?=[^\s/\\'\",;:()\[\]]+)")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f]")


def templates(package: str, folder: str) -> Environment:
    """The templates in a package's folder; every value is escaped, and a name that is not given is an error."""
    return Environment(
        loader=PackageLoader(package, folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def presentable(text: str) -> str:
    """`text` with U+FFFD for what no page can hold: control characters and half surrogate pairs."""
    whole = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return _CONTROL.sub("\ufffd", whole.replace("\r\n", "\n").replace("\r", "\n"))


def portable(text: str) -> str:
    """`text` without the folders of absolute paths, which say something of the machine and nothing of the run."""
    return _PATH.sub("\u2026/", text)
