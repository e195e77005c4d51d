"""Scorers and selectors: the constants of their formulas."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from omegaconf import MISSING

from gradsift.config.checks import Group, in_range, option
from gradsift.errors import ConfigError

FIDELITIES = ("original", "fixed")


@dataclass
class ScorerConfig(Group, option="scorer"):
    """A scorer: `_target_` names a function whose positional parameters say what it needs (see gradsift.scoring)."""

    _target_: str = MISSING
    name: str = MISSING


@dataclass
class PublishedConfig(ScorerConfig):
    """Scores of `data.scores`, which sets it."""

    _target_: str = "gradsift.scoring.published.published"
    name: str = "published"


@dataclass
class GsnrConfig(ScorerConfig):
    """The Gradient Signal-to-Noise Ratio and its ablations."""

    eps: float = option(1e-8, above=0)  # the paper gives none; added to V_t, so its unit is the norm's squared


@dataclass
class GsnrDirectionConfig(GsnrConfig):
    """Cosine between an example's gradient and the mean gradient of the pool, alone or combined with G-SNR."""

    # gsnr: the cosine times the rank of the example's G-SNR among all examples, as a share
    weigh: str = option("none", choices=("none", "gsnr"))


@dataclass
class ContrastConfig(ScorerConfig):
    """Contrast of an answer's loss with those of similar prompts."""

    neighbours: int = option(50, least=2)  # k, the most similar other prompts
    end_share: float = option(0.33, least=0, most=1)  # w, share of the answer's last token in its loss
    # v, how much an answer loses if its own prompt makes it hardly likelier than another example's prompt does
    prompt_weight: float = option(4.0, least=0)
    caution: float = option(1.0, least=0)  # standard deviations over the members that are subtracted
    saturation: float = option(0.2, least=0, most=1)  # best share of the rows, among which rows are drawn at random
    seed: int = option(0, least=0)  # draws them


@dataclass
class G2isConfig(ScorerConfig):
    """Agreement with the core knowledge of the target set (G2IS)."""

    explained: float = option(0.5, above=0, most=1)  # share of the target gradients' variance in the components


@dataclass
class RandomScorerConfig(ScorerConfig):
    """Uniform random scores."""

    seed: int = option(0, least=0)  # draws the scores


@dataclass
class SuperfilterConfig(ScorerConfig):
    """Instruction-following difficulty under the proxy's backbone (Superfiltering)."""

    max_length: int = option(1024, least=2)  # tokens; L of the published code
    fidelity: str = option("fixed", choices=FIDELITIES)  # original: with the errors of the published code
    # high: as published; low: ranks clean rows higher in noisy data
    keep: str = option("high", choices=("high", "low"))

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.fidelity, self.keep) == ("original", "low"):
            raise ConfigError(
                "scorer.keep=low would put first the rows that scorer.fidelity=original gives an IFD of 0 because they "
                "could not be scored; take scorer.fidelity=fixed"
            )


@dataclass
class GradsConfig(ScorerConfig):
    """Representativeness, diversity and redundancy (GrADS). The paper gives none of these values."""

    weights: list[float] = option([1.0, 1.0, 1.0], least=0)  # w_g, w_d, w_s; 0 leaves a component out
    # of the gradients of embedding and head: their eight statistics, their two norms, or one norm over both
    combine: str = option("statistics", choices=("statistics", "norms", "norm"))
    bandwidth: Any = "scott"  # of the kernel density: a number of standard deviations of the signal, or scott
    region: str = option("high", choices=("high", "low"))  # the density that counts as representative
    # spread: one minus the mean cosine to the pool; words: rarity of the words
    diversity: str = option("spread", choices=("spread", "words"))
    neighbours: int = option(1, least=1)  # redundancy is the mean cosine to this many most similar examples
    scale: str = option("rank", choices=("rank", "minmax"))  # how each factor is mapped to 0..1

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.weights) != 3 or not any(self.weights):
            raise ConfigError(
                f"scorer.weights={list(self.weights)} must be three numbers, w_g, w_d and w_s, of which one is not 0, "
                "as in [1,1,1]"
            )
        if self.bandwidth != "scott":
            if isinstance(self.bandwidth, bool) or not isinstance(self.bandwidth, int | float):
                raise ConfigError(f"scorer.bandwidth={self.bandwidth!r} is no number; give one above 0, or scott")
            in_range("scorer.bandwidth", self.bandwidth, above=0)


