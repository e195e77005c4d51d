"""Options of the scorers and selectors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from omegaconf import MISSING

from gradsift.config.checks import Group, in_range, option
from gradsift.errors import ConfigError

FIDELITIES = ("original", "fixed")


@dataclass
class ScorerConfig(Group, option="scorer", schema="scorer"):
    """A scorer: `_target_` names a function whose positional parameters say what it needs (see gradsift.scoring)."""

    _target_: str = MISSING
    name: str = MISSING


@dataclass
class PublishedConfig(ScorerConfig, schema="published"):
    """The scores of the file `data.scores`; this scorer is chosen by setting that option."""

    _target_: str = "gradsift.scoring.published.published"
    name: str = "published"


@dataclass
class GsnrConfig(ScorerConfig, schema="gsnr"):
    """The Gradient Signal-to-Noise Ratio and its ablations."""

    # added to the mean early norm G_s, and to the variance V_t of the late norm over the members (in units of a norm
    # and of its square); the paper gives no value
    eps: float = option(1e-8, above=0)


@dataclass
class GsnrDirectionConfig(GsnrConfig, schema="gsnr_direction"):
    """Cosine between an example's gradient and the mean gradient of the pool, alone or combined with G-SNR."""

    # gsnr: multiply the cosine by the share of examples whose G-SNR is not above the example's
    weigh: str = option("none", choices=("none", "gsnr"))


@dataclass
class ContrastConfig(ScorerConfig, schema="contrast"):
    """Contrast of an answer's loss with the losses of answers to similar prompts."""

    neighbours: int = option(50, least=2)  # k, number of most similar other prompts
    end_share: float = option(0.33, least=0, most=1)  # w, weight of an answer's last token in its loss
    # v, how much the score falls if the answer is hardly likelier after its own prompt than after another example's
    prompt_weight: float = option(4.0, least=0)
    like_length: int = option(100, least=2)  # number of answers of like length whose gains are compared
    caution: float = option(1.0, least=0)  # how many standard deviations over the members are subtracted from the score
    # the best rows, up to this share of all rows, get random scores above all other scores
    saturation: float = option(0.2, least=0, most=1)
    seed: int = option(0, least=0)  # seed of the random scores


@dataclass
class G2isConfig(ScorerConfig, schema="g2is"):
    """Agreement of gradients with the target set's core knowledge: principal components of its gradients (G2IS)."""

    explained: float = option(0.5, above=0, most=1)  # share of the target gradients' variance in the components


@dataclass
class RandomScorerConfig(ScorerConfig, schema="random"):
    """Uniform random scores."""

    seed: int = option(0, least=0)  # seed of the scores


@dataclass
class SuperfilterConfig(ScorerConfig, schema="superfilter"):
    """Instruction-following difficulty under the proxy's backbone (Superfiltering)."""

    max_length: int = option(1024, least=2)  # tokens; L of the published code
    fidelity: str = option("fixed", choices=FIDELITIES)  # original: with the errors of the published code
    # high: high difficulty first, as published; low: low difficulty first, which ranks clean rows higher in noisy data
    keep: str = option("high", choices=("high", "low"))

    def check(self) -> None:
        if (self.fidelity, self.keep) == ("original", "low"):
            raise ConfigError(
                "scorer.keep=low puts first the rows that could not be scored, which scorer.fidelity=original gives an "
                "IFD of 0; take scorer.fidelity=fixed"
            )


@dataclass
class GradsConfig(ScorerConfig, schema="grads"):
    """Representativeness, diversity and redundancy (GrADS). The paper gives no values for these options."""

    # weights w_g, w_d and w_s of representativeness, diversity and redundancy; a factor with weight 0 is left out
    weights: list[float] = option([1.0, 1.0, 1.0], least=0)
    # signal from the gradients of embedding and head. statistics: maximum, minimum, mean, standard deviation of each;
    # norms: the norm of each; norm: one norm of both together
    combine: str = option("statistics", choices=("statistics", "norms", "norm"))
    bandwidth: Any = "scott"  # kernel width: a number of standard deviations of the signal, or scott (Scott's rule)
    region: str = option("high", choices=("high", "low"))  # whether high or low density counts as representative
    # spread: one minus the mean cosine to the pool's embeddings; words: rarity of the example's words
    diversity: str = option("spread", choices=("spread", "words"))
    neighbours: int = option(1, least=1)  # redundancy is the mean cosine to this many most similar examples
    scale: str = option("rank", choices=("rank", "minmax"))  # how each factor is mapped to 0..1

    def check(self) -> None:
        if len(self.weights) != 3 or not any(self.weights):
            raise ConfigError(
                f"scorer.weights={list(self.weights)} must be three numbers, w_g, w_d and w_s, not all 0, as in [1,1,1]"
            )
        if self.bandwidth != "scott":
            if isinstance(self.bandwidth, bool) or not isinstance(self.bandwidth, int | float):
                raise ConfigError(f"scorer.bandwidth={self.bandwidth!r} is no number; give one above 0, or scott")
            in_range("scorer.bandwidth", self.bandwidth, above=0)


