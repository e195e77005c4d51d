"""GrADS (arXiv 2511.08620): scores for representative, diverse and non-redundant examples.

    score_i = w_g R_i + w_d C_i + w_s (1 - S_i)

R  representativeness: Gaussian kernel density of the pool's signals at the example's signal. A signal consists of
   statistics of an example's gradients with respect to the input embedding and the LM head, after one epoch of
   preliminary training.
C  content diversity: how much the example differs from the rest of the pool, by its embedding or by its words.
S  redundancy: mean cosine of the example's embedding to its nearest neighbours.

R, C and S are each scaled to 0..1 over the scored examples. If R, C or S has the weight 0, it is not computed. The
authors published no code; `grads` is our reading of the paper, with a parameter for each choice that the paper leaves
open (docs/methods.md).

Shape letters: N examples, F columns of the signal, B rows of a block.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

from gradsift.data.examples import Example
from gradsift.diagnostics import Diagnostic
from gradsift.errors import ConfigError
from gradsift.features.vectors import Features, mean_cosines, nearest_cosines, row_blocks
from gradsift.gradients.embedding_head import COLUMNS, EmbeddingGradients
from gradsift.runtime import Advance, Task
from gradsift.scoring.scores import NO_RESPONSE, UNDEFINED, Scores

# Bound on |sum of a gradient's entries| / |gradient|, below which the sum counts as 0. The ratio is about 1 (1.2 with
# SmolLM2 and Alpaca rows) for unrelated entries. If the true sum is 0, rounding leaves a ratio of 2e-7 in float32 and
# 2e-3 in bfloat16 (random GPT-2).
LEAST_SUM_OVER_NORM = 0.03
_CACHE_BYTES = 2**20  # of a block of kernel evaluations; blocks larger than the cache take three times as long


def grads(
    examples: Sequence[Example],
    embedding_gradients: EmbeddingGradients,
    embeddings: Features,
    task: Task,
    *,
    weights: Sequence[float],
    combine: str,
    bandwidth: str | float,
    region: str,
    diversity: str,
    neighbours: int,
    scale: str,
) -> Scores:
    """Return each example's score (see the module's docstring), with R, C and S as parts unless their weight is 0.

    Args:
        weights: w_g, w_d, w_s.
        combine: see `signal_of`.
        bandwidth: bandwidth of the kernel in standard deviations of the signal's columns, or `scott`: N^(-1 / (F + 4)).
        region: whether `high` or `low` density is representative.
        diversity: `spread`, one minus the mean cosine to all other examples; or `words`, see `word_rarity`.
        neighbours: number of nearest neighbours over which S averages the cosine.
        scale: `rank` or `minmax`, see `to_unit`.
    """
    of_gradients, of_content, of_similarity = weights
    has_response = np.isfinite(embedding_gradients.head_std)
    has_direction = embeddings.has_direction
    scored, factors, diagnostics = has_response.copy(), {}, []
    if needs_direction := bool(of_similarity or (of_content and diversity == "spread")):
        scored &= has_direction
        count, least = int(has_direction.sum()), neighbours if of_similarity else 1
        if count <= least:
            named = f"scorer.neighbours={least}" if of_similarity else f"scorer.diversity={diversity}"
            remedy = "fewer neighbours or more data" if least > 1 else "more data"
            raise ConfigError(
                f"{named} compares each example with {least} others, but only {count} examples have an embedding with "
                f"a direction; give {remedy}"
            )
    score = np.where(scored, 0.0, np.nan)
    if of_gradients:
        density, described = density_of(embedding_gradients, scored, combine, bandwidth, task)
        diagnostics.append(described)
        factors["representativeness"] = to_unit(density if region == "high" else -density, scored, scale)
        score += of_gradients * factors["representativeness"]
    if of_content:
        content = 1 - mean_cosines(embeddings) if diversity == "spread" else word_rarity(examples)
        factors["diversity"] = to_unit(content, scored, scale)
        score += of_content * factors["diversity"]
    if of_similarity:
        with task("grads, neighbours", len(examples)) as advance:
            factors["redundancy"] = to_unit(nearest_cosines(embeddings, neighbours, advance), scored, scale)
        score += of_similarity * (1 - factors["redundancy"])
    scores = Scores(score, factors, diagnostics)
    scores.mark(~has_response, UNDEFINED, NO_RESPONSE)
    if needs_direction:
        scores.mark(~has_direction, UNDEFINED, "its embedding has no direction")
    return scores


def density_of(
    gradients: EmbeddingGradients, rows: np.ndarray, combine: str, bandwidth: str | float, task: Task
) -> tuple[np.ndarray, Diagnostic]:
    """Return the density (N,) of the signals at each example's signal, and a diagnostic about the signals.

    The density is NaN outside `rows` (N,) bool.
    """
    signal = signal_of(gradients, combine, rows)
    columns = signal.shape[1]
    width = scott(*signal.shape) if bandwidth == "scott" else float(bandwidth)
    density = np.full(len(rows), np.nan)
    with task("grads, density", len(signal)) as advance:
        density[rows] = kernel_density(signal, width, advance)
    diagnostic = Diagnostic.judged(
        "grads_signal",
        columns == 0,
        {"columns": float(columns), "bandwidth": width},
        f"the gradient signal (combine={combine}) has {columns} columns that vary; kernel width {width:.3g} of "
        "their standard deviation",
        "whether the examples differ at all: representativeness is the same for all of them",
    )
    return density, diagnostic


def signal_of(gradients: EmbeddingGradients, combine: str, rows: np.ndarray) -> np.ndarray:
    """Return the signal (rows.sum(), F) float64 of the examples in `rows` (N,) bool.

    combine=statistics  maximum, minimum, mean and standard deviation of both gradients
    combine=norms       the norm of each gradient
    combine=norm        the norm of both gradients together

    Each column has mean 0 and variance 1. Columns that do not vary are left out. Means whose true value is 0 are left
    out too, because their computed values are only rounding errors. Such means are the head's mean and, if a LayerNorm
    follows the embedding, the embedding's mean.
    """
    table = {name: getattr(gradients, name)[rows] for name in COLUMNS}
    sizes = {use: np.hypot(table[f"{use}_mean"], table[f"{use}_std"]) for use in ("embedding", "head")}
    if combine == "statistics":
        for use, size in sizes.items():
            sums = np.abs(table[f"{use}_mean"]) * gradients.entries**0.5
            if not size.size or np.median(sums) < LEAST_SUM_OVER_NORM * np.median(size):
                del table[f"{use}_mean"]
    else:  # norms divided by sqrt(V D), a factor that standardisation removes
        table = sizes if combine == "norms" else {"norm": np.hypot(*sizes.values())}
    columns = [(values - values.mean()) / values.std() for values in table.values() if np.ptp(values) > 0]
    return np.stack(columns, 1) if columns else np.zeros((int(rows.sum()), 0))


def scott(count: int, columns: int) -> float:
    """Return Scott's bandwidth N^(-1 / (F + 4)) for N = `count` points in F = `columns` columns of variance 1."""
    return float(max(count, 1) ** (-1 / (columns + 4)))


