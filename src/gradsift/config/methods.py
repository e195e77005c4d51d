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
    """A scorer: the function `_target_`, whose positional parameters name its inputs (see gradsift.scoring)."""

    _target_: str = MISSING
    name: str = MISSING


@dataclass
class PublishedConfig(ScorerConfig, schema="published"):
    """Scores from the file `data.scores`.

    Setting `data.scores` chooses this scorer, unless the scorer is full, random or random_clean.
    """

    _target_: str = "gradsift.scoring.published.published"
    name: str = "published"


@dataclass
class GsnrConfig(ScorerConfig, schema="gsnr"):
    """The Gradient Signal-to-Noise Ratio and its ablations."""

    # added to the denominators of the formula: the mean early norm G_s, and the variance V_t of the late norm over the
    # members; the paper gives no value
    eps: float = option(1e-8, above=0)


@dataclass
class GsnrDirectionConfig(GsnrConfig, schema="gsnr_direction"):
    """Cosine between an example's gradient and the pool's mean gradient, alone or multiplied by the rank of G-SNR."""

    # gsnr: multiply the cosine by the share of examples whose G-SNR is at most the example's; none: the cosine alone
    weigh: str = option("none", choices=("none", "gsnr"))


@dataclass
class ContrastConfig(ScorerConfig, schema="contrast"):
    """Contrast of an answer's loss with the losses of answers to similar prompts."""

    neighbours: int = option(50, least=2)  # k, the number of similar prompts to whose answers an answer is compared
    end_share: float = option(0.33, least=0, most=1)  # w, weight of an answer's last token in its loss
    # v, how much the score falls if the answer is hardly likelier after its own prompt than after another example's
    prompt_weight: float = option(4.0, least=0)
    # number of answers of similar length with which the effect of an answer's own prompt is compared
    like_length: int = option(100, least=2)
    # how many standard deviations over the members are subtracted from the mean over the members
    caution: float = option(1.0, least=0)
    # share of the rows that get random scores above all other scores: the rows with the highest scores
    saturation: float = option(0.2, least=0, most=1)
    seed: int = option(0, least=0)  # seed of the random scores


@dataclass
class G2isConfig(ScorerConfig, schema="g2is"):
    """Agreement of an example's gradient with the principal components of the target set's gradients (G2IS)."""

    # the components together explain at least this share of the variance of the target gradients
    explained: float = option(0.5, above=0, most=1)


@dataclass
class RandomScorerConfig(ScorerConfig, schema="random"):
    """Uniform random scores."""

    seed: int = option(0, least=0)  # seed of the scores


@dataclass
class SuperfilterConfig(ScorerConfig, schema="superfilter"):
    """Instruction-following difficulty (IFD), computed with the proxy's backbone (Superfiltering)."""

    max_length: int = option(1024, least=2)  # largest number of tokens, L in the published code
    # original: with the errors of the published code; fixed: without them
    fidelity: str = option("fixed", choices=FIDELITIES)
    # high: highest difficulty first, as published; low: lowest first, which ranks clean rows higher in noisy data
    keep: str = option("high", choices=("high", "low"))

    def check(self) -> None:
        if (self.fidelity, self.keep) == ("original", "low"):
            raise ConfigError(
                "scorer.keep=low with scorer.fidelity=original ranks the rows first that could not be scored, because "
                "their IFD is 0; take scorer.fidelity=fixed"
            )


@dataclass
class GradsConfig(ScorerConfig, schema="grads"):
    """Representativeness, diversity and redundancy of an example (GrADS).

    The paper gives no values for these options.
    """

    # weights w_g, w_d and w_s of representativeness, diversity and redundancy; a factor with weight 0 is left out
    weights: list[float] = option([1.0, 1.0, 1.0], least=0)
    # what represents the gradients of embedding and head. statistics: maximum, minimum, mean and standard deviation of
    # each; norms: the norm of each; norm: one norm of both together
    combine: str = option("statistics", choices=("statistics", "norms", "norm"))
    # width of the density's kernel: a number of standard deviations, or scott (Scott's rule)
    bandwidth: Any = "scott"
    region: str = option("high", choices=("high", "low"))  # whether high or low density counts as representative
    # how diversity is measured. spread: one minus the mean cosine to the pool's embeddings; words: rarity of the words
    diversity: str = option("spread", choices=("spread", "words"))
    neighbours: int = option(1, least=1)  # redundancy is the mean cosine to this many most similar examples
    # how each factor is scaled to 0..1. rank: share of lower values; minmax: distance from the lowest value
    scale: str = option("rank", choices=("rank", "minmax"))

    def check(self) -> None:
        if len(self.weights) != 3 or not any(self.weights):
            raise ConfigError(
                f"scorer.weights={list(self.weights)} must be three numbers, w_g, w_d and w_s, not all 0, as in [1,1,1]"
            )
        if self.bandwidth != "scott":
            if isinstance(self.bandwidth, bool) or not isinstance(self.bandwidth, int | float):
                raise ConfigError(f"scorer.bandwidth={self.bandwidth!r} is not a number; give one above 0, or scott")
            in_range("scorer.bandwidth", self.bandwidth, above=0)


