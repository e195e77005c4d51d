"""Diagnostics that check what G-SNR assumes of the proxy ensemble.

GRADFILTERING (arXiv 2601.13697) treats the members as samples from a posterior, and a falling gradient norm as a sign
of learning. The method fails if the ensemble collapses (the variance V_t of the norms over the members is near 0) or
the proxy does not learn (the scores are near 0). The scores also lose their meaning if gradient norms rise during the
training, or if eps, the small constant in the score's denominators, is larger than the number that it is added to.

Every diagnostic leaves out the examples without statistics (NaN).

G_s and G_t are an example's mean gradient norm over the members at the early and at the late snapshot. V_t is the
variance of the norm over the members at the late snapshot.

Shape letters: M members, N examples, R rank, I inputs and O outputs of an adapted layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from safetensors.numpy import load_file

from gradsift.artifacts import Artifact
from gradsift.diagnostics import Diagnostic
from gradsift.gradients.statistics import Statistics
from gradsift.training.optimization import read_curve

# "Measured" values are from the runs in experiments/LOG.md, in which no ensemble has collapsed.

# Relative distance of two members' updates: 0 for equal ones, sqrt(2) for unrelated ones. Measured: 1.1 (nano, M = 5)
# and 1.3 (SmolLM2, M = 3).
LEAST_ADAPTER_SPREAD = 0.3
# Median of sqrt(V_t) / G_t. Measured: 0.10-0.11 (nano), 0.03 (SmolLM2). Even untrained members have 0.02 (smoke run),
# because each draws its own A. So members below the bound are copies of each other.
LEAST_NORM_SPREAD = 0.01
# Relative fall of the loss between the snapshots. Both losses are of the same examples, so they have no sampling noise.
# Measured: 0.06-0.11; a learning rate too small by orders of magnitude gives 1e-5 and less.
LEAST_FALL_BETWEEN_SNAPSHOTS = 0.001
# Relative fall of the loss from the first to the last tenth of the batches, which are of other examples. Measured: 0.3.
LEAST_FALL_FROM_START = 0.01
# Least number of batches in such a tenth, over all members. With fewer, two tenths differ more by chance (by 5 % in the
# smoke run) than by learning.
LEAST_BATCHES = 10
# Share of examples whose norm rises. Above this share, the scores depend more on the training than on the examples.
MOST_NEGATIVE_DROPS = 0.5
# Relative error of a norm in float32 (in tests, 1e-6 for most norms). The sign of a smaller change is not reliable.
FLOAT32_ERROR = 1e-5
# Median of |G_s - G_t| / G_s. Measured: 0.08-0.16. Below this bound, all scores are near zero and ranked by noise.
LEAST_DROP_SIZE = 0.005
# Share of examples whose V_t or G_s is below eps. Examples with a V_t below eps get the highest scores, and 1 % of the
# pool is a fifth of the paper's smallest budget.
MOST_EPS_DOMINATED = 0.01
# Median relative error of a norm in bfloat16, without the part that all members share, by the precision of the residual
# stream (SmolLM2, 300 Alpaca rows; experiments/2026-11-22-gradient-engine).
BFLOAT16_ERROR = {"float32": 0.0029, "bfloat16": 0.0041}
# Ratio of BFLOAT16_ERROR to the median of sqrt(V_t) / G_t. Its square is the share of V_t that is rounding error. The
# Spearman correlation of G-SNR in bfloat16 with G-SNR in float32 should be at least .98; it was .982 at a ratio of .09,
# and .978 at .13.
MOST_ERROR_OVER_SPREAD = 0.08


def diagnose_ensemble(
    trained: Sequence[Sequence[Artifact]], statistics: Statistics | None, members: int
) -> list[Diagnostic]:
    """Return all diagnostics of an ensemble except `eps_share`, which is computed with the scores.

    Args:
        trained: artifacts of the adapters' epochs up to the late snapshot, as [adapter][epoch - 1].
        statistics: statistics of the gradient norms. If the scorer does not use them, this is None, and the diagnostics
            that need them are left out.
        members: M, the number of members.
    """
    from gradsift.training.lora import ADAPTER_FILE  # imports torch; reports need only the bounds above

    adapters = [load_file(chain[-1].file(ADAPTER_FILE)) for chain in trained]
    curves = [[entry["loss"] for epoch in chain for entry in read_curve(epoch.path)] for chain in trained]
    diagnostics = [adapter_spread(adapters), loss_from_start(curves)]
    if statistics is None:
        return diagnostics
    (numerics,) = trained[0][-1].computed_by.values()  # how the proxy was computed
    error = 0.0 if numerics["precision"] == "float32" else BFLOAT16_ERROR[numerics["residual"]]
    return [
        *diagnostics,
        norm_spread(statistics, members),
        loss_between_snapshots(statistics),
        drop_sign(statistics),
        drop_size(statistics),
        norm_precision(error, statistics),
    ]


def adapter_spread(adapters: Sequence[Mapping[str, np.ndarray]]) -> Diagnostic:
    """Judge the mean distance between the updates B A of two members, divided by the mean norm of a member's update.

    An update consists of the products B A of all layers. The factors A and B themselves are not compared. Each member
    draws its own A, which stays near its initial value, and learns B for this A. So the factors of two members differ
    (relative distance sqrt(2)) even if both members compute the same function.

    Args:
        adapters: each member's `lora_A` (R, I) and `lora_B` (O, R) weights, by peft's names.
    """
    name, value = "adapter_spread", "relative_distance"
    if len(adapters) < 2:
        return Diagnostic.unknown(name, value, "one adapter has no spread")
    products = update_products(adapters)  # (M, M)
    squares = np.diag(products)  # (M,)
    norm = float(np.sqrt(squares).mean())
    if norm == 0:
        check = "that proxy.learning_rate and the number of steps move the adapters"
        return Diagnostic.judged(name, True, {value: None}, "the update of every member's adapter is still zero", check)
    first, second = np.triu_indices(len(adapters), k=1)
    # |U - U'|^2 = |U|^2 + |U'|^2 - 2 <U, U'> for the updates U = B A of two members; may be rounded to below zero
    between = squares[first] + squares[second] - 2 * products[first, second]
    spread = float(np.sqrt(np.maximum(between, 0)).mean()) / norm
    seen = f"two members' updates lie {spread:.2g} of their norm apart (unrelated ones 1.4)"
    check = "V_t, and the members' seeds and data orders"
    return Diagnostic.judged(name, spread < LEAST_ADAPTER_SPREAD, {value: spread}, seen, check)


def update_products(adapters: Sequence[Mapping[str, np.ndarray]]) -> np.ndarray:
    """Return the inner products of the members' updates B A, (M, M) float64, summed over the layers.

    The large matrices B A (O, I) are never formed, only matrices (R, R). For the factors of two members:

        <B A, B' A'> = sum over the entries of (B^T B') * (A A'^T)
    """
    products = np.zeros((len(adapters), len(adapters)))
    for name in adapters[0]:
        if "lora_A" not in name:
            continue
        # float64, because the distance of two similar updates is a small difference of large products
        a = np.stack([adapter[name] for adapter in adapters]).astype(np.float64)  # (M, R, I)
        b_name = name.replace("lora_A", "lora_B")
        b = np.stack([adapter[b_name] for adapter in adapters]).astype(np.float64)  # (M, O, R)
        for m, n in np.ndindex(products.shape):
            products[m, n] += ((b[m].T @ b[n]) * (a[m] @ a[n].T)).sum()
    return products


def norm_spread(statistics: Statistics, members: int) -> Diagnostic:
    """Judge the median over the examples of sqrt(V_t) / G_t, the norms' coefficient of variation over the members."""
    name, value = "norm_spread", "median_variation"
    if members < 2:
        return Diagnostic.unknown(name, value, "one member has no variance")
    variations = _variations(statistics)
    if not variations.size:
        return Diagnostic.unknown(name, value, "no example has a gradient at the late snapshot")
    variation = float(np.median(variations))
    seen = f"the members' gradient norms of an example vary by {100 * variation:.2g}% of their mean"
    check = "the members' seeds; V_t may be rounding error, and a higher proxy.learning_rate makes the members differ"
    return Diagnostic.judged(name, variation < LEAST_NORM_SPREAD, {value: variation}, seen, check)


