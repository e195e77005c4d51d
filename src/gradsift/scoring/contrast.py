"""How well the ensemble has learnt an answer, compared with the answers to similar prompts (a method of gradsift).

    l_i^m  = (1 - w) body_i^m / mean(body^m) + w end_i^m / mean(end^m)     means over the examples; w = end_share
    c_i^m  = (mean_j log l_j^m - log l_i^m) / std_j log l_j^m       j over the k nearest prompts of i
    g_i^m  = log(mean_m' other_i^m' / body_i^m)                     what the example's own prompt is good for
    z_i^m  = (g_i^m - mean(g^m)) / std(g^m)                         over the examples
    d_i^m  = c_i^m + v min(0, z_i^m + 1/2)                          v = prompt_weight
    b_i = mean_m d_i^m - caution x std_m d_i^m      a lower confidence bound over the members
    score_i = b_i below the best fifth; there, numbers drawn at random

- A loss is low if an answer is right, but also if its kind of task is easy. Comparing with similar prompts removes the
  second effect, so that no kind of task crowds out the others.
- A wrong token within an answer raises the body, an answer that stops early raises the end. In the mean over all tokens
  of a long answer the end is lost, so it has a weight of its own. Both are losses after training, relative to their
  means over the pool: how much larger a body's loss is than an end's differs from one dataset to the next.
- An answer to another question can be fluent, hence have a low loss. Its own prompt does not make it likelier than the
  prompt of another example does, so g is near zero. Only answers whose g is clearly below the mean lose by it: above,
  a larger g means a longer quotation of the prompt, and not a better answer.
- The members' standard deviation lowers the score of rows on which they disagree.
- Within the best fifth (`saturation`) a higher bound means a more typical row, and a slightly cleaner one. A target
  learns more from rows drawn there at random (measured in the embedded world).

Prompts are similar if their words and word pairs are (TF-IDF, reduced to at most 50 dimensions): this needs no model
and gives the same neighbours for every proxy. Reasons, ablations and limits: docs/methods.md.

Shape letters: M members, N examples, K neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gradsift.data.examples import Example
from gradsift.errors import ConfigError
from gradsift.features.prompt_clusters import prompt_of, prompt_vectors
from gradsift.proxy.answer_losses import AnswerLosses
from gradsift.scoring.scores import NO_RESPONSE, UNDEFINED, Scores

# Added to relative losses before the logarithm: below, differences are rounding.
_FLOOR = 1e-3
# Least mean over the pool, in nats: a part that a member has learnt by heart counts for nothing.
_LEAST_MEAN = 1e-3
# Least standard deviation of the neighbours' log losses: copies of one row agree to the last digit. Also that of the
# prompts' gains, which are all near 0 if no answer depends on its prompt.
_LEAST_DEVIATION = 0.1
# Standard deviations below the mean from which a gain counts: a quarter of the pool's rows or so.
_USUAL_GAIN = 0.5


def contrast(
    answer_losses: AnswerLosses,
    examples: Sequence[Example],
    *,
    neighbours: int,
    end_share: float,
    prompt_weight: float,
    caution: float,
    saturation: float,
    seed: int,
) -> Scores:
    """Return the contrast of each answer's loss with the losses of answers to similar prompts.

    Args:
        answer_losses: of the late snapshot, (M, N) each.
        neighbours: k.
        end_share: w, 0 to 1.
        prompt_weight: v, 0 or more.
        caution: how many standard deviations over the members are subtracted.
        saturation: share of the examples, those with the highest bounds, whose scores are drawn with `seed`.

    Raises:
        ConfigError: there are not more than `neighbours` examples with a response.
    """
    contrasts = member_contrasts(answer_losses, examples, neighbours, end_share, prompt_weight)
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
    answer_losses: AnswerLosses,
    examples: Sequence[Example],
    neighbours: int,
    end_share: float,
    prompt_weight: float,
) -> np.ndarray:
    """Return d of each answer for each member, (M, N); NaN without a response. See `contrast`."""
    # a row without a response token has no loss under any member
    known = ~np.isnan(answer_losses.body).any(0)
    require_neighbours(int(known.sum()), neighbours)
    body, end, other = (part[:, known] for part in (answer_losses.body, answer_losses.end, answer_losses.other))
    prompts = [prompt_of(example) for example, has_loss in zip(examples, known, strict=True) if has_loss]
    contrasts = np.full(answer_losses.body.shape, np.nan)
    # Logarithms, because losses of easy and of hard tasks differ by factors: a difference of logarithms is a ratio,
    # which means the same in both.
    logs = np.log(relative_losses(body, end, end_share) + _FLOOR)
    contrasts[:, known] = contrast_with(logs, nearest_prompts(prompts, neighbours))
    contrasts[:, known] += prompt_weight * lacking_gain(body, other)
    return contrasts


def lacking_gain(body: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return min(0, z + 1/2) of `contrast`, (M, N), from losses with the own and with another prompt, (M, N) each.

    The losses with another prompt are averaged over the members, each of which has drawn another one.
    """
    gain = np.log((other.mean(0) + _FLOOR) / (body + _FLOOR))
    deviation = np.maximum(gain.std(1, keepdims=True), _LEAST_DEVIATION)
    lacking: np.ndarray = np.minimum(0, (gain - gain.mean(1, keepdims=True)) / deviation + _USUAL_GAIN)
    return lacking


