"""Measure what each part of the scorer `contrast` contributes: compare variants of it on the losses of one run.

    python -m experiments.contrast_variants OVERRIDE ...          as for run.py; missing artifacts are made

Prints Markdown with a row for each variant: the spoilt share of the selection at 5, 10 and 15 %, the AUROC of clean
rows against spoilt rows and against each kind of spoilt rows, and the median number of words of the selected tenth's
answers. If rows have a label in the column `cleaning` (see `experiments.real_pool`), the table also has the AUROC of
the other clean rows against these rows, and the share of these rows in the selected tenth.

The variant `contrast (ships)` is the scorer with its default options; only this variant has random scores in the best
fifth. Some variants combine the contrast with IFD. With proxy.ensemble=bootstrap, the score of a row in the variant
`held out` uses the members that did not train on the row, and in `trained on` the members that did; neither has gains.

Shape letters: M members, N examples, K neighbours.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence

import numpy as np
from scipy.stats import rankdata

from experiments.composed import CONTRAST, line_of
from experiments.heldout_variance import left_out_rows, over_members
from gradsift.data.examples import Example
from gradsift.data.load import SPOILT, labels_of
from gradsift.features.prompt_clusters import prompt_of, prompt_vectors
from gradsift.proxy.member_tables import AnswerLosses, read_answer_losses
from gradsift.scoring.contrast import contrast_with, gain_term, nearest_prompts, relative_losses, saturated
from gradsift.scoring.scores import SCORED
from gradsift.scoring.stage import score, scores_of
from gradsift.selection.audit import CLEAN, auroc
from gradsift.selection.budget import budget

ALPHAS = (0.05, 0.1, 0.15)
K, END_SHARE, PROMPT_WEIGHT = CONTRAST.neighbours, CONTRAST.end_share, CONTRAST.prompt_weight
_FLOOR = 1e-3


def nearest_lengths(examples: Sequence[Example], count: int) -> np.ndarray:
    """Return the positions of the `count` other answers with the nearest log number of words, (N, count)."""
    return nearest(np.log1p([[len(example.output.split())] for example in examples]), count)


def nearest_both(examples: Sequence[Example], count: int) -> np.ndarray:
    """Return the positions of the `count` other examples nearest in prompt and in answer length, (N, count).

    A factor of two in length counts as much as half the distance between unrelated prompts.
    """
    lengths = np.log2(1 + np.array([[len(example.output.split())] for example in examples]))
    return nearest(np.hstack([prompt_vectors([prompt_of(example) for example in examples]), 0.7 * lengths]), count)


def nearest(points: np.ndarray, count: int) -> np.ndarray:
    """Return the positions of the `count` nearest other points, (N, count)."""
    from sklearn.neighbors import NearestNeighbors

    positions: np.ndarray = NearestNeighbors(n_neighbors=count).fit(points).kneighbors(return_distance=False)
    return positions


def contrasts_of(losses: np.ndarray, neighbours: np.ndarray | None) -> np.ndarray:
    """Return the contrasts (M, N) of losses (M, N) with those of `neighbours` (N, K), or of all examples if None."""
    values = np.log(losses + _FLOOR)
    if neighbours is None:
        return (values.mean(1, keepdims=True) - values) / values.std(1, keepdims=True)
    return contrast_with(values, neighbours)


def bound(contrasts: np.ndarray, caution: float = 1.0) -> np.ndarray:
    """Return the lower confidence bound (N,) of contrasts (M, N)."""
    lower: np.ndarray = contrasts.mean(0) - caution * contrasts.std(0)
    return lower


def ranked(values: np.ndarray) -> np.ndarray:
    """Return ranks (N,) above 0 and up to 1, the highest rank for the highest value; NaN has the lowest."""
    ranks: np.ndarray = rankdata(np.where(np.isnan(values), -np.inf, values)) / len(values)
    return ranks


def variants(
    losses: AnswerLosses, examples: Sequence[Example], ifd: np.ndarray, left_out: np.ndarray | None = None
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the name and the scores (N,) of each variant.

    Args:
        losses: (M, N) each; `body` and `end` without NaN.
        ifd: (N,) log IFD in nats: mean loss of the answer with its prompt minus mean loss of the answer alone; NaN
            where undefined.
        left_out: (M, N) bool, whether a member did not train on a row; None if every member trained on all rows.
    """

    answers = [len(example.output) for example in examples]  # in characters
    lacking = gain_term(losses.body, losses.other, answers, CONTRAST.like_length)

    def contrasts(share: float, neighbours: np.ndarray | None, weight: float = PROMPT_WEIGHT) -> np.ndarray:
        return contrasts_of(relative_losses(losses.body, losses.end, share), neighbours) + weight * lacking

    prompts = nearest_prompts([prompt_of(example) for example in examples], K)
    whole = contrasts(END_SHARE, prompts)
    shipped = bound(whole)
    yield "contrast (ships)", saturated(shipped, 0.2, seed=0)
    yield "contrast, not saturated", shipped
    for weight in (0.0, 1.0, 2.0, 8.0):
        yield f"prompt_weight {weight:g}", bound(contrasts(END_SHARE, prompts, weight))
    of_all = gain_term(losses.body, losses.other, answers, len(answers))
    yield "gains of all lengths", bound(whole + PROMPT_WEIGHT * (of_all - lacking))
    yield "gain of the own prompt alone", -np.log(losses.body / losses.other.mean(0)).mean(0)
    for caution in (0.0, 2.0):
        yield f"caution {caution:g}", bound(whole, caution)
    for share in (0.0, 0.2, 0.5, 1.0):
        yield f"end_share {share:g}", bound(contrasts(share, prompts))
    yield "no neighbours", bound(contrasts(END_SHARE, None))
    yield "neighbours in answer length", bound(contrasts(END_SHARE, nearest_lengths(examples, K)))
    yield "neighbours in prompt and length", bound(contrasts(END_SHARE, nearest_both(examples, K)))
    yield "low IFD", -ifd
    yield "mean of ranks: contrast, low IFD", ranked(shipped) + ranked(-ifd)
    yield "lower of ranks: contrast, low IFD", np.minimum(ranked(shipped), ranked(-ifd))
    if left_out is not None:
        for name, members in (("held out", left_out), ("trained on", ~left_out)):
            # without the gains: the losses after other prompts are means over all members
            mean, variance = over_members(whole - PROMPT_WEIGHT * lacking, members)
            yield name, mean - np.sqrt(variance)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="+", help="as for run.py")
    overrides = parser.parse_args().overrides
    line = line_of([*overrides, "scorer=contrast"])
    difficulty = line_of([*overrides, "scorer=superfilter_low"])
    labels = labels_of(line.loaded)
    if labels is None:
        raise SystemExit("the data has no labels; corrupt rows with data.corruption.share")
    losses = read_answer_losses(line.answer_losses, line.rows)
    known = ~np.isnan(losses.body[0])
    examples = [example for example, has_loss in zip(line.pool, known, strict=True) if has_loss]
    scored = scores_of(score(difficulty.runtime, difficulty.scorer, line.loaded, difficulty.sources, lambda _: []))
    ifd = np.log(np.where(scored.status == SCORED, scored.parts["ifd"], np.nan))[known]
    quality = np.array(labels.quality)[known]
    bootstrap = line.config.proxy.ensemble == "bootstrap"
    left_out = left_out_rows(line.config.seed, losses.body)[:, known] if bootstrap else None
    parts = AnswerLosses(*(part[:, known] for part in (losses.body, losses.end, losses.other)))
    scores = variants(parts, examples, ifd, left_out)
    report(scores, examples, quality)