@dataclass
class CherryConfig(ScorerConfig):
    """Instruction-following difficulty as a ratio of losses (Cherry)."""

    max_length: int = option(512, least=2)  # tokens; L of the published command
    fidelity: str = option("fixed", choices=FIDELITIES)  # original: measures a response after it was cut


@dataclass
class PerplexityConfig(ScorerConfig):
    """Perplexity of the response under the proxy's backbone, without training."""

    prefer: str = option("low", choices=("low", "high", "middle"))  # middle: closest to the median in the ranking


@dataclass
class LengthConfig(ScorerConfig):
    """Length of a part of the example."""

    unit: str = option("tokens", choices=("tokens", "characters"))  # tokens of the proxy; characters need no model
    part: str = option("response", choices=("response", "prompt", "both"))  # of the example that is measured
    prefer: str = option("long", choices=("long", "short"))  # which examples score high


@dataclass
class SbertConfig(ScorerConfig):
    """Similarity to a target set."""

    over: str = option("mean", choices=("mean", "max"))  # which of the cosines to the target rows


@dataclass
class RatingConfig(ScorerConfig):
    """Grades of each example by the run's judge (AlpaGasus, DEITA)."""

    # alpagasus: accuracy 0-5; deita: complexity 1-6 times quality 1-6
    style: str = option("alpagasus", choices=("alpagasus", "deita"))


@dataclass
class SelectorConfig(Group, option="selector"):
    """A selector: `_target_` names a function of scores, budget and what it asks for (see gradsift.selection)."""

    _target_: str = MISSING
    name: str = MISSING


@dataclass
class FacilityLocationConfig(SelectorConfig):
    """Among the best by score, keep those that together are most similar to all of them (Superfiltering.D)."""

    # exp_distance: exp(-distance / dimensions), as in the published code
    similarity: str = option("exp_distance", choices=("exp_distance", "cosine"))
    candidates: float = option(0.2, above=0, most=1)  # share of the pool, the best by score; at least alpha


@dataclass
class ReprFilterConfig(SelectorConfig):
    """The best that are not too similar to each other (DEITA)."""

    threshold: float = option(0.9, least=-1, most=1)  # largest cosine to an example selected before


@dataclass
class ClustersConfig(SelectorConfig):
    """The best of every k-means cluster of the embeddings."""

    clusters: int = option(100, least=1)  # k of k-means
    # proportional: to the size of a cluster; equal: as equal as the sizes allow
    allocation: str = option("proportional", choices=("proportional", "equal"))
    seed: int = option(0, least=0)  # of k-means


@dataclass
class QuotasConfig(SelectorConfig):
    """The highest scores of every group of rows, whose shares of the selection are given."""

    column: str = "source"  # column of the data that names a row's group; data=mixture writes `source`
    # weight of each group, as in 'selector.shares={code: 1, chat: 3}'; null: the share that it has in the pool
    shares: Any = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shares is None:
            return
        numbers = isinstance(self.shares, dict) and all(isinstance(each, int | float) for each in self.shares.values())
        if not numbers or not any(self.shares.values()):
            raise ConfigError(
                f"selector.shares={self.shares!r} gives no group a weight above 0; give weights as in "
                "'selector.shares={code: 1, chat: 3}'"
            )
        for name, share in self.shares.items():
            in_range(f"selector.shares.{name}", share, least=0)


@dataclass
class GumbelConfig(SelectorConfig):
    """A random draw without replacement that favours high scores."""

    temperature: float = option(1.0, above=0)  # standard deviations of the score that multiply the odds by e
    seed: int = option(0, least=0)  # draws the noise


@dataclass
class RoundRobinQueriesConfig(SelectorConfig):
    """The target rows take turns and pick by cosine (RDS+)."""

    # original: a target row whose pick is already taken loses its turn, as in the published scripts; fixed: it picks
    # the next free row
    fidelity: str = option("original", choices=FIDELITIES)


@dataclass
class GradientWalkConfig(SelectorConfig):
    """Walks through gradients that agree with each other and with the target set's (G2IS)."""

    explained: float = option(0.5, above=0, most=1)  # share of the target gradients' variance in the components
    keep: float = option(0.8, least=0, most=1)  # share of its cosine to a component that the sum must keep at each step
    # where the walks stop early, strict leaves a shortfall and topup adds the highest scores
    fill: str = option("strict", choices=("strict", "topup"))
    graph: bool = True  # false: the ablation with components alone
    neighbours: int | None = option(None, least=1)  # a step looks at this many nearest examples; null: at all
