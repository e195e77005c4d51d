"""gradsift picks the part of an instruction dataset that is worth training on, and proves the choice."""

from importlib import metadata

__version__ = metadata.version("gradsift")
