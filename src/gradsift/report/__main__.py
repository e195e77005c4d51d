"""The command line: write the report of a run's or a sweep's folder, from its files and the store alone."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from gradsift.errors import ConfigError, GradsiftError
from gradsift.report.figures.style import Format
from gradsift.report.page import REPORT_FILE, write_report

_FORMATS = ("png", "svg")


def main(arguments: Sequence[str] | None = None) -> int:
    """0, or 2 with one line on stderr."""
    options = _parser().parse_args(arguments)
    try:
        formats = _formats(options.format)
        print(f"report: {write_report(options.run, options.to, formats=formats, artifacts=options.artifacts)}")
    except (GradsiftError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m gradsift.report", description=__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run or of a sweep")
    parser.add_argument("--to", type=Path, metavar="DIR", help=f"where {REPORT_FILE} goes (default: RUN)")
    parser.add_argument("--format", default="png,svg", help="of the figures' files (default png,svg)")
    parser.add_argument("--artifacts", type=Path, metavar="DIR", help="the store, where it has moved")
    return parser


def _formats(text: str) -> list[Format]:
    names = text.split(",")
    if unknown := [name for name in names if name not in _FORMATS]:
        raise ConfigError(f"--format {unknown[0]!r} is no format of a figure; choose from {', '.join(_FORMATS)}")
    return [cast("Format", name) for name in names]


if __name__ == "__main__":
    sys.exit(main())
