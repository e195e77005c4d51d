"""Scorers and selectors: the constants of their formulas."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from gradsift.config.checks import at_least, one_of, positive
from gradsift.errors import ConfigError


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
        positive("scorer.eps", self.eps)


@dataclass
class GsnrDirectionConfig(GsnrConfig):
    """Agreement with the mean gradient of the pool, alone or beside the G-SNR."""

    weigh: str = "none"  # gsnr: the cosine times the rank of the G-SNR among all examples, as a share

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("scorer.weigh", self.weigh, ("none", "gsnr"))


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
        at_least("scorer.seed", self.seed, 0)


FIDELITIES = ("original", "fixed")


@dataclass
class SuperfilterConfig(ScorerConfig):
    """Instruction-following difficulty under the proxy's backbone (Superfiltering)."""

    max_length: int = 1024  # L of the published code
    fidelity: str = "fixed"  # original: with the published code's slips
    keep: str = "high"  # high: the published direction; low: ranks clean rows higher in noisy data

    def __post_init__(self) -> None:
        at_least("scorer.max_length", self.max_length, 2)
        one_of("scorer.fidelity", self.fidelity, FIDELITIES)
        one_of("scorer.keep", self.keep, ("high", "low"))
        if (self.fidelity, self.keep) == ("original", "low"):
            raise ConfigError(
                "scorer.keep=low would put first the rows that scorer.fidelity=original gives an IFD of 0 because they "
                "could not be scored; take scorer.fidelity=fixed"
            )


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
            at_least("scorer.weights", weight, 0)
        if self.bandwidth != "scott":
            if isinstance(self.bandwidth, bool) or not isinstance(self.bandwidth, int | float):
                raise ConfigError(f"scorer.bandwidth={self.bandwidth!r} is no number; give one above 0, or scott")
            positive("scorer.bandwidth", self.bandwidth)
        one_of("scorer.combine", self.combine, ("statistics", "norms", "norm"))
        one_of("scorer.region", self.region, ("high", "low"))
        one_of("scorer.diversity", self.diversity, ("spread", "words"))
        one_of("scorer.scale", self.scale, ("rank", "minmax"))
        at_least("scorer.neighbours", self.neighbours, 1)


@dataclass
class CherryConfig(ScorerConfig):
    """Instruction-following difficulty as a ratio of losses (Cherry)."""

    max_length: int = 512  # L of the published command
    fidelity: str = "fixed"  # original: a response is measured after it was cut

    def __post_init__(self) -> None:
        at_least("scorer.max_length", self.max_length, 2)
        one_of("scorer.fidelity", self.fidelity, FIDELITIES)


@dataclass
class PerplexityConfig(ScorerConfig):
    """Perplexity of the response under the proxy's backbone, without training."""

    prefer: str = "low"  # middle: closest to the median in the ranking

    def __post_init__(self) -> None:
        one_of("scorer.prefer", self.prefer, ("low", "high", "middle"))


@dataclass
class LengthConfig(ScorerConfig):
    """Length of a part of the example."""

    unit: str = "tokens"  # of the proxy's tokenizer; characters ask for no model
    part: str = "response"
    prefer: str = "long"

    def __post_init__(self) -> None:
        one_of("scorer.unit", self.unit, ("tokens", "characters"))
        one_of("scorer.part", self.part, ("response", "prompt", "both"))
        one_of("scorer.prefer", self.prefer, ("long", "short"))


@dataclass
class SbertConfig(ScorerConfig):
    """Similarity to a target set."""

    over: str = "mean"  # cosines to the target rows: their mean, or their max

    def __post_init__(self) -> None:
        one_of("scorer.over", self.over, ("mean", "max"))


@dataclass
class RatingConfig(ScorerConfig):
    """Grades of each example by the run's judge (AlpaGasus, DEITA)."""

    style: str = "alpagasus"  # alpagasus: accuracy 0-5; deita: complexity 1-6 times quality 1-6

    def __post_init__(self) -> None:
        one_of("scorer.style", self.style, ("alpagasus", "deita"))


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
        one_of("selector.similarity", self.similarity, ("exp_distance", "cosine"))
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
        at_least("selector.clusters", self.clusters, 1)
        one_of("selector.allocation", self.allocation, ("proportional", "equal"))
        at_least("selector.seed", self.seed, 0)


@dataclass
class GumbelConfig(SelectorConfig):
    """A draw without replacement in which high scores are likely."""

    temperature: float = 1.0  # standard deviations of the score that multiply an example's odds by e
    seed: int = 0

    def __post_init__(self) -> None:
        positive("selector.temperature", self.temperature)
        at_least("selector.seed", self.seed, 0)


@dataclass
class RoundRobinQueriesConfig(SelectorConfig):
    """The target rows take turns and pick by cosine (RDS+)."""

    # original: a row that is taken costs the turn, as in the published scripts; fixed: the next free row is picked
    fidelity: str = "original"

    def __post_init__(self) -> None:
        one_of("selector.fidelity", self.fidelity, FIDELITIES)


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
        one_of("selector.fill", self.fill, ("strict", "topup"))
        at_least("selector.neighbours", self.neighbours, 1)