def report(variants: Iterator[tuple[str, np.ndarray]], examples: Sequence[Example], quality: np.ndarray) -> None:
    """Print the table of the variants (name and scores (N,) each), given the examples' quality, (N,) strings."""
    spoilt, words = np.isin(quality, SPOILT), np.array([len(example.output.split()) for example in examples])
    cleaned = np.array([bool(example.original.get("cleaning")) for example in examples])
    kinds = [kind for kind in SPOILT if (quality == kind).any()]
    good = (quality == CLEAN) & ~cleaned
    titles = ["variant", "spoilt at 5 / 10 / 15 %", "AUROC", *kinds, "cleaned rows", "cleaned at 10 %", "median words"]
    print(f"{len(examples):,} rows, spoilt {spoilt.mean():.3f}, cleaned {cleaned.mean():.3f}, ", end="")
    print(f"median words {np.median(words):g}\n\n| {' | '.join(titles)} |\n|{'---|' * len(titles)}")
    for name, values in variants:
        scores = np.where(np.isnan(values), -np.inf, values)
        order = np.argsort(-scores, kind="stable")
        tops = [order[: budget(alpha, len(scores))] for alpha in ALPHAS]
        groups = [spoilt, *(quality == kind for kind in kinds), cleaned & ~spoilt]
        areas = [auroc(scores[good], scores[group]) for group in groups]
        cells = [name, " / ".join(f"{spoilt[top].mean():.3f}" for top in tops)]
        cells += ["-" if area is None else f"{area:.3f}" for area in areas]
        cells += [f"{cleaned[tops[1]].mean():.3f}", f"{np.median(words[tops[1]]):g}"]
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