@dataclass
class CherryConfig(ScorerConfig, schema="cherry"):
    """Instruction-following difficulty as a ratio of losses (Cherry)."""

    max_length: int = option(512, least=2)  # tokens; L of the published command
    # original: first cuts the response and then checks whether the row is too long, as the published code does
    fidelity: str = option("fixed", choices=FIDELITIES)


@dataclass
class PerplexityConfig(ScorerConfig, schema="perplexity"):
    """Perplexity of the response under the proxy's backbone, without training."""

    prefer: str = option("low", choices=("low", "high", "middle"))  # middle: nearest to the median rank


@dataclass
class LengthConfig(ScorerConfig, schema="length"):
    """Length of the response, of the prompt, or of both."""

    unit: str = option("tokens", choices=("tokens", "characters"))  # tokens of the proxy; characters need no model
    part: str = option("response", choices=("response", "prompt", "both"))  # part that is measured
    prefer: str = option("long", choices=("long", "short"))  # which examples score high


@dataclass
class SbertConfig(ScorerConfig, schema="sbert"):
    """Cosine of an example's embedding to the embeddings of a target set."""

    over: str = option("mean", choices=("mean", "max"))  # mean or largest cosine to the target rows


@dataclass
class RatingConfig(ScorerConfig, schema="llm_rating"):
    """Grades that the run's judge gives to each example (AlpaGasus, DEITA)."""

    # alpagasus: accuracy 0-5; deita: complexity 1-6 times quality 1-6
    style: str = option("alpagasus", choices=("alpagasus", "deita"))


@dataclass
class SelectorConfig(Group, option="selector", schema="selector"):
    """A selector: `_target_` names a function of scores, budget and further inputs (see gradsift.selection)."""

    _target_: str = MISSING
    name: str = MISSING


@dataclass
class FacilityLocationConfig(SelectorConfig, schema="facility_location"):
    """Selects a subset that represents all candidates, the examples with the highest scores (Superfiltering.D)."""

    # similarity of two embeddings; exp_distance: exp(-distance / dimensions), as in the published code
    similarity: str = option("exp_distance", choices=("exp_distance", "cosine"))
    candidates: float = option(0.2, above=0, most=1)  # share of the pool with the highest scores; at least alpha


@dataclass
class ReprFilterConfig(SelectorConfig, schema="repr_filter"):
    """Selects the highest scores, but skips examples that are too similar to a selected example (DEITA)."""

    threshold: float = option(0.9, least=-1, most=1)  # largest cosine to a selected example


@dataclass
class ClustersConfig(SelectorConfig, schema="clusters"):
    """Selects the examples with the highest scores in each k-means cluster of the embeddings."""

    clusters: int = option(100, least=1)  # k of k-means
    # how many examples a cluster gives: proportional to its size, or as equal as the sizes allow
    allocation: str = option("proportional", choices=("proportional", "equal"))
    seed: int = option(0, least=0)  # seed of k-means


@dataclass
class QuotasConfig(SelectorConfig, schema="quotas"):
    """Selects the highest scores in each group of rows. Each group has a given share of the selection."""

    column: str = "source"  # column of the data that names a row's group; data=mixture writes `source`
    # weight of each group, as in 'selector.shares={code: 1, chat: 3}'; null: each group has its share in the pool
    shares: Any = None

    def check(self) -> None:
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
class GumbelConfig(SelectorConfig, schema="gumbel"):
    """A random draw without replacement that favours high scores."""

    # a row whose score is this many standard deviations higher has e times the odds of being drawn
    temperature: float = option(1.0, above=0)
    seed: int = option(0, least=0)  # seed of the noise


@dataclass
class RoundRobinQueriesConfig(SelectorConfig, schema="round_robin_queries"):
    """Selects, for one target row after another, the pool row whose embedding has the largest cosine to it (RDS+)."""

    # what happens if the pool row that is next for a target row is selected already. original: nothing is selected in
    # this turn, as in the published scripts; fixed: the next pool row that is not selected yet
    fidelity: str = option("original", choices=FIDELITIES)


@dataclass
class GradientWalkConfig(SelectorConfig, schema="gradient_walk"):
    """Selects examples one by one, so that their gradients agree with each other and with target gradients (G2IS)."""

    explained: float = option(0.5, above=0, most=1)  # share of the target gradients' variance in the components
    # when an example is added, the sum of gradients must keep this share of its cosine to the component
    keep: float = option(0.8, least=0, most=1)
    # if the walks end before the budget is filled: strict selects fewer examples; topup adds the highest scores
    fill: str = option("strict", choices=("strict", "topup"))
    graph: bool = True  # false: an ablation without walks, by the components alone
    neighbours: int | None = option(None, least=1)  # nearest examples that a step considers; null: all