def norm_precision(error: float, statistics: Statistics) -> Diagnostic:
    """Judge `error`, the relative rounding error of a norm (0 for float32), divided by the median of sqrt(V_t) / G_t.

    The members' rounding errors differ and therefore contribute to V_t. They are harmless only if they are much smaller
    than the differences between the members' norms.
    """
    name, value = "norm_precision", "error_over_spread"
    if not error:
        return Diagnostic(name, "ok", {value: 0.0}, "gradient norms were computed in float32")
    variations = _variations(statistics)
    spread = float(np.median(variations)) if variations.size else 0.0
    if not spread > 0:
        return Diagnostic.unknown(name, value, "the members do not differ")
    share = error / spread
    seen = f"bfloat16 changes a norm by about {error:.1%}, and the members differ by {spread:.1%}"
    check = "the ranking with compute.precision=float32"
    return Diagnostic.judged(name, share > MOST_ERROR_OVER_SPREAD, {value: share}, seen, check)


def _variations(statistics: Statistics) -> np.ndarray:
    """Return sqrt(V_t) / G_t of the examples that have a gradient at the late snapshot."""
    variance, norm = _defined(statistics.V_t, statistics.G_t)
    variations: np.ndarray = np.sqrt(variance[norm > 0]) / norm[norm > 0]
    return variations


def loss_between_snapshots(statistics: Statistics) -> Diagnostic:
    """Judge the relative fall of the members' mean loss from the early to the late snapshot, over the same examples."""
    name, (early, late) = "loss_between_snapshots", _defined(statistics.loss_s, statistics.loss_t)
    if not early.size or not early.mean() > 0:
        return Diagnostic.unknown(name, "relative_fall", "no example has a loss that could fall")
    return _fall(name, early, late, "at the early snapshot", "at the late one", LEAST_FALL_BETWEEN_SNAPSHOTS)


