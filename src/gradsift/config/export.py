"""What a run writes for other tools."""

from __future__ import annotations

import re
from dataclasses import dataclass

from gradsift.config.checks import Group
from gradsift.errors import ConfigError

_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass
class ExportConfig(Group, option="export"):
    """Writes the selection for other trainers or to the hub, and the target with its adapter as one model."""

    trl: bool = False  # write rows and configs for TRL to `export/trl` in the run's folder; export=[trl,...] sets this
    llama_factory: bool = False  # as `trl`, but for LLaMA-Factory
    axolotl: bool = False  # as `trl`, but for axolotl
    merged: bool = False  # write target and adapter as one model (safetensors, tokenizer) to `export/merged`
    # OWNER/NAME of a dataset of the hub, to which the selection is pushed with a dataset card at the end of the run.
    # The token is read from HF_TOKEN
    push_to_hub: str | None = None
    private: bool = True  # if the push creates the dataset, only its owner can see it

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.push_to_hub is not None and not _ID.fullmatch(self.push_to_hub):
            raise ConfigError(f"export.push_to_hub={self.push_to_hub!r} is no dataset of the hub; give OWNER/NAME")

    @property
    def formats(self) -> list[str]:
        """The trainers for which the selection is written."""
        return [name for name in ("trl", "llama_factory", "axolotl") if getattr(self, name)]
