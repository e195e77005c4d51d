"""Models and their training: backbones, the proxy ensemble, the target, embedders and gradient features."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from gradsift.config.checks import Group, option
from gradsift.errors import ConfigError
from gradsift.names import LONGEST_NAME, slug_of_path

TEMPLATES = ("alpaca", "chat", "plain")
SCHEDULES = ("constant", "linear", "cosine")
BATCHINGS = ("bucketed", "random")


@dataclass
class NanoConfig(Group, option="model.nano"):
    """Pretraining of a nano (tiny) backbone on the skills of the embedded world.

    Most prompts of the pretraining are worded unlike the instructions of the world's data, so that a finetune on this
    data has something to teach.
    """

    architecture: str = option("gpt2", choices=("gpt2", "llama"))  # architecture of the backbone
    steps: int = option(2400, least=1)  # optimiser steps
    batch_size: int = option(32, least=1)  # rows per optimiser step
    learning_rate: float = option(2.5e-3, above=0)  # AdamW's learning rate
    prompt_loss_weight: float = option(0.1, least=0)  # weight of the prompt's tokens in the loss
    # share of the rows that are worded as in the embedded world's data; 0.006 gives a backbone that follows about a
    # quarter of the instructions, so that a finetune has something to teach
    instructed_share: float = option(0.006, least=0, below=1)
    seed: int = option(0, least=0)  # seed of weights and rows


@dataclass
class ModelConfig(Group, option="model", schema="model"):
    """A causal language model without adapters, called a backbone."""

    # pretrained: from the hub or a folder; nano: pretrained by gradsift; smollm2: SmolLM2-135M-Instruct from a Python
    # package; tiny_bytes: random weights, to try out a setup
    kind: str = option("pretrained", choices=("pretrained", "nano", "smollm2", "tiny_bytes"))
    path: str | None = None  # hub id or local folder, for kind=pretrained
    # commit of the model on the hub; null: the commit that is current at first use, which the store then keeps
    revision: str | None = None
    # precision of the frozen weights; auto: as compute.precision
    dtype: str = option("auto", choices=("auto", "float32", "bfloat16"))
    # hold frozen linear layers in 4 or 8 bits (QLoRA), with the package bitsandbytes; products are computed in `dtype`
    quantization: str = option("none", choices=("none", "nf4", "int8"))
    trust_remote_code: bool = False  # run code that comes with the model's files
    nano: NanoConfig = field(default_factory=NanoConfig)

    def check(self) -> None:
        if self.kind == "pretrained" and not self.path:
            raise ConfigError(
                "model.path is empty; give the hub id or the folder of a causal language model, as in proxy.model=ID "
                "or target.model=ID"
            )
        if self.kind != "pretrained" and self.path:
            raise ConfigError(
                f"model.path={self.path} is not read with model.kind={self.kind}; take proxy=hf or target=hf, "
                "or give model.kind=pretrained too"
            )


@dataclass
class LoraConfig(Group, option="lora"):
    """Low-rank adapters (Hu et al., 2021)."""

    rank: int = option(8, least=1)  # rank of A and B
    alpha: float = option(16.0, above=0)  # the adapter's output is scaled by alpha / rank
    dropout: float = option(0.0, least=0, below=1)  # dropout probability of the adapter's input in training
    # names of the linear layers that get an adapter; all-linear: all except output head and experts
    targets: list[str] = field(default_factory=lambda: ["all-linear"])
    # how the initial A is drawn. kaiming: uniform within 1 / sqrt(inputs) of 0; gaussian: normal with standard
    # deviation 1 / rank. The configs of `export` do not contain this option
    init: str = option("kaiming", choices=("kaiming", "gaussian"))
    use_rslora: bool = False  # scale by alpha / sqrt(rank) instead (Kalajdzievski, 2023)
    use_dora: bool = False  # true is refused, because the per-sample norms cover only A and B

    def check(self) -> None:
        if not self.targets:
            raise ConfigError("lora.targets is empty; name the linear layers, or [all-linear]")
        if self.use_dora:
            raise ConfigError(
                "lora.use_dora=true is not offered: DoRA also trains a magnitude for each output, and the per-sample "
                "norms cover only A and B; leave it out"
            )

    @property
    def settings(self) -> dict[str, Any]:
        """The adapter's options on which results depend; a stage adds them to the settings that its fingerprint hashes.

        Options that later versions of gradsift added are left out while they are off, so that earlier results keep
        their fingerprint.
        """
        later: dict[str, Any] = {"use_rslora": True} if self.use_rslora else {}
        if self.init != "kaiming":
            later["init"] = self.init
        if self.dropout:
            later["masks"] = "by_row"  # how dropout masks are drawn
        return {"rank": self.rank, "alpha": self.alpha, "dropout": self.dropout, "targets": list(self.targets)} | later


def _warmup_fits(option: str, warmup: int, steps: int) -> int:
    """Return `warmup`, or raise ConfigError if there are not fewer warm-up steps than optimiser steps (`steps`)."""
    if 0 < steps <= warmup:
        raise ConfigError(
            f"{option} warms up over {warmup:,} of {steps:,} optimiser steps, so the learning rate never reaches its "
            "full value; give a shorter warm-up (0 for none) or train for longer"
        )
    return warmup


@dataclass
class AdaptedModelConfig(Group):
    """A model with a low-rank adapter, and how an example is turned into the model's input tokens."""

    name: str = MISSING
    model: ModelConfig = MISSING
    lora: LoraConfig = field(default_factory=LoraConfig)
    template: str = "alpaca"  # alpaca or plain; chat: the tokenizer's chat template; FILE.jinja: your own chat template
    # largest number of tokens of prompt and response together; the prompt is cut first
    max_length: int = option(1024, least=2)

    def check(self) -> None:
        self.name = self.name or slug_of_path(str(self.model.path))[:LONGEST_NAME]
        if self.template not in TEMPLATES and not self.template.endswith(".jinja"):
            raise ConfigError(
                f"{self._option}.template={self.template!r} is not known; choose one of: {', '.join(TEMPLATES)}, or "
                "name the file of a chat template, as in FILE.jinja"
            )


