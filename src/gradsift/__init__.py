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
    "gradsift.api": ("Selection", "gsnr", "select"),
    "gradsift.errors": ("ConfigError", "DataError", "GradsiftError"),
    "gradsift.gradients.callback": ("GradientNormCallback", "GradientNormTrainerCallback"),
    "gradsift.gradients.per_sample": ("per_sample_gradients", "per_sample_norms"),
    "gradsift.scoring.scores": ("Scores",),
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
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(module), name)
    raise AttributeError(f"module 'gradsift' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
