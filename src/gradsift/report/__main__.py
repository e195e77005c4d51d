"""Write the report of a run or a sweep, from the files in its folder and the store alone."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from gradsift.errors import ConfigError, command
from gradsift.report.figures.style import FORMATS
from gradsift.report.page import write_report
from gradsift.run_folder import REPORT_FILE


@command
def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m gradsift.report", description=__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run or of a sweep")
    parser.add_argument("--to", type=Path, metavar="DIR", help=f"folder to write {REPORT_FILE} to (default: RUN)")
    parser.add_argument("--format", default="png,svg", help="formats of the figures' files (default: png,svg)")
    parser.add_argument("--artifacts", type=Path, metavar="DIR", help="the store, if it has moved")
    options = parser.parse_args(arguments)
    formats = options.format.split(",")
    if unknown := [name for name in formats if name not in FORMATS]:
        raise ConfigError(f"--format {unknown[0]!r} is not a format of figures; choose from {', '.join(FORMATS)}")
    print(f"report: {write_report(options.run, options.to, formats=formats, artifacts=options.artifacts)}")


if __name__ == "__main__":
    sys.exit(main())