def loss_from_start(curves: Sequence[Sequence[float]]) -> Diagnostic:
    """Judge the relative fall of the loss (nats a token) from the first to the last tenth of the members' batches."""
    name = "loss_from_start"
    firsts: list[float] = []
    lasts: list[float] = []
    for curve in curves:
        tenth = max(1, len(curve) // 10)
        firsts += curve[:tenth]
        lasts += curve[-tenth:]
    if len(firsts) < LEAST_BATCHES:
        reason = f"a tenth of all members' batches is only {len(firsts)} of them, too few to compare"
        return Diagnostic.unknown(name, "relative_fall", reason)
    if not np.mean(firsts) > 0:
        return Diagnostic.unknown(name, "relative_fall", "the first batches have no loss that could fall")
    moments = ("in the first tenth of the batches", "in the last")
    return _fall(name, np.array(firsts), np.array(lasts), *moments, LEAST_FALL_FROM_START)


def _fall(name: str, before: np.ndarray, after: np.ndarray, when: str, later: str, least: float) -> Diagnostic:
    first, last = float(before.mean()), float(after.mean())
    fall = (first - last) / first
    seen = f"the members' mean loss was {first:.3f} nats a token {when} and {last:.3f} {later} ({-100 * fall:+.2g}%)"
    check = "proxy.learning_rate, the number of steps, and that the proxy knows the data's language and template"
    return Diagnostic.judged(name, fall < least, {"relative_fall": fall, "first": first, "last": last}, seen, check)


def drop_sign(statistics: Statistics) -> Diagnostic:
    """Judge the mean drop G_s - G_t and the share of examples whose drop is negative.

    If the drop is negative, dividing it by V_t favours examples with a high variance, which is the opposite of the
    score's purpose. A drop within the rounding error does not count as negative; `drop_size` warns of such drops.
    """
    name, value = "drop_sign", "negative_share"
    early, late = _defined(statistics.G_s, statistics.G_t)
    if not early.size:
        return Diagnostic.unknown(name, value, "no example has a gradient norm")
    drop, rounding = early - late, FLOAT32_ERROR * early
    if not (np.abs(drop) > rounding).any():
        return Diagnostic.unknown(name, value, "no gradient norm changed by more than rounding between the snapshots")
    mean, negative = float(drop.mean()), float((drop < -rounding).mean())
    return Diagnostic.judged(
        name,
        negative > MOST_NEGATIVE_DROPS or mean < -rounding.mean(),
        {value: negative, "mean_drop": mean, "mean_early_norm": float(early.mean())},
        f"the gradient norm rose between the snapshots for {negative:.0%} of the rows (mean drop {mean:.3g} of "
        f"{early.mean():.3g})",
        "proxy.learning_rate and the number of steps before the first snapshot; where the norm rises, a high V_t "
        "raises the score",
    )


def drop_size(statistics: Statistics) -> Diagnostic:
    """Judge the median of |G_s - G_t| / G_s; if it is near zero, the scores are near zero too."""
    name, value = "drop_size", "median_change"
    early, late = _defined(statistics.G_s, statistics.G_t)
    moved = early > 0
    if not moved.any():
        return Diagnostic.unknown(name, value, "no example has a gradient at the early snapshot")
    change = float(np.median(np.abs(early[moved] - late[moved]) / early[moved]))
    seen = f"the gradient norm of an example changed by {100 * change:.2g}% between the snapshots"
    check = "proxy.learning_rate and the distance of proxy.snapshots; scores near zero are ranked by noise"
    return Diagnostic.judged(name, change < LEAST_DROP_SIZE, {value: change}, seen, check)


def eps_share(eps: float, denominators: Mapping[str, np.ndarray]) -> Diagnostic:
    """Judge the share of examples in which eps is at least as large as the number that eps is added to.

    Args:
        denominators: the numbers that eps is added to, (N,) each, by their names `G_s` and `V_t`. G_s is in units of
            the gradient norm, and V_t in units of its square.
    """
    defined = {name: values[np.isfinite(values)] for name, values in denominators.items()}
    if not all(values.size for values in defined.values()):
        return Diagnostic.unknown("eps_share", next(iter(defined)), "no example has a gradient norm")
    shares = {name: float((eps >= values).mean()) for name, values in defined.items()}
    largest = max(shares, key=shares.__getitem__)
    places = " and ".join(f"at least {name} in {share:.1%} of the rows" for name, share in shares.items())
    check = "scorer.eps, and V_t for a collapsed ensemble; in these rows eps decides the score instead of the ensemble"
    values = {largest: shares[largest], **shares}
    return Diagnostic.judged(
        "eps_share", shares[largest] > MOST_EPS_DOMINATED, values, f"eps={eps:g} is {places}", check
    )


def _defined(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the entries of both arrays at the positions where both are finite."""
    both = np.isfinite(first) & np.isfinite(second)
    return first[both], second[both]
