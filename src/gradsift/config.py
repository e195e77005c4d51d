"""The configuration: one dataclass a group, checked as a whole before anything heavy is imported.

Defaults live here and nowhere else; the files in `conf/` name a variant and state what differs.
Hydra checks names and types while it composes, `__post_init__` checks values when `load_config`
converts the result. Inside the program plain values are passed on: nothing below `pipeline.py`
reads a whole `Config`.
"""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from gradsift.errors import ConfigError

SCORES_BY_TASK = ("less", "rds_plus", "sbert")  # scorers with a score for each task of the target set
STAGES = ("load", "statistics", "scores", "selection", "finetune", "generate", "judge")
EMBEDDED = "verifiable"  # the name of the embedded data and of its benchmark
COPIES = ("exact_duplicate", "near_duplicate")
CORRUPTIONS = ("wrong_answer", "mismatched_answer", "truncated", "garbled", *COPIES)
RATERS = ("verifier", "local", "openai")  # judges that can grade one example


def _one_of(option: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{option}={value!r} is not known; choose one of: {', '.join(choices)}")


def _at_least(option: str, value: float | None, least: float) -> None:
    if value is not None and not least <= value < math.inf:
        raise ConfigError(f"{option}={value} is out of range; give at least {least}, and a finite number")


def _positive(option: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ConfigError(f"{option}={value} must be greater than 0 and finite")


# ---------------------------------------------------------------------------------------------- data


@dataclass
class FieldsConfig:
    """Names of the columns that hold the parts of an example."""

    instruction: str = "instruction"
    input: str = "input"  # may be missing from the data
    output: str = "output"
    messages: str = "messages"  # [{"role": ..., "content": ...}, ...]
    conversations: str = "conversations"  # ShareGPT: [{"from": ..., "value": ...}, ...]
    prompt: str = "prompt"
    completion: str = "completion"


@dataclass
class CorruptionConfig:
    """Known corruption, injected to audit scorers: labels say which rows, and no scorer sees them."""

    share: float = 0.0  # of the rows, after `limit`; parts of equal size for each kind, duplicates on top of the rows
    kinds: list[str] = field(default_factory=lambda: list(CORRUPTIONS))
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.share < 1:
            raise ConfigError(
                f"data.corruption.share={self.share} is no share; give a number from 0 (none) to below 1, as in 0.3"
            )
        for kind in self.kinds:
            _one_of("data.corruption.kinds", kind, CORRUPTIONS)
        if not self.kinds or len(set(self.kinds)) < len(self.kinds):
            raise ConfigError(
                f"data.corruption.kinds={list(self.kinds)} must name at least one kind, and each once; known: "
                f"{', '.join(CORRUPTIONS)}"
            )
        _at_least("data.corruption.seed", self.seed, 0)


@dataclass
class DataConfig:
    """What every dataset has."""

    name: str = MISSING
    limit: int | None = None  # at most this many rows, drawn with `seed`; the order of the file is kept
    holdout: int = 0  # rows set aside before selection, for the held-out loss
    seed: int = 0  # sampling for `limit` and `holdout`; the embedded world's content
    dedup: str = "none"  # exact: equal texts; near: also texts that share most of their words. The first row stays
    dedup_threshold: float = 0.8  # Jaccard similarity of word triples from which rows are near duplicates
    corruption: CorruptionConfig = field(default_factory=CorruptionConfig)

    def __post_init__(self) -> None:
        _one_of("data.dedup", self.dedup, ("none", "exact", "near"))
        if not 0.5 <= self.dedup_threshold <= 1:
            raise ConfigError(
                f"data.dedup_threshold={self.dedup_threshold} is out of range; give a Jaccard similarity from 0.5 "
                "(half of the word triples in common) to 1"
            )
        _at_least("data.limit", self.limit, 1)
        _at_least("data.holdout", self.holdout, 0)
        _at_least("data.seed", self.seed, 0)


DATA_FORMATS = ("auto", "alpaca", "messages", "sharegpt", "prompt_completion")


@dataclass
class JsonDataConfig(DataConfig):
    """A local file: .json, .jsonl, .json.gz, .jsonl.gz, .parquet or .csv."""

    path: str = MISSING
    format: str = "auto"  # auto: decided by the columns of the first row that fits a format
    fields: FieldsConfig = field(default_factory=FieldsConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        _one_of("data.format", self.format, DATA_FORMATS)


@dataclass
class HubDataConfig(DataConfig):
    """A dataset of the Hugging Face hub."""

    id: str = MISSING
    revision: str | None = None  # a commit; when empty the one that is current at first use, for this store
    split: str = "train"
    format: str = "auto"
    fields: FieldsConfig = field(default_factory=FieldsConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        _one_of("data.format", self.format, DATA_FORMATS)


@dataclass
class VerifiableDataConfig(DataConfig):
    """The embedded world: generated examples with exactly checkable answers."""

    size: int = 2000
    spoilt: float = 0.5  # share of the rows that are spoilt, over four kinds
    duplicates: float = 0.06  # share of the rows that are exact or near duplicates
    delayed: float = 0.0  # share of the tasks that can be learnt only after others (half as many) are
    benchmark_items: int = 390

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least("data.size", self.size, 1)
        _at_least("data.benchmark_items", self.benchmark_items, 1)
        if self.holdout:
            raise ConfigError(
                "data.holdout has no use for data=verifiable: its benchmark is the held-out set; leave it 0"
            )
        for option, share in (("data.spoilt", self.spoilt), ("data.duplicates", self.duplicates)):
            if not 0 <= share < 1:
                raise ConfigError(f"{option}={share} is no share; give a number from 0 to below 1")
        if not 0 <= self.delayed <= 0.5:
            raise ConfigError(f"data.delayed={self.delayed} is out of range; give a share from 0 (none) to 0.5")


# ---------------------------------------------------------------------------------------- target set


@dataclass
class TargetSetConfig:
    """Examples of what the finetuned model shall be good at, in tasks; for the methods that select towards them."""

    name: str = MISSING
    limit: int | None = None  # at most this many rows a task, drawn with `seed`; their order is kept
    seed: int = 0

    def __post_init__(self) -> None:
        _at_least("target_set.limit", self.limit, 1)
        _at_least("target_set.seed", self.seed, 0)


@dataclass
class FilesTargetSetConfig(TargetSetConfig):
    """Target rows from files: one a task, or one whose column names each row's task."""

    path: str | None = None  # a local file, or a folder that holds the files of `urls`; wins over `urls`
    urls: dict[str, str] = field(default_factory=dict)  # task: address of its file, fetched once at run time
    task: str | None = None  # column that names a row's task; one file is one task when empty
    rows: str | None = None  # key that holds the rows where a .json file has other things beside them
    format: str = "auto"
    fields: FieldsConfig = field(default_factory=FieldsConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        _one_of("target_set.format", self.format, DATA_FORMATS)
        if not self.path and not self.urls:
            raise ConfigError("target_set.path is empty; name a file with rows of what the model shall be good at")


@dataclass
class VerifiableTargetSetConfig(TargetSetConfig):
    """Right answers of the embedded world, to questions that its dataset and its benchmark do not ask."""

    tasks: list[str] = field(default_factory=lambda: ["sort", "reverse"])  # families of the embedded world
    limit: int | None = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.tasks or len(set(self.tasks)) < len(self.tasks):
            raise ConfigError(f"target_set.tasks={list(self.tasks)} must name at least one family, and each once")
        if self.limit is None:
            raise ConfigError("target_set.limit is empty; the embedded world needs the number of rows a task")


# -------------------------------------------------------------------------------------------- models


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
        _one_of("model.nano.architecture", self.architecture, ("gpt2", "llama"))
        _at_least("model.nano.steps", self.steps, 1)
        _at_least("model.nano.batch_size", self.batch_size, 1)
        _at_least("model.nano.seed", self.seed, 0)
        _positive("model.nano.learning_rate", self.learning_rate)
        _at_least("model.nano.prompt_loss_weight", self.prompt_loss_weight, 0)


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
        _one_of("model.kind", self.kind, ("pretrained", "nano", "smollm2", "tiny_bytes"))
        if self.kind == "pretrained" and not self.path:
            raise ConfigError("model.path is empty; give a hub id or a folder that holds a causal language model")


@dataclass
class LoraConfig:
    """Low-rank adapters (Hu et al., 2021)."""

    rank: int = 8
    alpha: float = 16.0  # the adapter's output is scaled by alpha / rank
    dropout: float = 0.0
    targets: list[str] = field(default_factory=lambda: ["all-linear"])

    def __post_init__(self) -> None:
        _at_least("lora.rank", self.rank, 1)
        _positive("lora.alpha", self.alpha)
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"lora.dropout={self.dropout} is no probability; give a number from 0 to below 1")
        if not self.targets:
            raise ConfigError("lora.targets is empty; name the linear layers, or [all-linear]")


TEMPLATES = ("alpaca", "chat", "plain")
SCHEDULES = ("constant", "linear")


def _check_training(group: str, config: ProxyConfig | TargetConfig) -> None:
    _one_of(f"{group}.template", config.template, TEMPLATES)
    _one_of(f"{group}.schedule", config.schedule, SCHEDULES)
    _at_least(f"{group}.max_length", config.max_length, 2)
    _at_least(f"{group}.batch_size", config.batch_size, 1)
    _at_least(f"{group}.warmup_steps", config.warmup_steps, 0)
    _at_least(f"{group}.weight_decay", config.weight_decay, 0)
    _positive(f"{group}.learning_rate", config.learning_rate)


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
    norm_scope: str = "all"  # LoRA factors in the norm; scaled: both, each over the size of the other factor
    learning_rate: float = 5e-5
    schedule: str = "constant"  # constant keeps an epoch's result independent of the number of epochs
    warmup_steps: int = 0
    weight_decay: float = 0.0
    batch_size: int = 8
    batching: str = "bucketed"  # bucketed: examples of like length share a batch; random: they do not

    def __post_init__(self) -> None:
        _check_training("proxy", self)
        _at_least("proxy.members", self.members, 1)
        _one_of("proxy.collect", self.collect, ("epoch_end", "during_training"))
        _one_of("proxy.norm_scope", self.norm_scope, ("all", "A", "B", "scaled"))
        self._check_kind()
        _one_of("proxy.batching", self.batching, ("bucketed", "random"))
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
        _one_of("proxy.ensemble", self.ensemble, ("lora_seeds", "bootstrap", "mc_dropout"))
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

    @property
    def total_epochs(self) -> int:
        return self.epochs if self.epochs is not None else self.snapshots[1]


@dataclass
class TargetConfig:
    """The model that is finetuned on the selection."""

    name: str = MISSING
    model: ModelConfig = MISSING
    lora: LoraConfig = field(default_factory=LoraConfig)
    template: str = "alpaca"
    max_length: int = 1024
    epochs: int | None = None  # either epochs or steps
    steps: int | None = None  # optimiser steps, the same for every selection: equal compute
    learning_rate: float = 2e-4
    schedule: str = "linear"
    warmup_steps: int = 0
    weight_decay: float = 0.0
    batch_size: int = 16  # examples an optimiser step
    batching: str = "random"  # a step of one length would be biased; within a step batches are of like length anyway

    def __post_init__(self) -> None:
        _check_training("target", self)
        _one_of("target.batching", self.batching, ("bucketed", "random"))
        _at_least("target.epochs", self.epochs, 1)
        _at_least("target.steps", self.steps, 1)
        if (self.epochs is None) == (self.steps is None):
            raise ConfigError("give either target.epochs or target.steps, and leave the other empty (null)")


# ------------------------------------------------------------------------------------------ embedder

POOLINGS = ("mean", "weighted_mean", "last")


@dataclass
class EmbedderConfig:
    """What turns the text of an example into a vector, for the methods that compare examples with each other."""

    name: str = MISSING
    text: str = "prompt_and_response"
    max_length: int = 1024  # tokens; what the model takes where that is less

    def __post_init__(self) -> None:
        _at_least("embedder.max_length", self.max_length, 2)


@dataclass
class HiddenStatesConfig(EmbedderConfig):
    """Last hidden states of the proxy's backbone, pooled over the tokens."""

    # prompt_and_response, prompt: in the proxy's template; instruction_input_output: a line each, whatever the template
    text: str = "prompt_and_response"
    pooling: str = "mean"  # weighted_mean: token t of 1..T weighs t; last: the last token alone

    def __post_init__(self) -> None:
        super().__post_init__()
        _one_of("embedder.text", self.text, ("prompt_and_response", "prompt", "instruction_input_output"))
        _one_of("embedder.pooling", self.pooling, POOLINGS)


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
        _one_of("embedder.text", self.text, ("instruction_input_output", "prompt"))


@dataclass
class WarmupConfig:
    """Training of the proxy's backbone on a few random rows before gradients are taken (LESS)."""

    share: float | None = 0.05  # of the rows; either share or rows
    rows: int | None = None  # all rows where the data has fewer
    epochs: int = 4  # each ends in a checkpoint
    learning_rate: float = 2e-5
    schedule: str = "linear"
    warmup_ratio: float = 0.03  # share of the optimiser steps in which the learning rate rises
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
        _one_of("features.warmup.schedule", self.schedule, SCHEDULES)
        _at_least("features.warmup.rows", self.rows, 1)
        _at_least("features.warmup.epochs", self.epochs, 1)
        _at_least("features.warmup.batch_size", self.batch_size, 1)
        _at_least("features.warmup.seed", self.seed, 0)
        _positive("features.warmup.learning_rate", self.learning_rate)
        if (self.share is None) == (self.rows is None):
            raise ConfigError(
                "give either features.warmup.share or features.warmup.rows, and leave the other empty (null)"
            )
        if self.share is not None and not 0 < self.share <= 1:
            raise ConfigError(
                f"features.warmup.share={self.share} is no share of the data; give a number above 0 and up to 1"
            )
        if not 0 <= self.warmup_ratio < 1:
            raise ConfigError(
                f"features.warmup.warmup_ratio={self.warmup_ratio} is no share; give a number from 0 to below 1"
            )


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
        _one_of("features.checkpoints", self.checkpoints, ("all", "last"))
        _one_of("features.gradient_params", self.gradient_params, ("lora", "full"))
        _at_least("features.dimensions", self.dimensions, 1)
        _at_least("features.projection_seed", self.projection_seed, 0)
        if self.adam and self.gradient_params == "full":
            raise ConfigError(
                "features.adam=true needs Adam's moments, which the warm-up has of the LoRA parameters alone; with "
                "features.gradient_params=full give features.adam=false"
            )


# ---------------------------------------------------------------------------- scores and selection


@dataclass
class ScorerConfig:
    """A scorer: `_target_` names a function whose positional parameters say what it needs (see scoring)."""

    _target_: str = MISSING
    name: str = MISSING


@dataclass
class GsnrConfig(ScorerConfig):
    """Constants of the Gradient Signal-to-Noise Ratio and of its ablations."""

    eps: float = 1e-8  # the paper gives none; in V_t's place it has units of norm squared

    def __post_init__(self) -> None:
        _positive("scorer.eps", self.eps)


@dataclass
class GsnrDirectionConfig(GsnrConfig):
    """Agreement with the mean gradient of the pool, alone or beside the G-SNR."""

    weigh: str = "none"  # gsnr: the cosine times the rank of the G-SNR among all examples, as a share

    def __post_init__(self) -> None:
        super().__post_init__()
        _one_of("scorer.weigh", self.weigh, ("none", "gsnr"))


@dataclass
class G2isConfig(ScorerConfig):
    """Agreement with the core knowledge of the target set (G2IS)."""

    explained: float = 0.5  # share of the target gradients' variance that the components explain

    def __post_init__(self) -> None:
        if not 0 < self.explained <= 1:
            raise ConfigError(f"scorer.explained={self.explained} is no share; give a number above 0 and up to 1")


@dataclass
class RandomScorerConfig(ScorerConfig):
    """Uniform scores."""

    seed: int = 0

    def __post_init__(self) -> None:
        _at_least("scorer.seed", self.seed, 0)


FIDELITIES = ("original", "fixed")


@dataclass
class SuperfilterConfig(ScorerConfig):
    """Instruction-following difficulty under the proxy's backbone (Superfiltering)."""

    max_length: int = 1024  # L of the published code
    fidelity: str = "fixed"  # original: with the published code's slips
    keep: str = "high"  # high: the published direction; low: ranks clean rows higher in noisy data

    def __post_init__(self) -> None:
        _at_least("scorer.max_length", self.max_length, 2)
        _one_of("scorer.fidelity", self.fidelity, FIDELITIES)
        _one_of("scorer.keep", self.keep, ("high", "low"))
        if (self.fidelity, self.keep) == ("original", "low"):
            raise ConfigError(
                "scorer.keep=low would put first the rows that scorer.fidelity=original gives an IFD of 0 because they "
                "could not be scored; take scorer.fidelity=fixed"
            )


@dataclass
class ScreenedSuperfilterConfig(ScorerConfig):
    """The same selection from bfloat16 scores, of which those that decide are scored again in float32."""

    max_length: int = 1024  # L of the published code
    calibration: int = 32  # random rows scored both ways, for bfloat16's error
    safety: float = 2.0  # error to be reckoned with, in largest errors measured

    def __post_init__(self) -> None:
        _at_least("scorer.max_length", self.max_length, 2)
        _at_least("scorer.calibration", self.calibration, 1)
        _at_least("scorer.safety", self.safety, 1)


@dataclass
class GradsConfig(ScorerConfig):
    """Representativeness, diversity and redundancy (GrADS); the paper's account gives none of these values."""

    weights: list[float] = field(default_factory=lambda: [1.0, 1.0, 1.0])  # w_g, w_d, w_s; 0 leaves a component out
    combine: str = "statistics"  # of embedding and head: their eight statistics, the two norms, or one norm over both
    bandwidth: Any = "scott"  # of the kernel density, in standard deviations of the signal; or scott
    region: str = "high"  # the density that is representative
    diversity: str = "spread"  # spread: one minus the mean cosine to the pool; words: rarity of the words
    neighbours: int = 1  # most similar others whose mean cosine is the redundancy
    scale: str = "rank"  # how each factor is brought to 0..1

    def __post_init__(self) -> None:
        if len(self.weights) != 3 or not any(self.weights):
            raise ConfigError(
                f"scorer.weights={list(self.weights)} must be three numbers, w_g, w_d and w_s, of which one is not 0, "
                "as in [1,1,1]"
            )
        for weight in self.weights:
            _at_least("scorer.weights", weight, 0)
        if self.bandwidth != "scott":
            if isinstance(self.bandwidth, bool) or not isinstance(self.bandwidth, int | float):
                raise ConfigError(f"scorer.bandwidth={self.bandwidth!r} is no number; give one above 0, or scott")
            _positive("scorer.bandwidth", self.bandwidth)
        _one_of("scorer.combine", self.combine, ("statistics", "norms", "norm"))
        _one_of("scorer.region", self.region, ("high", "low"))
        _one_of("scorer.diversity", self.diversity, ("spread", "words"))
        _one_of("scorer.scale", self.scale, ("rank", "minmax"))
        _at_least("scorer.neighbours", self.neighbours, 1)


@dataclass
class CherryConfig(ScorerConfig):
    """Instruction-following difficulty as a ratio of losses (Cherry)."""

    max_length: int = 512  # L of the published command
    fidelity: str = "fixed"  # original: a response is measured after it was cut

    def __post_init__(self) -> None:
        _at_least("scorer.max_length", self.max_length, 2)
        _one_of("scorer.fidelity", self.fidelity, FIDELITIES)


@dataclass
class PerplexityConfig(ScorerConfig):
    """Perplexity of the response under the proxy's backbone, without training."""

    prefer: str = "low"  # middle: closest to the median in the ranking

    def __post_init__(self) -> None:
        _one_of("scorer.prefer", self.prefer, ("low", "high", "middle"))


@dataclass
class LengthConfig(ScorerConfig):
    """Length of a part of the example."""

    unit: str = "tokens"  # of the proxy's tokenizer; characters ask for no model
    part: str = "response"
    prefer: str = "long"

    def __post_init__(self) -> None:
        _one_of("scorer.unit", self.unit, ("tokens", "characters"))
        _one_of("scorer.part", self.part, ("response", "prompt", "both"))
        _one_of("scorer.prefer", self.prefer, ("long", "short"))


@dataclass
class SbertConfig(ScorerConfig):
    """Similarity to a target set."""

    over: str = "mean"  # cosines to the target rows: their mean, or their max

    def __post_init__(self) -> None:
        _one_of("scorer.over", self.over, ("mean", "max"))


@dataclass
class RatingConfig(ScorerConfig):
    """Grades of each example by the run's judge (AlpaGasus, DEITA)."""

    style: str = "alpagasus"  # alpagasus: accuracy 0-5; deita: complexity 1-6 times quality 1-6

    def __post_init__(self) -> None:
        _one_of("scorer.style", self.style, ("alpagasus", "deita"))


@dataclass
class SelectorConfig:
    """A selector: `_target_` names a function of scores, budget and what it asks for (see selection)."""

    _target_: str = MISSING
    name: str = MISSING


@dataclass
class FacilityLocationConfig(SelectorConfig):
    """The best by score, of which those are taken that have something like every one of them (Superfiltering.D)."""

    similarity: str = "exp_distance"  # exp(-distance / dimensions) of the published code, or cosine
    candidates: float = 0.2  # share of the pool, by score, that enters; at least alpha

    def __post_init__(self) -> None:
        _one_of("selector.similarity", self.similarity, ("exp_distance", "cosine"))
        if not 0 < self.candidates <= 1:
            raise ConfigError(f"selector.candidates={self.candidates} is no share; give a number above 0 and up to 1")


@dataclass
class ReprFilterConfig(SelectorConfig):
    """The best that are not too much alike (DEITA)."""

    threshold: float = 0.9  # largest cosine of an example to those selected before it

    def __post_init__(self) -> None:
        if not -1 <= self.threshold <= 1:
            raise ConfigError(f"selector.threshold={self.threshold} is no cosine; give a number from -1 to 1")


@dataclass
class ClustersConfig(SelectorConfig):
    """The best of every k-means cluster of the embeddings."""

    clusters: int = 100
    allocation: str = "proportional"  # to the clusters' sizes; equal: as equal as these allow
    seed: int = 0  # of k-means

    def __post_init__(self) -> None:
        _at_least("selector.clusters", self.clusters, 1)
        _one_of("selector.allocation", self.allocation, ("proportional", "equal"))
        _at_least("selector.seed", self.seed, 0)


@dataclass
class GumbelConfig(SelectorConfig):
    """A draw without replacement in which high scores are likely."""

    temperature: float = 1.0  # standard deviations of the score that multiply an example's odds by e
    seed: int = 0

    def __post_init__(self) -> None:
        _positive("selector.temperature", self.temperature)
        _at_least("selector.seed", self.seed, 0)


@dataclass
class GradientWalkConfig(SelectorConfig):
    """Walks through gradients that agree with each other and with the target set's (G2IS)."""

    explained: float = 0.5  # share of the target gradients' variance that the components explain
    keep: float = 0.8  # share of its cosine with a component that the sum must keep with a further example
    fill: str = "strict"  # where the walks stop early: strict leaves a shortfall, topup adds the highest scores
    graph: bool = True  # false: the ablation with components alone
    neighbours: int | None = None  # of the last example that are looked at; all when empty

    def __post_init__(self) -> None:
        if not 0 < self.explained <= 1:
            raise ConfigError(f"selector.explained={self.explained} is no share; give a number above 0 and up to 1")
        if not 0 <= self.keep <= 1:
            raise ConfigError(f"selector.keep={self.keep} is no share; give a number from 0 to 1")
        _one_of("selector.fill", self.fill, ("strict", "topup"))
        _at_least("selector.neighbours", self.neighbours, 1)


# ---------------------------------------------------------------------------------------- evaluation


@dataclass
class BenchmarkSetConfig:
    """One benchmark: where its questions are and which (dotted) fields hold the parts."""

    path: str | None = None  # a local JSON or JSONL file; wins over `url`
    url: str | None = None  # fetched once at run time
    id: str | None = None  # the row number when empty
    instruction: str = "instruction"
    input: str | None = None
    reference: str | None = None  # the reference answer, for judge=verifier


def _benchmark_set(name: str, entry: Any) -> BenchmarkSetConfig:
    if isinstance(entry, BenchmarkSetConfig):
        return entry
    known = [f.name for f in dataclasses.fields(BenchmarkSetConfig)]
    for key, value in entry.items():
        if key not in known:
            raise ConfigError(f"benchmark.catalog.{name}.{key} is not known; an entry has {', '.join(known)}")
        if value is not None and not isinstance(value, str):
            raise ConfigError(f"benchmark.catalog.{name}.{key}={value!r} must be text")
    return BenchmarkSetConfig(**entry)


@dataclass
class BenchmarkConfig:
    """Which questions the finetuned models answer, and how."""

    sets: list[str] = field(default_factory=list)
    catalog: dict[str, Any] = field(default_factory=dict)  # name: BenchmarkSetConfig, or its fields
    upstream: str | None = None  # base address that the catalog's entries may refer to
    limit: int | None = None  # the first items of each set
    max_new_tokens: int = 512
    batch_size: int = 16

    def __post_init__(self) -> None:
        _at_least("benchmark.limit", self.limit, 1)
        _at_least("benchmark.max_new_tokens", self.max_new_tokens, 1)
        _at_least("benchmark.batch_size", self.batch_size, 1)
        if len(set(self.sets)) < len(self.sets):
            raise ConfigError(f"benchmark.sets={list(self.sets)} names a set twice; name each once")
        if not self.sets:
            raise ConfigError("benchmark.sets is empty; name at least one, as in benchmark.sets=[vicuna]")
        self.catalog = {name: _benchmark_set(name, entry) for name, entry in self.catalog.items()}
        for name in self.sets:
            if name != EMBEDDED and name not in self.catalog:
                known = ", ".join([EMBEDDED, *self.catalog])
                raise ConfigError(
                    f"benchmark.sets names {name!r}, which benchmark.catalog does not hold; known: {known}"
                )


@dataclass
class JudgeConfig:
    """A judge gives each answer of a pair a score; every pair is judged in both orders."""

    name: str = MISSING
    bootstrap: int = 2000  # resamples of the items for the PWS interval
    confidence: float = 0.95

    def __post_init__(self) -> None:
        _at_least("judge.bootstrap", self.bootstrap, 1)
        if not 0 < self.confidence < 1:
            raise ConfigError(f"judge.confidence={self.confidence} must lie between 0 and 1")


@dataclass
class VerifierJudgeConfig(JudgeConfig):
    """Grades an answer 1 if it equals the reference answer, else 0."""


@dataclass
class LocalJudgeConfig(JudgeConfig):
    """Compares the log-probability of A and B under a local model: a plumbing check for small models."""

    model: ModelConfig = MISSING
    max_length: int = 2048
    batch_size: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least("judge.max_length", self.max_length, 16)
        _at_least("judge.batch_size", self.batch_size, 1)


@dataclass
class OpenaiJudgeConfig(JudgeConfig):
    """The paper's 1-10 protocol on any OpenAI-compatible endpoint."""

    model: str = "gpt-4o"
    base_url: str | None = None  # the client's own default when empty
    api_key_env: str = "OPENAI_API_KEY"  # name of the variable; the key itself never enters the config
    temperature: float = 0.0
    max_tokens: int = 256
    timeout: float = 60.0  # seconds a request
    retries: int = 5  # of a request that failed, with exponential backoff; the endpoint's Retry-After is heeded
    max_wait: float = 120.0  # seconds; a longer Retry-After ends the run, to be gone on with later
    give_up: int = 10  # so many requests in a row that failed for good end the run
    concurrency: int = 4  # requests at a time
    parse: str = "tolerant"  # how scores are read; legacy: the published rule, which makes an unread reply a tie
    dry_run: bool = False  # say what would be sent and what it would cost, and end there
    price_input: float | None = None  # USD a million prompt tokens; unknown when empty
    price_output: float | None = None  # USD a million reply tokens
    max_usd: float | None = None  # spending cap of one stage, over all its runs; needs both prices
    max_calls: int | None = None  # the same, in requests

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least("judge.retries", self.retries, 0)
        _at_least("judge.max_wait", self.max_wait, 0)
        _at_least("judge.give_up", self.give_up, 1)
        _at_least("judge.concurrency", self.concurrency, 1)
        _at_least("judge.max_tokens", self.max_tokens, 1)
        _at_least("judge.temperature", self.temperature, 0)
        _one_of("judge.parse", self.parse, ("strict", "tolerant", "legacy"))
        if self.base_url and "@" in self.base_url:
            raise ConfigError(
                "judge.base_url holds a user name or password, which would be written to the run's folder; "
                f"put the key into the environment variable {self.api_key_env}"
            )
        _positive("judge.timeout", self.timeout)
        self._check_money()

    def _check_money(self) -> None:
        _at_least("judge.price_input", self.price_input, 0)
        _at_least("judge.price_output", self.price_output, 0)
        _at_least("judge.max_calls", self.max_calls, 1)
        if self.max_usd is not None:
            _positive("judge.max_usd", self.max_usd)
        if (self.price_input is None) != (self.price_output is None):
            raise ConfigError("give both judge.price_input and judge.price_output, or neither")
        if self.max_usd is not None and self.price_input is None:
            raise ConfigError(
                f"judge.max_usd={self.max_usd:g} needs judge.price_input and judge.price_output (USD a million "
                "tokens); give them, or cap the requests with judge.max_calls"
            )


@dataclass
class AuditConfig:
    """How well the scorer keeps known corruption out (see report/audit.py)."""

    enabled: bool = False
    alphas: list[float] = field(default_factory=lambda: [0.05, 0.1, 0.15])  # shares selected for the audit alone
    clusters: int = 30  # of the prompts, where the data has no families

    def __post_init__(self) -> None:
        _at_least("audit.clusters", self.clusters, 2)
        if not self.alphas or len(set(self.alphas)) < len(self.alphas):
            raise ConfigError(f"audit.alphas={list(self.alphas)} must name at least one share, and each once")
        for alpha in self.alphas:
            if not 0 < alpha <= 1:
                raise ConfigError(f"audit.alphas holds {alpha}, which is no share; give numbers above 0 and up to 1")


# ------------------------------------------------------------------------------ tracking and machine


@dataclass
class TrackerConfig:
    """Where metrics go besides the run folder."""

    name: str = MISSING  # wandb or none
    mode: str = "offline"  # offline runs are sent later with `wandb sync`
    project: str = "gradsift"
    entity: str | None = None
    group: str | None = None  # the sweep's folder name when empty

    def __post_init__(self) -> None:
        _one_of("tracker.name", self.name, ("wandb", "none"))
        _one_of("tracker.mode", self.mode, ("offline", "online"))


@dataclass
class ComputeConfig:
    """The machine."""

    device: str = "auto"  # auto: cuda where there is one, else cpu
    precision: str = "float32"  # bfloat16: frozen weights and products; LoRA weights, norms and residual stream float32
    tokens: int | None = None  # padded tokens that pass through a model at once; what suits it when empty
    threads: int | None = None  # torch's own choice when empty

    def __post_init__(self) -> None:
        _one_of("compute.device", self.device, ("auto", "cpu", "cuda"))
        _one_of("compute.precision", self.precision, ("float32", "bfloat16"))
        _at_least("compute.tokens", self.tokens, 1)
        _at_least("compute.threads", self.threads, 1)

    @property
    def numerics(self) -> dict[str, str]:
        """What a result of a model depends on, for the settings of a stage; of these options no other one matters."""
        if self.precision == "float32":
            return {"precision": "float32"}
        return {"precision": self.precision, "residual": "float32"}  # results from before it was are other results


@dataclass
class Config:
    """Everything that a run depends on."""

    data: DataConfig = MISSING
    target_set: TargetSetConfig = MISSING
    proxy: ProxyConfig = MISSING
    embedder: EmbedderConfig = MISSING
    features: FeaturesConfig = MISSING
    scorer: Any = MISSING  # an open set: see ScorerConfig
    selector: Any = MISSING  # an open set: see SelectorConfig
    target: TargetConfig = MISSING
    benchmark: BenchmarkConfig = MISSING
    judge: JudgeConfig = MISSING
    tracker: TrackerConfig = MISSING
    compute: ComputeConfig = MISSING
    audit: AuditConfig = field(default_factory=AuditConfig)
    alpha: float = 0.1  # share of the rows that is selected
    budget_base: str = "accepted"  # alpha's base: all accepted rows, or those that got a score
    seed: int = 0  # proxy ensemble and target
    stop_after: str | None = None  # a stage's name ends the line there
    artifacts: str = "artifacts"  # folder of finished work, shared by all runs

    def __post_init__(self) -> None:
        if not 0 < self.alpha <= 1:
            raise ConfigError(
                f"alpha={self.alpha} is no share of the data; give a number above 0 and up to 1, as in 0.1"
            )
        _one_of("budget_base", self.budget_base, ("accepted", "scored"))
        _at_least("seed", self.seed, 0)
        if self.stop_after is not None:
            _one_of("stop_after", self.stop_after, STAGES)
        self._check_ensemble()
        self._check_screening()
        self._check_candidates()
        self._check_turns()
        self._check_embedded_parts()
        self._check_random_weights()
        if self.audit.enabled:
            self._check_audit()
        if self.reaches("scores") and self.scorer_name == "llm_rating":
            self.check_rater()
        if self.reaches("judge") and self.scorer_name != "full":  # full against itself needs no judge
            self._check_judge()

    @property
    def scorer_name(self) -> str:
        """The scorer's name, for a scorer of ours or of the user's own."""
        name = self.scorer.get("name", "?") if isinstance(self.scorer, dict) else self.scorer.name
        return str(name)

    @property
    def selector_name(self) -> str:
        """The selector's name, likewise."""
        name = self.selector.get("name", "?") if isinstance(self.selector, dict) else self.selector.name
        return str(name)

    def reaches(self, stage: str) -> bool:
        """Whether a run with this config comes as far as `stage`."""
        return self.stop_after is None or STAGES.index(stage) <= STAGES.index(self.stop_after)

    @property
    def _scores_without_proxy(self) -> bool:
        by_similarity = self.scorer_name in ("rds_plus", "sbert")
        encoded_apart = by_similarity and isinstance(self.embedder, SentenceTransformersConfig)
        counts_characters = isinstance(self.scorer, LengthConfig) and self.scorer.unit == "characters"
        return self.scorer_name in ("random", "full") or encoded_apart or counts_characters

    def _check_ensemble(self) -> None:
        divides = self.scorer_name in ("gsnr", "gsnr_variance_normalized")
        divides |= isinstance(self.scorer, GsnrDirectionConfig) and self.scorer.weigh == "gsnr"
        if divides and self.proxy.members < 2:
            raise ConfigError(
                f"scorer={self.scorer.name} divides by a variance over members, but proxy.members="
                f"{self.proxy.members}; give at least 2 (the paper has 5)"
            )

    def _check_screening(self) -> None:
        if self.scorer_name == "superfilter_screened" and self.compute.precision != "float32":
            raise ConfigError(
                "scorer=superfilter_screened refines bfloat16 scores in float32, which compute.precision="
                f"{self.compute.precision} rules out; take compute.precision=float32, or scorer=superfilter"
            )

    def _check_candidates(self) -> None:
        if not isinstance(self.selector, FacilityLocationConfig) or not self.reaches("selection"):
            return
        if self.budget_base == "accepted" and self.selector.candidates < self.alpha:
            raise ConfigError(
                f"selector.candidates={self.selector.candidates} lets fewer examples enter than alpha={self.alpha} "
                "selects; raise selector.candidates, or lower alpha below it"
            )

    def _check_turns(self) -> None:
        """Of a scorer of the user's own nothing is known here; the selector itself looks at its scores."""
        takes_turns = self.selector_name == "round_robin" and self.reaches("selection") and self.scorer_name != "full"
        is_ours = isinstance(self.scorer, ScorerConfig) and self.scorer._target_.startswith("gradsift.")
        if takes_turns and is_ours and self.scorer_name not in SCORES_BY_TASK:
            raise ConfigError(
                f"selector=round_robin takes turns between tasks, and scorer={self.scorer_name} gives no score a task; "
                f"choose scorer={', '.join(SCORES_BY_TASK)} with a target_set, or selector=topk"
            )

    def _check_embedded_parts(self) -> None:
        """The nano models and the embedded benchmark know nothing outside the embedded world."""
        # a set of the user's own may keep to the embedded world's words; the published ones do not
        foreign_sets = [name for name in self.benchmark.sets if name != EMBEDDED and self.benchmark.catalog[name].url]
        if self.reaches("generate") and self.target.model.kind == "nano" and foreign_sets and self._is_embedded:
            raise ConfigError(
                f"target=nano knows the embedded world's words alone and cannot answer benchmark.sets={foreign_sets}; "
                "take benchmark=verifiable or another target"
            )
        if self._is_embedded:
            return
        foreign = []
        if isinstance(self.target_set, VerifiableTargetSetConfig):
            foreign.append("target_set=verifiable (choose target_set=json target_set.path=FILE)")
        if self.proxy.model.kind == "nano" and not self._scores_without_proxy:
            foreign.append("proxy=nano (choose proxy=smollm2 or proxy=gpt2)")
        if self.reaches("finetune") and self.target.model.kind == "nano":
            foreign.append("target=nano (choose target=smollm2 or target=llama2_7b, or stop_after=selection)")
        if self.reaches("generate") and EMBEDDED in self.benchmark.sets:
            foreign.append("benchmark=verifiable (choose benchmark=vicuna, or stop_after=selection)")
        if foreign:
            raise ConfigError(f"data={self.data.name} does not go with the embedded world's {'; '.join(foreign)}")

    def _check_random_weights(self) -> None:
        """A model of random weights takes any data, but for scores alone: it has no answer and no judgment to give."""
        if self.reaches("finetune") and self.target.model.kind == "tiny_bytes":
            raise ConfigError(
                "target.model.kind=tiny_bytes has random weights, so no answer of it means anything; "
                "take another target, or stop_after=selection"
            )
        judge = getattr(self.judge, "model", None)
        if self.reaches("judge") and isinstance(judge, ModelConfig) and judge.kind == "tiny_bytes":
            raise ConfigError("judge.model.kind=tiny_bytes has random weights and cannot judge; take another judge")

    def _check_audit(self) -> None:
        if not self.reaches("selection"):
            raise ConfigError(
                f"audit.enabled looks at selections, but stop_after={self.stop_after}; take stop_after=selection"
            )
        spoilt = self.data.spoilt if isinstance(self.data, VerifiableDataConfig) else 0.0
        if not self.data.corruption.share and not spoilt:
            raise ConfigError(
                f"audit.enabled compares scores with known corruption, of which data={self.data.name} has none; inject "
                "some with data.corruption.share, as in data.corruption.share=0.3"
            )
        if self.scorer_name == "superfilter_screened":
            raise ConfigError(
                "scorer=superfilter_screened makes scores for one alpha, and an audit looks at audit.alphas="
                f"{list(self.audit.alphas)}; take scorer=superfilter"
            )

    def check_rater(self) -> None:
        """Refuse a judge that cannot rate single examples of this run's data."""
        name = self.judge.name
        if name not in RATERS:
            raise ConfigError(f"scorer={self.scorer_name} needs a judge that can rate one example; judge={name} cannot")
        if name == "verifier" and not self._is_embedded:
            raise ConfigError(
                f"judge=verifier knows the right answers of data={EMBEDDED} alone and cannot rate "
                f"data={self.data.name} for scorer={self.scorer_name}; choose judge=openai or judge=local"
            )
        model = getattr(self.judge, "model", None)
        if isinstance(model, ModelConfig) and model.kind == "tiny_bytes":
            raise ConfigError("judge.model.kind=tiny_bytes has random weights and cannot rate; take another judge")

    @property
    def _is_embedded(self) -> bool:
        return self.data.name == EMBEDDED

    def _check_judge(self) -> None:
        if self.judge.name != "verifier":
            return
        bare = [n for n in self.benchmark.sets if n != EMBEDDED and self.benchmark.catalog[n].reference is None]
        if bare:
            raise ConfigError(
                f"judge=verifier needs reference answers, which benchmark.sets={bare} do not have; "
                "choose judge=openai or judge=local"
            )


# ------------------------------------------------------------------------------------ Hydra boundary

SCHEMAS: dict[str, dict[str, type]] = {
    "data": {"json": JsonDataConfig, "hub": HubDataConfig, "verifiable": VerifiableDataConfig},
    "target_set": {
        "target_set": TargetSetConfig,
        "files": FilesTargetSetConfig,
        "verifiable_tasks": VerifiableTargetSetConfig,
    },
    "proxy": {"proxy": ProxyConfig},
    "features": {"features": FeaturesConfig},
    "target": {"target": TargetConfig},
    "embedder": {"hidden_states": HiddenStatesConfig, "sentence_transformers": SentenceTransformersConfig},
    "scorer": {
        "scorer": ScorerConfig,
        "gsnr": GsnrConfig,
        "gsnr_direction": GsnrDirectionConfig,
        "g2is": G2isConfig,
        "llm_rating": RatingConfig,
        "random": RandomScorerConfig,
        "superfilter": SuperfilterConfig,
        "superfilter_screened": ScreenedSuperfilterConfig,
        "grads": GradsConfig,
        "cherry": CherryConfig,
        "perplexity": PerplexityConfig,
        "length": LengthConfig,
        "sbert": SbertConfig,
    },
    "selector": {
        "selector": SelectorConfig,
        "facility_location": FacilityLocationConfig,
        "repr_filter": ReprFilterConfig,
        "clusters": ClustersConfig,
        "gumbel": GumbelConfig,
        "gradient_walk": GradientWalkConfig,
    },
    "benchmark": {"benchmark": BenchmarkConfig},
    "judge": {"verifier": VerifierJudgeConfig, "local": LocalJudgeConfig, "openai": OpenaiJudgeConfig},
    "tracker": {"tracker": TrackerConfig},
    "compute": {"compute": ComputeConfig},
    "model": {"model": ModelConfig},
}


def register_schemas() -> None:
    """Make the dataclasses known to Hydra as `schema/<group>/<variant>`."""
    from hydra.core.config_store import ConfigStore

    store = ConfigStore.instance()
    store.store(name="schema", node=Config)
    for group, variants in SCHEMAS.items():
        for name, node in variants.items():
            store.store(group=f"schema/{group}", name=name, node=node)


def load_config(composed: DictConfig) -> Config:
    """Convert a composed config into checked dataclasses.

    Raises:
        ConfigError: an option is missing, unknown or has a value that cannot be used.
    """
    try:
        missing = sorted(OmegaConf.missing_keys(composed))
        if missing:
            raise ConfigError(f"{missing[0]} is not set; give it as in {missing[0]}=VALUE")
        config = OmegaConf.to_object(composed)
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        if match := re.search(r"Environment variable '(\w+)' not found", reason):
            reason = f"the environment variable {match[1]} is not set; the YAML file's header says to what"
        raise ConfigError(reason) from error
    if not isinstance(config, Config):
        raise ConfigError("the config was not composed from conf/config.yaml: its first default must be `schema`")
    return config


def dump_config(config: Config) -> dict[str, Any]:
    """A config as plain values, with the schema of each group beside them, so that `restore_config` can read it."""
    values = dataclasses.asdict(config)
    schemas: dict[str, str] = {}
    for group, variants in SCHEMAS.items():
        for name, schema in variants.items():
            if type(getattr(config, group, None)) is schema:
                schemas[group] = name
    return {"schemas": schemas, "values": values}


def restore_config(dumped: dict[str, Any]) -> Config:
    """The config that `dump_config` described, checked again.

    Raises:
        ConfigError: it is not such a description, or was written by a version with other options.
    """
    try:
        composed = OmegaConf.structured(Config)
        for group, schema in dumped["schemas"].items():
            composed[group] = OmegaConf.structured(SCHEMAS[group][schema])
        return load_config(OmegaConf.merge(composed, dumped["values"]))  # type: ignore[arg-type]
    except (KeyError, TypeError, OmegaConfBaseException) as error:
        raise ConfigError(f"this run's config cannot be read by this version of gradsift ({error})") from error
