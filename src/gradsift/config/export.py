"""What a run writes for other tools."""

from __future__ import annotations

import re
from dataclasses import dataclass

from gradsift.config.checks import Group
from gradsift.errors import ConfigError

_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass
class ExportConfig(Group, option="export"):
    """The selection for other trainers and for the hub, and the target as one model."""

    trl: bool = False  # rows and configs for TRL in the run's folder `export/trl`; export=[trl,...] sets it
    llama_factory: bool = False  # the same for LLaMA-Factory
    axolotl: bool = False  # the same for axolotl
    merged: bool = False  # write the target and its adapter as one model to `export/merged` (safetensors, tokenizer)
    # OWNER/NAME of a dataset of the hub: the selection goes there with a card at the end of the run. The token is read
    # from HF_TOKEN
    push_to_hub: str | None = None
    private: bool = True  # a dataset that the push makes is seen by its owner alone

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.push_to_hub is not None and not _ID.fullmatch(self.push_to_hub):
            raise ConfigError(f"export.push_to_hub={self.push_to_hub!r} is no dataset of the hub; give OWNER/NAME")

    @property
    def formats(self) -> list[str]:
        """The trainers for which the selection is written."""
        return [name for name in ("trl", "llama_factory", "axolotl") if getattr(self, name)]