@dataclass
class ProxyConfig(AdaptedModelConfig, option="proxy", schema="proxy"):
    """The proxy ensemble: `members` LoRA adapters on one frozen backbone (GRADFILTERING, section 3)."""

    members: int = option(5, least=1)  # number of members, M in the paper
    together: int = option(1, least=1)  # number of members that train side by side, in one pass over the frozen weights
    # how members differ: lora_seeds (initial A and data order), bootstrap (resample and order of the data), mc_dropout
    # (dropout masks; all members share one trained adapter)
    ensemble: str = option("lora_seeds", choices=("lora_seeds", "bootstrap", "mc_dropout"))
    snapshots: list[int] = field(default_factory=lambda: [1, 2])  # the epochs s (early) and t (late) of the score
    epochs: int | None = None  # number of training epochs; null: up to the late snapshot
    # when per-sample gradients are computed. epoch_end: in a pass over all rows after the epoch; during_training: in
    # the backward passes of the training
    collect: str = option("epoch_end", choices=("epoch_end", "during_training"))
    shards: int = option(1, least=1)  # number of parts of the rows; with `shard`, a job collects the norms of one part
    shard: int | None = None  # the shard, counted from 0, that this run collects; null: all shards
    # LoRA matrices whose gradients are in the norm. all: A and B; scaled: A and B, and the norm of each gradient is
    # divided by the Frobenius norm of the other matrix
    norm_scope: str = option("all", choices=("all", "A", "B", "scaled"))
    learning_rate: float = option(5e-5, above=0)  # AdamW's learning rate; the default is the paper's
    # schedule of the learning rate; with constant, the result of an epoch does not depend on the number of epochs
    schedule: str = option("constant", choices=SCHEDULES)
    warmup_steps: int = option(0, least=0)  # optimiser steps in which the learning rate rises from 0
    weight_decay: float = option(0.0, least=0)  # AdamW's weight decay
    batch_size: int = option(8, least=1)  # examples per optimiser step
    # bucketed: a batch holds examples of similar length; random: a batch holds random examples
    batching: str = option("bucketed", choices=BATCHINGS)

    def check(self) -> None:
        super().check()
        if self.collect == "during_training":  # the norms come from the trainings themselves
            refused, remedy = "does not go with proxy.collect=during_training", "take proxy.collect=epoch_end"
            if self.ensemble != "lora_seeds":
                reason = {
                    "bootstrap": "a resample leaves out about a third of the rows, which would have no norm",
                    "mc_dropout": "its members are passes over weights that stay as they are",
                }[self.ensemble]
                raise ConfigError(f"proxy.ensemble={self.ensemble} {refused}: {reason}; {remedy}")
            if self.shards > 1:
                raise ConfigError(
                    f"proxy.shards={self.shards} {refused}: a training has no shards; {remedy} or proxy.shards=1"
                )
        if self.ensemble == "mc_dropout" and not self.lora.dropout:
            raise ConfigError(
                "proxy.ensemble=mc_dropout with proxy.lora.dropout=0.0 makes all members equal; give a probability, as "
                "in proxy.lora.dropout=0.1"
            )
        if self.shard is not None and not 0 <= self.shard < self.shards:
            raise ConfigError(
                f"proxy.shard={self.shard} is none of proxy.shards={self.shards}, which count from 0 to "
                f"{self.shards - 1}; give one of these, or leave it empty (null) for all"
            )
        epochs = list(self.snapshots)
        if len(epochs) != 2 or not 1 <= epochs[0] < epochs[1]:
            raise ConfigError(
                f"proxy.snapshots={epochs} must be two increasing epochs, the first at least 1, as in [1,2]"
            )
        if self.epochs is not None and self.epochs < epochs[1]:
            raise ConfigError(
                f"proxy.snapshots={epochs} reach beyond proxy.epochs={self.epochs}; raise proxy.epochs to {epochs[1]} "
                "or leave it empty"
            )

    @property
    def total_epochs(self) -> int:
        return self.epochs if self.epochs is not None else self.snapshots[1]