@dataclass
class CherryConfig(ScorerConfig, schema="cherry"):
    """Instruction-following difficulty (IFD) as a ratio of losses (Cherry)."""

    max_length: int = option(512, least=2)  # largest number of tokens, L in the published command
    # original: the length of a row is checked after its response is cut, as in the published code; fixed: before
    fidelity: str = option("fixed", choices=FIDELITIES)


@dataclass
class PerplexityConfig(ScorerConfig, schema="perplexity"):
    """Perplexity of the response under the proxy's pretrained backbone, without an adapter."""

    # which perplexities score high; middle: those whose rank is nearest to the median
    prefer: str = option("low", choices=("low", "high", "middle"))


@dataclass
class LengthConfig(ScorerConfig, schema="length"):
    """Length of the response, of the prompt, or of both together."""

    unit: str = option("tokens", choices=("tokens", "characters"))  # tokens of the proxy's tokenizer, or characters
    part: str = option("response", choices=("response", "prompt", "both"))  # part that is measured
    prefer: str = option("long", choices=("long", "short"))  # which examples score high


@dataclass
class SbertConfig(ScorerConfig, schema="sbert"):
    """Mean or largest cosine of an example's embedding to the embeddings of the rows of a target set."""

    over: str = option("mean", choices=("mean", "max"))  # mean or largest of the cosines to the target rows


@dataclass
class RatingConfig(ScorerConfig, schema="llm_rating"):
    """Grades that the run's judge gives to each example (AlpaGasus, DEITA)."""

    # alpagasus: one grade, 0-5, for accuracy; deita: complexity, 1-6, times quality, 1-6
    style: str = option("alpagasus", choices=("alpagasus", "deita"))


@dataclass
class SelectorConfig(Group, option="selector", schema="selector"):
    """A selector: `_target_` names a function of scores, budget and further inputs (see gradsift.selection)."""

    _target_: str = MISSING
    name: str = MISSING


@dataclass
class FacilityLocationConfig(SelectorConfig, schema="facility_location"):
    """Selects a subset that represents all candidates (Superfiltering.D).

    The candidates are the examples with the highest scores.
    """

    # similarity of two embeddings; exp_distance: exp(-distance / dimensions), as in the published code
    similarity: str = option("exp_distance", choices=("exp_distance", "cosine"))
    # share of the pool's examples that are candidates: those with the highest scores; at least alpha
    candidates: float = option(0.2, above=0, most=1)


@dataclass
class ReprFilterConfig(SelectorConfig, schema="repr_filter"):
    """Selects the examples with the highest scores, but skips an example too similar to a selected one (DEITA)."""

    threshold: float = option(0.9, least=-1, most=1)  # largest allowed cosine to a selected example


@dataclass
class ClustersConfig(SelectorConfig, schema="clusters"):
    """Selects the examples with the highest scores in each k-means cluster of the embeddings."""

    clusters: int = option(100, least=1)  # number of clusters, k of k-means
    # how many examples a cluster gives: proportional to its size, or as equal as the sizes allow
    allocation: str = option("proportional", choices=("proportional", "equal"))
    seed: int = option(0, least=0)  # seed of k-means


@dataclass
class QuotasConfig(SelectorConfig, schema="quotas"):
    """Selects the examples with the highest scores in each group of rows.

    Each group fills a given share of the selection.
    """

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
    """Draws examples at random without replacement. An example with a higher score is likelier to be drawn."""

    # the odds of being drawn grow by the factor e for each `temperature` standard deviations of the score
    temperature: float = option(1.0, above=0)
    seed: int = option(0, least=0)  # seed of the noise


@dataclass
class RoundRobinQueriesConfig(SelectorConfig, schema="round_robin_queries"):
    """Lets the target rows take turns to select pool rows (RDS+).

    Each target row selects the pool row whose embedding has the largest cosine to its own embedding.
    """

    # what a target row selects if its next pool row is already selected. original: nothing in this turn, as in the
    # published scripts; fixed: its next pool row that is not yet selected
    fidelity: str = option("original", choices=FIDELITIES)


@dataclass
class GradientWalkConfig(SelectorConfig, schema="gradient_walk"):
    """Selects examples one by one whose gradients agree with each other and with a target set's gradients (G2IS)."""

    # the components together explain at least this share of the variance of the target gradients
    explained: float = option(0.5, above=0, most=1)
    # an example is added only if the sum of gradients then keeps this share of its cosine to the component
    keep: float = option(0.8, least=0, most=1)
    # if the walks end before the budget is filled: strict selects fewer examples; topup adds the highest scores
    fill: str = option("strict", choices=("strict", "topup"))
    graph: bool = True  # false: an ablation without walks, which selects by the projections on the components
    neighbours: int | None = option(None, least=1)  # number of nearest examples that a step considers; null: all
