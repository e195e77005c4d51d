"""Tracking and the machine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from omegaconf import MISSING

from gradsift.config.checks import at_least, one_of
from gradsift.errors import ConfigError


@dataclass
class TrackerConfig:
    """Where metrics go besides the run folder."""

    name: str = MISSING  # wandb or none
    mode: str = "offline"  # offline runs are sent later with `wandb sync`
    project: str = "gradsift"
    entity: str | None = None
    group: str | None = None  # the sweep's day and time (its folder's name) when empty
    artifacts: bool = False  # scores and selection go along as W&B artifacts, copied into the run's folder

    def __post_init__(self) -> None:
        one_of("tracker.name", self.name, ("wandb", "none"))
        one_of("tracker.mode", self.mode, ("offline", "online"))
        if self.artifacts and self.name == "none":
            raise ConfigError("tracker.artifacts=true sends files to W&B; give tracker=wandb, or leave it out")


@dataclass
class ComputeConfig:
    """The machine."""

    device: str = "auto"  # auto: cuda where there is one, else cpu
    precision: str = "float32"  # bfloat16: frozen weights and products; LoRA weights, norms and residual stream float32
    kernels: str = "auto"  # compiled kernels for bfloat16 models on a CPU; off: torch's own (docs/cpu.md)
    tokens: int | None = None  # padded tokens that pass through a model at once; what suits it when empty
    checkpointing: bool = False  # compute activations again in the backward pass: less memory, a third more time
    threads: Any = "auto"  # of each process: a number; auto: the free cores; null: torch's own choice
    save_every: float = 60.0  # seconds of work that a killed process may lose, within an epoch; 0: after each step
    # ddp: `devices` processes share a training or a collection, each with the whole model; fsdp: for the target each
    # holds a part of its frozen weights
    strategy: str = "single"
    devices: int = 1  # processes a machine, each with a GPU of its own or on the CPU; more than one with ddp and fsdp
    num_nodes: int = 1  # machines that share the work and the store; the same command runs on each

    def __post_init__(self) -> None:
        one_of("compute.device", self.device, ("auto", "cpu", "cuda"))
        one_of("compute.precision", self.precision, ("float32", "bfloat16"))
        one_of("compute.kernels", self.kernels, ("auto", "off"))
        at_least("compute.tokens", self.tokens, 1)
        number = isinstance(self.threads, int) and not isinstance(self.threads, bool) and self.threads >= 1
        if not number and self.threads not in ("auto", None):
            raise ConfigError(f"compute.threads={self.threads!r} is not known; give auto, null or a number from 1 on")
        at_least("compute.save_every", self.save_every, 0)
        one_of("compute.strategy", self.strategy, ("single", "ddp", "fsdp"))
        at_least("compute.devices", self.devices, 1)
        at_least("compute.num_nodes", self.num_nodes, 1)
        if self.strategy == "single" and self.ranks > 1:
            raise ConfigError(
                f"compute.devices={self.devices} and compute.num_nodes={self.num_nodes} need a strategy, but "
                "compute.strategy=single; take compute=ddp or compute=fsdp"
            )

    @property
    def ranks(self) -> int:
        """Processes that share a training or a collection."""
        return self.devices * self.num_nodes

    @property
    def mask_batches(self) -> Any:
        """What dropout masks depend on, for the settings of a stage: they are drawn batch by batch, rank by rank."""
        return self.tokens if self.ranks == 1 else {"tokens": self.tokens, "ranks": self.ranks}
