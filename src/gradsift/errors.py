"""The errors that gradsift raises on purpose.

Each message names the option or the row, the value found and the remedy. The command line shows
them as one line, without a traceback; anything else that escapes is a defect of gradsift.
"""


class GradsiftError(Exception):
    """A problem that the user can mend; the message says how."""


class ConfigError(GradsiftError):
    """An option has a value that cannot be used, alone or beside another option."""


class DataError(GradsiftError):
    """A file or a row cannot be read, or does not hold what it should."""
