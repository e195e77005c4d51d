"""How well the ensemble has learnt an answer, compared with the answers to similar prompts (a method of gradsift).

    l_i^m  = (1 - w) body_i^m / mean(body^m) + w end_i^m / mean(end^m)     means over the examples; w = end_share
    c_i^m  = (mean_j log l_j^m - log l_i^m) / std_j log l_j^m       j over the k nearest prompts of i
    g_i^m  = log(mean_m' other_i^m' / body_i^m)                     how much less the answer costs with its own prompt
    z_i^m  = (g_i^m - mean_j g_j^m) / std_j g_j^m                   j over like_length answers of similar length
    d_i^m  = c_i^m + v min(0, z_i^m + 1)                            v = prompt_weight
    b_i = mean_m d_i^m - caution x std_m d_i^m      a lower confidence bound over the members
    score_i = b_i; for the share `saturation` of the rows with the highest b_i, a random number above all others

body_i is the mean loss of an answer's tokens before the last one, and end_i is the loss of its last token, both at the
late snapshot. other_i is the mean loss of the same tokens as in body_i, but after the prompt of another example; where
it is unknown (see `AnswerLosses`), d_i^m = c_i^m.

docs/methods.md has the reasons for each term, ablations and limits.

Shape letters: M members, N examples, K neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gradsift.data.examples import Example
from gradsift.errors import ConfigError
from gradsift.features.prompt_clusters import prompt_of, prompt_vectors
from gradsift.proxy.member_tables import AnswerLosses
from gradsift.scoring.scores import NO_RESPONSE, UNDEFINED, Scores

# Added to a loss before its logarithm is taken, because differences between smaller losses are only rounding errors.
_FLOOR = 1e-3
# Least mean loss, in nats, by which losses are divided: the mean is near 0 if a member has learnt all bodies, or all
# ends, by heart.
_LEAST_MEAN = 1e-3
# Least standard deviation by which differences are divided: it is 0 if all neighbours are copies of one row.
_LEAST_DEVIATION = 0.1
_USUAL_GAIN = 1.0  # a gain g_i lowers the score if it is more than this many standard deviations below the mean
_LEAST_GAINS = 20  # fewest gains of which a mean and a standard deviation are computed


def contrast(
    answer_losses: AnswerLosses,
    examples: Sequence[Example],
    *,
    neighbours: int,
    end_share: float,
    prompt_weight: float,
    like_length: int,
    caution: float,
    saturation: float,
    seed: int,
) -> Scores:
    """Return scores that compare the losses of each answer with those of answers to similar prompts.

    The module's docstring has the formulas.

    Args:
        neighbours: k, the number of similar prompts.
        end_share: w, 0 to 1.
        prompt_weight: v, 0 or more.
        like_length: the gain g of an answer is compared with the gains of this many answers of similar length; if there
            are fewer other answers, with the gains of all of them.
        caution: how many standard deviations over the members are subtracted from the mean over the members.
        saturation: the scores of this share of the examples, from the highest bound down, are random numbers drawn with
            `seed`.

    Raises:
        ConfigError: there are not more than `neighbours` examples with a response.
    """
    contrasts = member_contrasts(answer_losses, examples, neighbours, end_share)
    lengths = [len(example.output) for example in examples]
    contrasts += prompt_weight * gain_term(answer_losses.body, answer_losses.other, lengths, like_length)
    mean, deviation = contrasts.mean(0), contrasts.std(0)
    bound = mean - caution * deviation
    parts = {
        "bound": bound,
        "contrast": mean,
        "contrast_deviation": deviation,
        "body_loss": answer_losses.body.mean(0),
        "end_loss": answer_losses.end.mean(0),
        "other_loss": answer_losses.other.mean(0),
    }
    scores = Scores(saturated(bound, saturation, seed), parts)
    scores.mark(np.isnan(bound), UNDEFINED, NO_RESPONSE)
    return scores


def member_contrasts(
    answer_losses: AnswerLosses, examples: Sequence[Example], neighbours: int, end_share: float
) -> np.ndarray:
    """Return c (see the module's docstring), (M, N); NaN for an example without a response token."""
    # a row without a response token has no loss under any member
    known = ~np.isnan(answer_losses.body).any(0)
    require_neighbours(int(known.sum()), neighbours)
    body, end = answer_losses.body[:, known], answer_losses.end[:, known]
    prompts = [prompt_of(example) for example, has_loss in zip(examples, known, strict=True) if has_loss]
    contrasts = np.full(answer_losses.body.shape, np.nan)
    # logarithms, because a ratio of losses does not depend on their scale, which differs between easy and hard tasks
    logs = np.log(relative_losses(body, end, end_share) + _FLOOR)
    contrasts[:, known] = contrast_with(logs, nearest_prompts(prompts, neighbours))
    return contrasts


def gain_term(body: np.ndarray, other: np.ndarray, lengths: Sequence[int], like_length: int) -> np.ndarray:
    """Return min(0, z + 1) (see the module's docstring), (M, N); 0 for an example without a loss after another prompt.

    If fewer than `_LEAST_GAINS` examples have such a loss, all values are 0: the mean of few gains is not reliable.

    Args:
        body, other: (M, N) losses of the answers after their own prompts, and after other prompts.
        lengths: (N,) lengths of the answers in characters.
    """
    term = np.zeros(body.shape)
    gained = np.flatnonzero(~np.isnan(body + other).any(0))
    if len(gained) < _LEAST_GAINS:
        return term
    gain = np.log((other[:, gained].mean(0) + _FLOOR) / (body[:, gained] + _FLOOR))
    # `contrast_with` is positive for a value below its neighbours'
    z = -contrast_with(gain, nearest_lengths(np.asarray(lengths)[gained], like_length))
    term[:, gained] = np.minimum(0, z + _USUAL_GAIN)
    return term


def nearest_lengths(lengths: Sequence[int] | np.ndarray, count: int) -> np.ndarray:
    """Return (N, count) int64: for each example, the positions of `count` others around it in the order of lengths.

    Examples of equal length are ordered by position. If there are fewer than `count` other examples, all are returned.
    """
    count = min(count, len(lengths) - 1)
    order = np.argsort(lengths, kind="stable")
    place = np.empty(len(order), dtype=np.int64)
    place[order] = np.arange(len(order))
    first = np.clip(place - count // 2, 0, len(order) - 1 - count)
    windows = first[:, None] + np.arange(count + 1)  # each holds the example itself too
    nearest: np.ndarray = order[windows[windows != place[:, None]].reshape(len(order), count)]
    return nearest


def relative_losses(body: np.ndarray, end: np.ndarray, end_share: float) -> np.ndarray:
    """Return l (M, N), see the module's docstring, for the losses `body` and `end` (M, N) in nats."""
    body, end = (part / np.maximum(part.mean(1, keepdims=True), _LEAST_MEAN) for part in (body, end))
    return (1 - end_share) * body + end_share * end


def require_neighbours(count: int, neighbours: int) -> None:
    """Raise a `ConfigError` unless each of `count` examples can have `neighbours` neighbours."""
    if count <= neighbours:
        raise ConfigError(
            f"scorer.neighbours={neighbours} needs more than {neighbours} examples with a response, and there are "
            f"{count}; give fewer neighbours"
        )


def saturated(bound: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Return the bounds (N,), with the highest `share` of them replaced by random numbers above all other bounds."""
    values = bound.copy()
    best = np.argsort(-bound, kind="stable")[: round(share * np.isfinite(bound).sum())]  # NaN comes last
    if len(best):
        # at least the lowest replaced bound, so no other row has a higher value
        values[best] = bound[best].min() + np.random.default_rng(seed).random(len(best))
    return values


def contrast_with(values: np.ndarray, nearest: np.ndarray) -> np.ndarray:
    """Return (mean - value) / standard deviation for each value, (M, N) float64.

    Mean and standard deviation are taken over the values of the example's neighbours. A standard deviation below
    `_LEAST_DEVIATION` counts as `_LEAST_DEVIATION`.

    Args:
        values: (M, N), one row for each member.
        nearest: (N, K) positions of each example's neighbours.
    """
    contrasts = np.empty_like(values)
    for member, row in enumerate(values):  # one member at a time, to hold (N, K) numbers instead of (M, N, K)
        others = row[nearest]  # (N, K)
        contrasts[member] = (others.mean(1) - row) / np.maximum(others.std(1), _LEAST_DEVIATION)
    return contrasts


def nearest_prompts(prompts: Sequence[str], count: int) -> np.ndarray:
    """Return the positions (N, count) int64 of the `count` other prompts that are most similar to each prompt."""
    from sklearn.neighbors import NearestNeighbors

    vectors = prompt_vectors(prompts)
    search = NearestNeighbors(n_neighbors=count, algorithm="brute").fit(vectors)  # rows have length one: cosine
    nearest: np.ndarray = search.kneighbors(return_distance=False)  # neighbours of the fitted rows, without themselves
    return nearest
