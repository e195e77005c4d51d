"""Models and their training: backbones, the proxy ensemble, the target, embedder and gradient features."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from gradsift.config.checks import at_least, one_of, positive, warmup_fits
from gradsift.errors import ConfigError


@dataclass
class NanoConfig:
    """Pretraining of a nano backbone on the skills of the embedded world in another surface form."""

    architecture: str = "gpt2"
    steps: int = 2400
    batch_size: int = 32
    learning_rate: float = 2.5e-3
    prompt_loss_weight: float = 0.1
    instructed_share: float = 0.01  # rows that already are in the instructed form
    seed: int = 0

    def __post_init__(self) -> None:
        one_of("model.nano.architecture", self.architecture, ("gpt2", "llama"))
        at_least("model.nano.steps", self.steps, 1)
        at_least("model.nano.batch_size", self.batch_size, 1)
        at_least("model.nano.seed", self.seed, 0)
        positive("model.nano.learning_rate", self.learning_rate)
        at_least("model.nano.prompt_loss_weight", self.prompt_loss_weight, 0)
        _check_ratio("model.nano.instructed_share", self.instructed_share)


@dataclass
class ModelConfig:
    """A causal language model: its backbone, without adapters."""

    # pretrained: hub id or folder; nano: pretrained here; smollm2: from its package; tiny_bytes: random, for plumbing
    kind: str = "pretrained"
    path: str | None = None  # hub id or local folder, for kind=pretrained
    revision: str | None = None  # hub commit; when empty the one that is current at first use, for this store
    trust_remote_code: bool = False
    nano: NanoConfig = field(default_factory=NanoConfig)

    def __post_init__(self) -> None:
        one_of("model.kind", self.kind, ("pretrained", "nano", "smollm2", "tiny_bytes"))
        if self.kind == "pretrained" and not self.path:
            raise ConfigError("model.path is empty; give a hub id or a folder that holds a causal language model")


@dataclass
class LoraConfig:
    """Low-rank adapters (Hu et al., 2021)."""

    rank: int = 8
    alpha: float = 16.0  # the adapter's output is scaled by alpha / rank
    dropout: float = 0.0
    targets: list[str] = field(default_factory=lambda: ["all-linear"])
    use_rslora: bool = False  # scale by alpha / sqrt(rank) instead (Kalajdzievski, 2023)
    use_dora: bool = False  # refused: per-sample norms are those of A and B alone

    def __post_init__(self) -> None:
        at_least("lora.rank", self.rank, 1)
        positive("lora.alpha", self.alpha)
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"lora.dropout={self.dropout} is no probability; give a number from 0 to below 1")
        if not self.targets:
            raise ConfigError("lora.targets is empty; name the linear layers, or [all-linear]")
        if self.use_dora:
            raise ConfigError(
                "lora.use_dora=true is not offered: DoRA trains a magnitude of each output beside A and B, and the "
                "norms here are those of A and B; leave it out"
            )

    @property
    def settings(self) -> dict[str, Any]:
        """What a result depends on, for the settings of a stage.

        Options that were added later are left out where they are off, so that finished work keeps its name.
        """
        later = {"use_rslora": True} if self.use_rslora else {}
        return {"rank": self.rank, "alpha": self.alpha, "dropout": self.dropout, "targets": list(self.targets)} | later


TEMPLATES = ("alpaca", "chat", "plain")


SCHEDULES = ("constant", "linear", "cosine")
LOSSES = ("token", "example")


def _check_ratio(option: str, ratio: float) -> None:
    if not 0 <= ratio < 1:
        raise ConfigError(f"{option}={ratio} is no share; give a number from 0 to below 1")


def _check_training(group: str, config: ProxyConfig | TargetConfig) -> None:
    one_of(f"{group}.template", config.template, TEMPLATES)
    one_of(f"{group}.schedule", config.schedule, SCHEDULES)
    at_least(f"{group}.max_length", config.max_length, 2)
    at_least(f"{group}.batch_size", config.batch_size, 1)
    at_least(f"{group}.warmup_steps", config.warmup_steps, 0)
    at_least(f"{group}.weight_decay", config.weight_decay, 0)
    positive(f"{group}.learning_rate", config.learning_rate)


@dataclass
class ProxyConfig:
    """The proxy ensemble: `members` LoRA adapters on one frozen backbone (GRADFILTERING, section 3)."""

    name: str = MISSING
    model: ModelConfig = MISSING
    lora: LoraConfig = field(default_factory=LoraConfig)
    template: str = "alpaca"
    max_length: int = 1024  # tokens, prompt and response together; response tokens are kept first
    members: int = 5  # M of the paper
    # what members differ by: lora_seeds (initial A and data order), bootstrap (a resample of the data and its order),
    # mc_dropout (the dropout masks under which one trained adapter is passed)
    ensemble: str = "lora_seeds"
    snapshots: list[int] = field(default_factory=lambda: [1, 2])  # epochs s (early) and t (late)
    epochs: int | None = None  # the last snapshot when empty
    collect: str = "epoch_end"  # where per-sample gradients are taken
    shards: int = 1  # parts of the rows that are collected apart, by jobs of their own where `shard` is set
    shard: int | None = None  # the one, from 0, that this run collects before it ends; all when empty
    norm_scope: str = "all"  # LoRA factors in the norm; scaled: both, each over the size of the other factor
    learning_rate: float = 5e-5
    schedule: str = "constant"  # constant keeps an epoch's result independent of the number of epochs
    warmup_steps: int = 0  # optimiser steps in which the rate rises from 0
    weight_decay: float = 0.0
    batch_size: int = 8
    batching: str = "bucketed"  # bucketed: examples of like length share a batch; random: they do not

    def __post_init__(self) -> None:
        _check_training("proxy", self)
        at_least("proxy.members", self.members, 1)
        one_of("proxy.collect", self.collect, ("epoch_end", "during_training"))
        one_of("proxy.norm_scope", self.norm_scope, ("all", "A", "B", "scaled"))
        self._check_kind()
        self._check_shards()
        one_of("proxy.batching", self.batching, ("bucketed", "random"))
        early_late = self.snapshots
        if len(early_late) != 2 or not 1 <= early_late[0] < early_late[1]:
            raise ConfigError(
                f"proxy.snapshots={list(early_late)} must be two increasing epochs, the first at least 1, as in [1,2]"
            )
        if self.epochs is not None and self.epochs < early_late[1]:
            raise ConfigError(
                f"proxy.snapshots={list(early_late)} reach beyond proxy.epochs={self.epochs}; "
                f"raise proxy.epochs to {early_late[1]} or leave it empty"
            )

    def _check_kind(self) -> None:
        one_of("proxy.ensemble", self.ensemble, ("lora_seeds", "bootstrap", "mc_dropout"))
        if self.ensemble == "lora_seeds":
            return
        if self.collect == "during_training":
            reason = {
                "bootstrap": "a resample leaves out about a third of the rows, which would have no norm",
                "mc_dropout": "its members are passes over weights that stay as they are",
            }[self.ensemble]
            raise ConfigError(
                f"proxy.ensemble={self.ensemble} does not go with proxy.collect=during_training: {reason}; "
                "take proxy.collect=epoch_end"
            )
        if self.ensemble == "mc_dropout" and not self.lora.dropout:
            raise ConfigError(
                "proxy.ensemble=mc_dropout needs dropout, but proxy.lora.dropout=0.0: all members would be one; "
                "give a probability, as in proxy.lora.dropout=0.1"
            )

    def _check_shards(self) -> None:
        at_least("proxy.shards", self.shards, 1)
        if self.shards > 1 and self.collect == "during_training":
            raise ConfigError(
                f"proxy.shards={self.shards} does not go with proxy.collect=during_training: there the training itself "
                "gives the norms; take proxy.collect=epoch_end, or proxy.shards=1"
            )
        if self.shard is not None and not 0 <= self.shard < self.shards:
            raise ConfigError(
                f"proxy.shard={self.shard} is none of proxy.shards={self.shards}, which count from 0 to "
                f"{self.shards - 1}; give one of these, or leave it empty (null) for all"
            )

    @property
    def total_epochs(self) -> int:
        return self.epochs if self.epochs is not None else self.snapshots[1]


@dataclass
class TargetConfig:
    """The model that is finetuned on the selection.

    By default `loss`, `max_grad_norm` and `schedule` are those of transformers' Trainer, as are AdamW's betas and eps.
    """

    name: str = MISSING
    model: ModelConfig = MISSING
    lora: LoraConfig = field(default_factory=LoraConfig)
    template: str = "alpaca"
    max_length: int = 1024
    epochs: int | None = None  # either epochs or steps
    steps: int | None = None  # optimiser steps, the same for every selection: equal compute
    # token: the mean over all response tokens of an optimiser step; example: the mean of its examples' means, which
    # gives the tokens of a short response more weight
    loss: str = "token"
    max_grad_norm: float | None = 1.0  # longer gradients of a step are scaled to this L2 norm; null leaves them
    learning_rate: float = 2e-4  # QLoRA's (Dettmers et al., 2023) for 7B and 13B; the paper gives none
    schedule: str = "linear"  # after the warm-up; linear and cosine end at 0
    warmup_steps: int = 0  # optimiser steps in which the rate rises from 0; either these or warmup_ratio
    warmup_ratio: float = 0.0  # the same as a share of the optimiser steps, rounded up
    weight_decay: float = 0.0
    batch_size: int = 16  # examples an optimiser step
    batching: str = "random"  # a step of one length would be biased; within a step batches are of like length anyway

    def __post_init__(self) -> None:
        _check_training("target", self)
        one_of("target.loss", self.loss, LOSSES)
        one_of("target.batching", self.batching, ("bucketed", "random"))
        at_least("target.epochs", self.epochs, 1)
        at_least("target.steps", self.steps, 1)
        if self.max_grad_norm is not None:
            positive("target.max_grad_norm", self.max_grad_norm)
        if (self.epochs is None) == (self.steps is None):
            raise ConfigError("give either target.epochs or target.steps, and leave the other empty (null)")
        _check_ratio("target.warmup_ratio", self.warmup_ratio)
        if self.warmup_steps and self.warmup_ratio:
            raise ConfigError("give either target.warmup_steps or target.warmup_ratio, and leave the other at 0")
        if self.steps is not None:
            self.warmup_of(self.steps)

    def warmup_of(self, steps: int) -> int:
        """The warm-up's part of so many optimiser steps.

        Raises:
            ConfigError: it takes all of them.
        """
        if self.warmup_ratio:
            return warmup_fits(f"target.warmup_ratio={self.warmup_ratio}", math.ceil(self.warmup_ratio * steps), steps)
        return warmup_fits(f"target.warmup_steps={self.warmup_steps}", self.warmup_steps, steps)


POOLINGS = ("mean", "weighted_mean", "last")


@dataclass
class EmbedderConfig:
    """What turns the text of an example into a vector, for the methods that compare examples with each other."""

    name: str = MISSING
    text: str = "prompt_and_response"
    max_length: int = 1024  # tokens; what the model takes where that is less

    def __post_init__(self) -> None:
        at_least("embedder.max_length", self.max_length, 2)


@dataclass
class HiddenStatesConfig(EmbedderConfig):
    """Last hidden states of the proxy's backbone, pooled over the tokens."""

    # prompt_and_response, prompt: in the proxy's template; instruction_input_output: a line each, whatever the template
    text: str = "prompt_and_response"
    pooling: str = "mean"  # weighted_mean: token t of 1..T weighs t; last: the last token alone

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("embedder.text", self.text, ("prompt_and_response", "prompt", "instruction_input_output"))
        one_of("embedder.pooling", self.pooling, POOLINGS)


