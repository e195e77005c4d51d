"""The errors that gradsift raises on purpose.

Each message names the option or the row, its value and the remedy. The command line prints the message as one line,
without a traceback. Any other exception that reaches the command line is a defect of gradsift.
"""

import functools
import sys
from collections.abc import Callable, Sequence


class GradsiftError(Exception):
    """A problem that the user can correct; the message says how."""


class ConfigError(GradsiftError):
    """An option has a value that cannot be used, by itself or together with another option."""


class DataError(GradsiftError):
    """A file or a row cannot be read, or lacks something that it must contain."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, cut to 200 characters; without a message, the name of its class."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def command(run: Callable[[Sequence[str] | None], None]) -> Callable[..., int]:
    """Return a main function that calls `run` and returns 0.

    If `run` raises GradsiftError or OSError, the main function prints the error and returns 2.
    """

    @functools.wraps(run)
    def main(arguments: Sequence[str] | None = None) -> int:
        try:
            run(arguments)
        except (GradsiftError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        return 0

    return main
