"""The command line before Hydra reads it: refused is what Hydra would end with a traceback for."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from gradsift.errors import ConfigError

_MOST_DIGITS = 1000  # of a number; Python reads up to 4,300, and no option means one of a hundred


def require_readable(arguments: Sequence[str], conf: Path) -> None:
    """Look at each `KEY=VALUE`.

    Args:
        conf: the folder whose subfolders are the config groups.

    Raises:
        ConfigError: a group is given no choice but null, or a number is longer than Python reads.
    """
    for argument in arguments:
        key, sign, value = argument.partition("=")
        if not sign or argument.startswith("-"):
            continue
        group = key.lstrip("+~").split("@")[0]
        if (longest := max((len(digits) for digits in re.findall(r"\d+", value)), default=0)) > _MOST_DIGITS:
            raise ConfigError(f"{key} is given a number of {longest:,} digits; give one that fits into 64 bits")
        names_null = "null" in re.split(r"[\s,()\[\]]+", value.lower())
        if names_null and group and (conf / group).is_dir():
            raise ConfigError(_no_choice(group, conf / group))


def _no_choice(group: str, folder: Path) -> str:
    if group in ("method", "experiment"):
        return f"{group}=null is no choice; leave {group} out where none is wanted"
    choices = ", ".join(sorted(path.stem for path in folder.glob("*.yaml")))
    return f"{group}=null leaves the run without its {group}; choose one of: {choices}"
