"""gradsift selects the part of an instruction dataset that is worth training on, and evaluates the selection.

The names in `__all__` are imported on first use, so `import gradsift` alone does not load torch.
"""

from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gradsift.api import Selection, gsnr, select
    from gradsift.errors import ConfigError, DataError, GradsiftError
    from gradsift.gradients.callback import GradientNormCallback, GradientNormTrainerCallback
    from gradsift.gradients.per_sample import per_sample_gradients, per_sample_norms
    from gradsift.scoring.scores import Scores

__version__ = metadata.version("gradsift")

_MODULES = {
    "select": "gradsift.api",
    "Selection": "gradsift.api",
    "gsnr": "gradsift.api",
    "per_sample_norms": "gradsift.gradients.per_sample",
    "per_sample_gradients": "gradsift.gradients.per_sample",
    "GradientNormCallback": "gradsift.gradients.callback",
    "GradientNormTrainerCallback": "gradsift.gradients.callback",
    "Scores": "gradsift.scoring.scores",
    "GradsiftError": "gradsift.errors",
    "ConfigError": "gradsift.errors",
    "DataError": "gradsift.errors",
}

__all__ = [
    "ConfigError",
    "DataError",
    "GradientNormCallback",
    "GradientNormTrainerCallback",
    "GradsiftError",
    "Scores",
    "Selection",
    "gsnr",
    "per_sample_gradients",
    "per_sample_norms",
    "select",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'gradsift' has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