@dataclass
class SentenceTransformersConfig(EmbedderConfig):
    """A model of the package sentence-transformers, which pools by itself."""

    text: str = "instruction_input_output"  # or prompt: without the response; neither has a template
    model: str = MISSING  # hub id, or a folder that sentence-transformers saved
    revision: str | None = None  # hub commit; when empty the one that is current at first use, for this store

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.text == "prompt_and_response":
            raise ConfigError(
                "embedder.text=prompt_and_response is in the proxy's template, which a sentence encoder was not made "
                "for; take embedder.text=instruction_input_output"
            )
        one_of("embedder.text", self.text, ("instruction_input_output", "prompt"))


@dataclass
class WarmupConfig:
    """Training of the proxy's backbone on a few random rows before gradients are taken (LESS)."""

    share: float | None = 0.05  # of the rows; either share or rows
    rows: int | None = None  # all rows where the data has fewer
    epochs: int = 4  # each ends in a checkpoint
    learning_rate: float = 2e-5
    schedule: str = "linear"
    warmup_ratio: float = 0.03  # share of the optimiser steps in which the learning rate rises from 0, rounded up
    batch_size: int = 32
    # attention of Llama's and of GPT-2's kind; a name that the model does not have is passed over
    lora: LoraConfig = field(
        default_factory=lambda: LoraConfig(
            rank=128,
            alpha=512.0,
            dropout=0.1,
            targets=["q_proj", "k_proj", "v_proj", "o_proj", "c_attn", "attn.c_proj"],
        )
    )
    seed: int | None = None  # rows, order, initial A; the run's seed when empty

    def __post_init__(self) -> None:
        one_of("features.warmup.schedule", self.schedule, SCHEDULES)
        at_least("features.warmup.rows", self.rows, 1)
        at_least("features.warmup.epochs", self.epochs, 1)
        at_least("features.warmup.batch_size", self.batch_size, 1)
        at_least("features.warmup.seed", self.seed, 0)
        positive("features.warmup.learning_rate", self.learning_rate)
        if (self.share is None) == (self.rows is None):
            raise ConfigError(
                "give either features.warmup.share or features.warmup.rows, and leave the other empty (null)"
            )
        if self.share is not None and not 0 < self.share <= 1:
            raise ConfigError(
                f"features.warmup.share={self.share} is no share of the data; give a number above 0 and up to 1"
            )
        _check_ratio("features.warmup.warmup_ratio", self.warmup_ratio)

    def warmup_of(self, steps: int) -> int:
        """The part of so many optimiser steps in which the learning rate rises.

        Raises:
            ConfigError: it is all of them.
        """
        option = f"features.warmup.warmup_ratio={self.warmup_ratio}"
        return warmup_fits(option, math.ceil(self.warmup_ratio * steps), steps)


@dataclass
class FeaturesConfig:
    """Gradients of the examples as vectors, for the methods that compare their directions (LESS, G2IS)."""

    name: str = MISSING
    warmup: WarmupConfig = field(default_factory=WarmupConfig)
    checkpoints: str = "all"  # all: one after each epoch of the warm-up, weighed by its learning rate; last
    dimensions: int | None = 8192  # of the random projection, for each checkpoint; null keeps gradients as they are
    projection_seed: int = 0
    gradient_params: str = "lora"  # full: of all weights of the model, one example at a time
    adam: bool = True  # the pool's gradients as Adam would turn them; those of the target set stay plain
    normalise: bool = True  # cosines between gradients; False: inner products, so that long gradients count more

    def __post_init__(self) -> None:
        one_of("features.checkpoints", self.checkpoints, ("all", "last"))
        one_of("features.gradient_params", self.gradient_params, ("lora", "full"))
        at_least("features.dimensions", self.dimensions, 1)
        at_least("features.projection_seed", self.projection_seed, 0)
        if self.adam and self.gradient_params == "full":
            raise ConfigError(
                "features.adam=true needs Adam's moments, which the warm-up has of the LoRA parameters alone; with "
                "features.gradient_params=full give features.adam=false"
            )