@dataclass
class TargetConfig(AdaptedModelConfig, option="target", schema="target"):
    """The model that is finetuned on the selection.

    The defaults of `loss`, `max_grad_norm` and `schedule`, and AdamW's betas and eps, are those of transformers'
    Trainer.
    """

    epochs: int | None = option(None, least=1)  # number of epochs; give either epochs or steps
    steps: int | None = option(None, least=1)  # number of optimiser steps, with which all selections train equally long
    # token: mean loss over all response tokens of an optimiser step; example: mean loss of each example,
    # averaged over the step's examples, so that the tokens of a short response have more weight
    loss: str = option("token", choices=("token", "example"))
    max_grad_norm: float | None = option(1.0, above=0)  # longer gradients are scaled to this L2 norm; null: no clipping
    # AdamW's learning rate; the default is QLoRA's for 7B and 13B (Dettmers et al., 2023), as the paper gives none
    learning_rate: float = option(2e-4, above=0)
    # schedule of the learning rate after the warm-up; linear and cosine end at 0
    schedule: str = option("linear", choices=SCHEDULES)
    warmup_steps: int = option(0, least=0)  # optimiser steps in which the learning rate rises from 0
    warmup_ratio: float = option(0.0, least=0, below=1)  # `warmup_steps` as a share of the steps, rounded up
    weight_decay: float = option(0.0, least=0)  # AdamW's weight decay
    batch_size: int = option(16, least=1)  # examples per optimiser step
    # random: a step has random examples; bucketed: its examples have similar lengths, which biases the step. Within a
    # step, examples of similar length always pass through the model together
    batching: str = option("random", choices=BATCHINGS)

    def check(self) -> None:
        super().check()
        if (self.epochs is None) == (self.steps is None):
            raise ConfigError("give either target.epochs or target.steps, and leave the other empty (null)")
        if self.warmup_steps and self.warmup_ratio:
            raise ConfigError("give either target.warmup_steps or target.warmup_ratio, and leave the other at 0")
        if self.steps is not None:
            self.warmup_of(self.steps)

    def warmup_of(self, steps: int) -> int:
        """Return the number of learning-rate warm-up steps in a training of `steps` optimiser steps.

        Raises:
            ConfigError: the learning-rate warm-up does not end before the training does.
        """
        if self.warmup_ratio:
            return _warmup_fits(f"target.warmup_ratio={self.warmup_ratio}", math.ceil(self.warmup_ratio * steps), steps)
        return _warmup_fits(f"target.warmup_steps={self.warmup_steps}", self.warmup_steps, steps)


@dataclass
class EmbedderConfig(Group, option="embedder"):
    """Turns the text of an example into a vector, for the methods that compare examples with each other."""

    name: str = MISSING
    text: str = "prompt_and_response"
    max_length: int = option(1024, least=2)  # largest number of tokens of a text, or the model's limit if that is lower


@dataclass
class HiddenStatesConfig(EmbedderConfig, schema="hidden_states"):
    """Hidden states of the last layer of the proxy's backbone, pooled over the tokens of a text."""

    # the text that is embedded. prompt_and_response, prompt: in the proxy's template; instruction_input_output: each
    # on a line of its own, without a template
    text: str = option("prompt_and_response", choices=("prompt_and_response", "prompt", "instruction_input_output"))
    # how the states of the tokens are combined. weighted_mean: token t of 1..T has weight t; last: the last token alone
    pooling: str = option("mean", choices=("mean", "weighted_mean", "last"))


