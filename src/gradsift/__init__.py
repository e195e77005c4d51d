"""gradsift selects the part of an instruction dataset that is worth training on, and measures what the choice is worth.

The names below are imported when they are first used: `import gradsift` alone loads no torch.
"""

from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gradsift.api import Selection, gsnr, select
    from gradsift.errors import ConfigError, DataError, GradsiftError
    from gradsift.scoring.scores import Scores

__version__ = metadata.version("gradsift")

_MODULES = {
    "select": "gradsift.api",
    "Selection": "gradsift.api",
    "gsnr": "gradsift.api",
    "Scores": "gradsift.scoring.scores",
    "GradsiftError": "gradsift.errors",
    "ConfigError": "gradsift.errors",
    "DataError": "gradsift.errors",
}

__all__ = ["ConfigError", "DataError", "GradsiftError", "Scores", "Selection", "gsnr", "select"]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'gradsift' has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