def relative_losses(body: np.ndarray, end: np.ndarray, end_share: float) -> np.ndarray:
    """Return the losses l of `contrast`, (M, N), from the losses of bodies and ends in nats, (M, N) each.

    A mean counts as at least _LEAST_MEAN. Above it a part has its full share, however small its losses are.
    """
    body, end = (part / np.maximum(part.mean(1, keepdims=True), _LEAST_MEAN) for part in (body, end))
    return (1 - end_share) * body + end_share * end


def require_neighbours(count: int, neighbours: int) -> None:
    """Raise a `ConfigError` unless each of `count` examples has `neighbours` others."""
    if count <= neighbours:
        raise ConfigError(
            f"scorer.neighbours={neighbours} needs more than {neighbours} examples with a response, and there are "
            f"{count}; give fewer neighbours"
        )


def saturated(bound: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Return the bounds (N,), the highest `share` of them replaced by random numbers above all others."""
    values = bound.copy()
    best = np.argsort(-bound, kind="stable")[: round(share * np.isfinite(bound).sum())]  # NaN comes last
    if len(best):
        # from the lowest replaced bound upwards, so no other row comes above them
        values[best] = bound[best].min() + np.random.default_rng(seed).random(len(best))
    return values


def contrast_with(values: np.ndarray, nearest: np.ndarray) -> np.ndarray:
    """Return how many standard deviations each value lies below the mean of its neighbours' values.

    Args:
        values: (M, N)
        nearest: (N, K) positions of the neighbours.

    Returns:
        (M, N) float64
    """
    contrasts = np.empty_like(values)
    for member, row in enumerate(values):  # one member at a time: (N, K) numbers and not (M, N, K)
        others = row[nearest]  # (N, K)
        contrasts[member] = (others.mean(1) - row) / np.maximum(others.std(1), _LEAST_DEVIATION)
    return contrasts


def nearest_prompts(prompts: Sequence[str], count: int) -> np.ndarray:
    """Return the positions of the `count` most similar other prompts of each prompt, (N, count) int64.

    Raises:
        ConfigError: no prompt has a word.
    """
    from sklearn.neighbors import NearestNeighbors

    vectors = prompt_vectors(prompts)
    search = NearestNeighbors(n_neighbors=count, algorithm="brute").fit(vectors)  # rows have length one: cosine
    nearest: np.ndarray = search.kneighbors(return_distance=False)  # of the fitted rows, each without itself
    return nearest