def kernel_density(signal: np.ndarray, bandwidth: float, advance: Advance = lambda done: None) -> np.ndarray:
    """Return the exact Gaussian kernel density (N,) float64 of the points in `signal` (N, F), at each of the points."""
    count, columns = signal.shape
    points = signal / bandwidth
    lengths = np.square(points).sum(1)
    density = np.empty(count)
    for block in row_blocks(count, 8 * count, _CACHE_BYTES):
        exponents = points[block] @ points.T  # (B, N) -|x - y|^2 / 2 = x y - |x|^2 / 2 - |y|^2 / 2
        exponents -= lengths[block, None] / 2
        exponents -= lengths / 2
        # -|x - y|^2 / 2 is never positive, but the sum of three terms may round to above 0 where x = y
        np.minimum(exponents, 0, out=exponents)
        density[block] = np.exp(exponents, out=exponents).mean(1)
        advance(len(exponents))
    scale: float = (2 * np.pi) ** (-columns / 2) * bandwidth**-columns
    return density * scale


def word_rarity(examples: Sequence[Example]) -> np.ndarray:
    """Return the mean of log(N / number of examples with the word) over each example's different words, (N,).

    The mean is 0 for an example without words.
    """
    texts = [" ".join([*(turn.content for turn in e.history), e.instruction, e.input, e.output]) for e in examples]
    words = [sorted(set(re.findall(r"\w+", text.lower()))) for text in texts]
    holders = Counter(word for each in words for word in each)
    count = len(examples)
    return np.array([np.mean([np.log(count / holders[word]) for word in each]) if each else 0.0 for each in words])


def to_unit(values: np.ndarray, rows: np.ndarray, scale: str) -> np.ndarray:
    """Return `values` (N,) scaled to 0..1 over `rows` (N,) bool, or 0.5 if they are all equal; NaN outside `rows`.

    rank    the share of the other values that are lower; a value that is equal counts half
    minmax  the distance from the lowest value, divided by the range
    """
    from scipy.stats import rankdata

    scaled = np.full(len(values), np.nan)
    known = values[rows]
    if not known.size or np.ptp(known) == 0:
        scaled[rows] = 0.5
    elif scale == "rank":
        scaled[rows] = (rankdata(known) - 1) / (len(known) - 1)
    else:
        scaled[rows] = (known - known.min()) / np.ptp(known)
    return scaled
