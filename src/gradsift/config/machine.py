"""Options of the metrics tracker, of the exports for other tools, and of the hardware."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from omegaconf import MISSING

from gradsift.config.checks import Group, option
from gradsift.errors import ConfigError


@dataclass
class TrackerConfig(Group, option="tracker", schema="tracker"):
    """Where metrics are sent. Whatever the tracker, metrics are also written to the run's folder."""

    name: str = option(MISSING, choices=("wandb", "none"))
    mode: str = option("offline", choices=("offline", "online"))  # offline runs are sent later with `wandb sync`
    project: str = "gradsift"  # W&B project
    entity: str | None = None  # W&B user or team; null: the account's default
    group: str | None = None  # W&B group; null: the sweep's day and time
    artifacts: bool = False  # also log scores and selection as W&B artifacts; the run's folder has them in any case

    def check(self) -> None:
        if self.artifacts and self.name == "none":
            raise ConfigError("tracker.artifacts=true sends files to W&B; give tracker=wandb, or leave it out")


@dataclass
class ExportConfig(Group, option="export", schema="export"):
    """What a run exports: the selection for other trainers or the hub, and the target with its adapter as one model."""

    trl: bool = False  # write rows and configs for TRL to `export/trl` in the run's folder; export=[trl,...] sets this
    llama_factory: bool = False  # as `trl`, but for LLaMA-Factory
    axolotl: bool = False  # as `trl`, but for axolotl
    merged: bool = False  # write target and adapter as one model (safetensors, tokenizer) to `export/merged`
    # OWNER/NAME of a dataset of the hub, to which the selection is pushed with a dataset card at the end of the run.
    # The token is read from HF_TOKEN
    push_to_hub: str | None = None
    private: bool = True  # if the push creates the dataset, only its owner can see it

    def check(self) -> None:
        if self.push_to_hub is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", self.push_to_hub):
            raise ConfigError(f"export.push_to_hub={self.push_to_hub!r} is no dataset of the hub; give OWNER/NAME")

    @property
    def formats(self) -> list[str]:
        """The trainers for which the selection is written."""
        return [name for name in ("trl", "llama_factory", "axolotl") if getattr(self, name)]


@dataclass
class ComputeConfig(Group, option="compute", schema="compute"):
    """The hardware and its use: device, precision, memory, and the processes that share the work."""

    device: str = option("auto", choices=("auto", "cpu", "cuda"))  # auto: cuda if there is a GPU, else cpu
    # bfloat16: frozen weights and matrix products are bfloat16; LoRA weights, layer norms, gradient norms and the
    # residual stream stay in float32. auto: bfloat16 on a GPU, where float32 products use TF32; float32 on a CPU
    precision: str = option("auto", choices=("auto", "float32", "bfloat16"))
    # auto: gradsift's compiled kernels for bfloat16 models on a CPU; off: torch's kernels (docs/cpu.md)
    kernels: str = option("auto", choices=("auto", "off"))
    # number of tokens, padding included, that pass through a model at once; null: chosen for each model
    tokens: int | None = option(None, least=1)
    # recompute activations in the backward pass, which takes less memory and a third more time; null: only on a GPU
    # whose memory would hold the activations of fewer than 4,096 tokens
    checkpointing: bool | None = None
    threads: Any = "auto"  # CPU threads of a process: a number; auto: the free cores; null: torch's default
    deterministic: bool = False  # use only kernels with reproducible results; an operation without such a kernel fails
    save_every: float = option(60.0, least=0)  # seconds of work that a killed process may lose; 0: save every step
    # ddp: the processes share a training, or a collection of gradient norms, each with the whole model. fsdp: as ddp,
    # but each process holds only a part of the target's frozen weights
    strategy: str = option("single", choices=("single", "ddp", "fsdp"))
    # number of processes per machine, each on a GPU of its own or on the CPU; more than 1 only with ddp or fsdp
    devices: int = option(1, least=1)
    # number of machines that share the work and the store; give the same command on each
    num_nodes: int = option(1, least=1)

    def check(self) -> None:
        is_number = isinstance(self.threads, int) and not isinstance(self.threads, bool)
        if self.threads not in ("auto", None) and not (is_number and self.threads >= 1):
            raise ConfigError(f"compute.threads={self.threads!r} is not known; give auto, null or a number from 1 on")
        if self.strategy == "single" and self.ranks > 1:
            raise ConfigError(
                f"compute.devices={self.devices} and compute.num_nodes={self.num_nodes} need a strategy, but "
                "compute.strategy=single; take compute=ddp or compute=fsdp"
            )

    @property
    def ranks(self) -> int:
        """The number of processes that share a training or a collection of gradient norms, over all machines."""
        return self.devices * self.num_nodes

    @property
    def mask_batches(self) -> Any:
        """The settings on which the dropout masks of mixture-of-experts layers depend.

        In other layers, masks are drawn for each row (example). The input of mixture-of-experts layers is not divided
        by row, so their masks are drawn for each batch of each rank (process).
        """
        return self.tokens if self.ranks == 1 else {"tokens": self.tokens, "ranks": self.ranks}