@dataclass
class SentenceTransformersConfig(EmbedderConfig, schema="sentence_transformers"):
    """A model of the package sentence-transformers, which itself pools the tokens of a text into one vector."""

    # instruction_input_output, or prompt, which leaves out the response; neither uses a template
    text: str = option("instruction_input_output", choices=("instruction_input_output", "prompt"))
    model: str = MISSING  # hub id, or a folder that sentence-transformers saved
    # commit of the model on the hub; null: the commit that is current at first use, which the store then keeps
    revision: str | None = None


@dataclass
class WarmupConfig(Group, option="features.warmup"):
    """Training of the proxy's backbone on a few random rows, before gradients of all rows are computed (LESS)."""

    share: float | None = option(0.05, above=0, most=1)  # share of the rows; give either share or rows
    rows: int | None = option(None, least=1)  # number of rows; all rows if the data has fewer
    epochs: int = option(4, least=1)  # number of epochs; each ends in a checkpoint
    learning_rate: float = option(2e-5, above=0)  # AdamW's learning rate
    schedule: str = option("linear", choices=SCHEDULES)  # schedule of the learning rate after its initial rise
    warmup_ratio: float = option(0.03, least=0, below=1)  # share of the steps in which the learning rate rises from 0
    batch_size: int = option(32, least=1)  # examples per optimiser step
    # its `targets` are attention layers of Llama and GPT-2; names that the model does not have are ignored
    lora: LoraConfig = field(
        default_factory=lambda: LoraConfig(
            rank=128,
            alpha=512.0,
            dropout=0.1,
            targets=["q_proj", "k_proj", "v_proj", "o_proj", "c_attn", "attn.c_proj"],
        )
    )
    seed: int | None = option(None, least=0)  # seed of rows, order and initial A; null: the run's seed

    def check(self) -> None:
        if (self.share is None) == (self.rows is None):
            raise ConfigError("give either features.warmup.share or features.warmup.rows; leave the other empty (null)")

    def warmup_of(self, steps: int) -> int:
        """Return the number of learning-rate warm-up steps in a training of `steps` optimiser steps.

        Raises:
            ConfigError: the learning-rate warm-up does not end before the training does.
        """
        name = f"features.warmup.warmup_ratio={self.warmup_ratio}"
        return _warmup_fits(name, math.ceil(self.warmup_ratio * steps), steps)


@dataclass
class FeaturesConfig(Group, option="features", schema="features"):
    """Gradients of the examples as vectors, for the methods that compare the directions of gradients (LESS, G2IS)."""

    name: str = MISSING
    warmup: WarmupConfig = field(default_factory=WarmupConfig)
    # all: one checkpoint after each epoch of the warm-up, weighted by the epoch's mean learning rate; last: only the
    # last checkpoint
    checkpoints: str = option("all", choices=("all", "last"))
    dimensions: int | None = option(8192, least=1)  # size of a checkpoint's random projection; null: no projection
    projection_seed: int = option(0, least=0)  # seed of the random projection
    # weights whose gradients are taken. lora: the adapter's; full: all of the model's, one example at a time
    gradient_params: str = option("lora", choices=("lora", "full"))
    adam: bool = True  # turn the pool's gradients into Adam's updates; the target set's gradients are used unchanged
    normalise: bool = True  # compare by cosine; false: by inner product, where larger norms count more

    def check(self) -> None:
        if self.adam and self.gradient_params == "full":
            raise ConfigError(
                "features.adam=true needs Adam's moments, which the warm-up computes only for LoRA parameters; with "
                "features.gradient_params=full give features.adam=false"
            )


# Short names: `proxy=NAME` and `target=NAME` stand for `hf` with this id and the model's chat template
KNOWN_MODELS = {
    "qwen3_0.6b": "Qwen/Qwen3-0.6B",
    "qwen3_1.7b": "Qwen/Qwen3-1.7B",
    "qwen3_8b": "Qwen/Qwen3-8B",
    "llama3_1b": "meta-llama/Llama-3.2-1B-Instruct",  # gated, like all models of Meta and Google
    "llama3_8b": "meta-llama/Llama-3.1-8B-Instruct",
    "gemma3_270m": "google/gemma-3-270m-it",
    "gemma3_1b": "google/gemma-3-1b-it",
    "smollm3_3b": "HuggingFaceTB/SmolLM3-3B",
    "olmo2_1b": "allenai/OLMo-2-0425-1B-Instruct",
    "olmo2_7b": "allenai/OLMo-2-1124-7B-Instruct",
    "olmo3_7b": "allenai/Olmo-3-7B-Instruct",
    "mistral_7b": "mistralai/Mistral-7B-Instruct-v0.3",
    "gpt_oss_20b": "openai/gpt-oss-20b",
}
