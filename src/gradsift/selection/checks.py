"""Diagnostics that compare a selection with the pool: lengths, loss, drop of the gradient norm, and coverage.

A known failure of GRADFILTERING (arXiv 2601.13697) is to select trivially easy examples: rows that the proxy fits
easily, or rows that are merely short. A check leaves out rows whose value is NaN.

Shape letters: N examples of the pool, k selected ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gradsift.data.examples import read_blocks
from gradsift.diagnostics import Diagnostic
from gradsift.features.vectors import Features, nearest_anchor_cosines

# A warning needs a mean of the selection below this share of the pool's mean. Measured ratios of the two means: 0.44
# for a score that only preferred short answers, 0.2 for the late loss itself in the embedded world
# (experiments/LOG.md), 0.6-0.7 for G-SNR.
LEAST_OF_POOL = 0.5
# A warning also needs this distance from the pool's mean, in standard errors of the mean of k random examples: the mean
# of few rows may be below half the pool's mean by chance.
LEAST_STANDARD_ERRORS = 3.0
# Largest share of selected examples with a rising norm without a warning. It is lower than the limit for the whole pool
# (`ensemble_checks`), since the sign matters most among the selected examples.
MOST_NEGATIVE_DROPS = 0.1
# Largest ratio, without a warning, of the pool's mean distance to the selection to its mean distance to a random
# selection of the same size. On 5,000 Alpaca rows (tf-idf in 128 dimensions, 5 and 10 %) the ratio of two random
# selections is within 1 % of 1; the shortest answers give 1.27, the longest 1.07 to 1.12.
MOST_OF_RANDOM_DISTANCE = 1.15
COVERED_WITHIN = 0.1  # one minus cosine; DEITA treats two rows as similar up to this value

_MEANING = {
    "late_loss": "late loss, in nats a token,",
    "response_tokens": "number of response tokens",
    "response_characters": "number of response characters",
    "prompt_characters": "number of prompt characters",
    "response_to_prompt": "ratio of response to prompt characters",
}


def diagnose_selection(
    positions: np.ndarray, pool: Path, measures: Mapping[str, np.ndarray], drop: np.ndarray | None
) -> list[Diagnostic]:
    """Return the diagnostics of a selection.

    Args:
        positions: (k,) positions of the selected examples.
        pool: the file of the N examples.
        measures: `late_loss` and `response_tokens` from the ensemble, (N,) each; may be empty. If the numbers of
            response tokens are known, the numbers of response characters are not checked.
        drop: (N,) G_s - G_t, the fall of the mean gradient norm between the snapshots; if None, it is not checked.
    """
    compared = {**lengths(pool), **measures}
    if "response_tokens" in measures:
        del compared["response_characters"]  # one warning for short responses is enough
    diagnostics = [] if drop is None else [selected_drop_sign(drop, positions)]
    return diagnostics + [against_pool(name, compared[name], positions) for name in _MEANING if name in compared]


def lengths(pool: Path) -> dict[str, np.ndarray]:
    """Return the lengths of the texts in a file of N examples, which is read block by block.

    Returns:
        Three arrays (N,) float64: `response_characters` of the trained assistant turns, `prompt_characters` of all
        other text, and `response_to_prompt`, the ratio of the two (NaN if there is no other text).
    """
    responses, prompts = [], []
    for block in read_blocks(pool, ("instruction", "input", "output", "history")):
        turns = block["history"].flatten()
        owners = np.repeat(np.arange(block.num_rows), _numbers(pc.list_value_length(block["history"])))
        length = _characters(pc.struct_field(turns, "content"))
        is_assistant = pc.equal(pc.struct_field(turns, "role"), "assistant")
        trained = _numbers(pc.and_(is_assistant, pc.struct_field(turns, "is_trained")))
        earlier = np.bincount(owners[trained], length[trained], minlength=block.num_rows)
        others = np.bincount(owners[~trained], length[~trained], minlength=block.num_rows)
        responses.append(earlier + _characters(block["output"]))
        prompts.append(others + _characters(block["instruction"]) + _characters(block["input"]))
    response, prompt = np.concatenate(responses), np.concatenate(prompts)
    ratio = np.divide(response, prompt, out=np.full(len(prompt), np.nan), where=prompt > 0)
    return {"response_characters": response, "prompt_characters": prompt, "response_to_prompt": ratio}


def _numbers(array: pa.Array) -> np.ndarray:
    numbers: np.ndarray = array.to_numpy(zero_copy_only=False)
    return numbers


def _characters(texts: pa.Array) -> np.ndarray:
    return _numbers(pc.utf8_length(texts)).astype(float)


def against_pool(measure: str, values: np.ndarray, positions: np.ndarray) -> Diagnostic:
    """Warn if the mean of `values` (N,) over the selection is far below their mean over the pool.

    NaN values are left out.
    """
    name = f"selection_{measure}"
    known, chosen = values[np.isfinite(values)], values[positions][np.isfinite(values[positions])]
    if not chosen.size or not known.mean() > 0:
        return Diagnostic.unknown(name, "ratio", f"the {_MEANING[measure]} is not known for the selected rows")
    pool, selection = float(known.mean()), float(chosen.mean())
    # standard error of the mean of as many random examples, drawn without replacement
    error = float(known.std() * np.sqrt((1 - chosen.size / known.size) / chosen.size))
    return Diagnostic.judged(
        name,
        selection < LEAST_OF_POOL * pool and selection < pool - LEAST_STANDARD_ERRORS * error,
        {"ratio": selection / pool, "selection": selection, "pool": pool},
        f"the mean {_MEANING[measure]} is {selection:.3g} in the selection and {pool:.3g} in the pool",
        "the selected rows, and the full-data (scorer=full) and random baselines: trivial rows teach little",
    )


def selected_drop_sign(drop: np.ndarray, positions: np.ndarray) -> Diagnostic:
    """Warn if the drop G_s - G_t (N,) is negative (the norm rose) for many selected examples or on average."""
    chosen = drop[positions][np.isfinite(drop[positions])]
    if not chosen.size:
        return Diagnostic.unknown("selection_drop_sign", "negative_share", "no selected row has a gradient norm")
    negative, mean = float((chosen < 0).mean()), float(chosen.mean())
    return Diagnostic.judged(
        "selection_drop_sign",
        negative > MOST_NEGATIVE_DROPS or mean < 0,
        {"negative_share": negative, "mean_drop": mean},
        f"the gradient norm rose between the snapshots for {negative:.0%} of the selected rows (mean drop {mean:.3g})",
        "the number of steps before the first snapshot; where the norm rises, a high V_t raises the score",
    )


def coverage(features: Features, positions: np.ndarray, radius: float) -> Diagnostic:
    """Check how well the selection covers the pool, compared with a random selection of the same size.

    An example's distance to a selection is one minus its cosine to the nearest selected example. The example counts as
    covered if the distance is at most `radius`. Examples whose vectors are zeros are left out.

    Args:
        positions: (k,) positions of the selected examples.
    """
    usable = np.flatnonzero(features.has_direction)
    size = len(np.intersect1d(positions, usable))
    if not size:
        return Diagnostic.unknown("coverage", "distance_to_random", "no selected row has a vector with a direction")
    # a fixed seed: the diagnostic is stored with the selection and must not differ from run to run
    drawn = np.random.default_rng(0).choice(usable, size, replace=False)
    to_selection, to_random = (1 - nearest_anchor_cosines(features, chosen)[usable] for chosen in (positions, drawn))
    distance, random_distance = float(to_selection.mean()), float(to_random.mean())
    # the cosine of an example with itself, or with its copy, is 1 up to rounding
    covered, covered_randomly = (float((d <= radius + 1e-6).mean()) for d in (to_selection, to_random))
    ratio = distance / random_distance if random_distance > 1e-6 else 1.0
    return Diagnostic.judged(
        "coverage",
        ratio > MOST_OF_RANDOM_DISTANCE,
        {
            "distance_to_random": ratio,
            "distance": distance,
            "random_distance": random_distance,
            "covered": covered,
            "covered_randomly": covered_randomly,
        },
        f"the mean distance (one minus cosine) of a pool row to the nearest selected row is {distance:.3g}, and to the "
        f"nearest row of a random selection {random_distance:.3g}; {covered:.0%} of the pool are within {radius:g} of "
        f"the selection, and {covered_randomly:.0%} within {radius:g} of the random one",
        "which part of the pool the score leaves out; a selector that spreads its choice covers more",
    )
