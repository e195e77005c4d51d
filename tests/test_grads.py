"""Laws of GrADS: the textbook's density, the score from its parts, and columns without information left out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from scipy.stats import gaussian_kde, rankdata
from sklearn.neighbors import KernelDensity
from test_config import composed

from gradsift.config import FieldsConfig, GradsConfig
from gradsift.data.examples import Example
from gradsift.data.formats import parse_rows
from gradsift.errors import ConfigError
from gradsift.features.vectors import Features, unit_rows
from gradsift.gradients.embedding_head import COLUMNS, EmbeddingGradients
from gradsift.scoring import grads as module
from gradsift.scoring.grads import grads, kernel_density, scott, signal_of, to_unit, word_rarity
from gradsift.scoring.scores import SCORED, UNDEFINED, Scores

pytestmark = pytest.mark.numerics

DEFAULTS = {
    name: value
    for name, value in vars(GradsConfig(_target_="x", name="grads")).items()
    if name not in ("_target_", "name")
}
ENTRIES = 100


@contextmanager
def task(description: str, total: int) -> Iterator[Any]:
    done: list[int] = []
    yield done.append
    assert sum(done) == total


def gradients(stds: list[float], **columns: list[float]) -> EmbeddingGradients:
    """Return gradients of which only the head's standard deviation and the given columns vary."""
    table = {name: np.ones(len(stds)) for name in COLUMNS} | {
        "head_std": np.array(stds),
        "head_mean": np.zeros(len(stds)),
    }
    return EmbeddingGradients(**(table | {n: np.array(v) for n, v in columns.items()}), entries=ENTRIES)


def random_gradients(count: int, seed: int = 0) -> EmbeddingGradients:
    values = np.random.default_rng(seed).lognormal(size=(len(COLUMNS), count))
    return EmbeddingGradients(**dict(zip(COLUMNS, values, strict=True)), entries=ENTRIES)


def pool(*outputs: str) -> list[Example]:
    rows = [(i, {"instruction": "say", "input": "", "output": output}) for i, output in enumerate(outputs)]
    return parse_rows(rows, "alpaca", FieldsConfig())[0]


def vectors(*rows: list[float]) -> Features:
    return Features(unit_rows(np.array(rows, dtype=np.float32)))


def scored(gradient: EmbeddingGradients, embeddings: Features, **constants: Any) -> Scores:
    examples = pool(*(" ".join(f"w{j}" for j in range(i + 1)) for i in range(len(embeddings))))
    return grads(examples, gradient, embeddings, task, **(DEFAULTS | constants))


# ------------------------------------------------------------------------------------------- density


@pytest.mark.parametrize("columns", [1, 2, 6])
@pytest.mark.parametrize("bandwidth", [0.2, 1.0])
@pytest.mark.parametrize("block", [1, 2000, 10**6])
def test_the_density_is_scikit_learns(columns: int, bandwidth: float, block: int, monkeypatch: Any) -> None:
    monkeypatch.setattr(module, "_CACHE_BYTES", block)
    points = np.random.default_rng(0).normal(size=(60, columns))
    twin = KernelDensity(bandwidth=bandwidth).fit(points)
    np.testing.assert_allclose(kernel_density(points, bandwidth), np.exp(twin.score_samples(points)), rtol=1e-10)


def test_in_one_column_scotts_bandwidth_is_scipys() -> None:
    points = np.random.default_rng(0).normal(size=50)
    points = (points - points.mean()) / points.std(ddof=1)  # scipy's variance is the sample's
    found = kernel_density(points[:, None], scott(50, 1))
    np.testing.assert_allclose(found, gaussian_kde(points)(points), rtol=1e-10)


def test_the_density_of_two_points_by_hand() -> None:
    near, peak = np.exp(-0.5 * (1 / 0.5) ** 2), 1 / (0.5 * np.sqrt(2 * np.pi))
    found = kernel_density(np.array([[0.0], [1.0]]), 0.5)
    np.testing.assert_allclose(found, [peak * (1 + near) / 2] * 2, rtol=1e-12)


# -------------------------------------------------------------------------------------------- signal


def test_a_signal_is_standardised_and_has_the_columns_of_its_kind() -> None:
    values, rows = random_gradients(40), np.arange(40) % 3 > 0
    for combine, columns in (("statistics", 8), ("norms", 2), ("norm", 1)):
        signal = signal_of(values, combine, rows)
        assert signal.shape == (rows.sum(), columns)
        np.testing.assert_allclose(signal.mean(0), 0, atol=1e-12)
        np.testing.assert_allclose(signal.std(0), 1, rtol=1e-12)
    head = np.hypot(values.head_mean, values.head_std)[rows]
    norm = np.hypot(head, np.hypot(values.embedding_mean, values.embedding_std)[rows])
    assert np.corrcoef(signal_of(values, "norms", rows)[:, 1], head)[0, 1] == pytest.approx(1)
    assert np.corrcoef(signal_of(values, "norm", rows)[:, 0], norm)[0, 1] == pytest.approx(1)


def test_means_that_are_rounding_and_constant_columns_are_left_out() -> None:
    rows = np.ones(5, dtype=bool)
    varying = [1.0, 2.0, 3.0, 4.0, 6.0]
    rounding = gradients(varying, embedding_mean=[1e-6, -1e-6, 3e-6, 0.0, 2e-6])  # over an embedding_std of 1
    assert signal_of(rounding, "statistics", rows).shape == (5, 1)
    real = gradients(varying, embedding_mean=[0.01, -0.01, 0.03, 0.0, 0.02])  # 10 times that is the sum over the norm
    assert signal_of(real, "statistics", rows).shape == (5, 2)
    assert signal_of(gradients([1.0] * 5), "statistics", rows).shape == (5, 0)


def test_a_signal_without_columns_is_warned_of_and_gives_everyone_a_half() -> None:
    found = scored(gradients([1.0] * 3), vectors([1, 0], [0, 1], [1, 1]), weights=[1, 0, 0])
    assert found.score.tolist() == [0.5, 0.5, 0.5]
    (signal,) = found.diagnostics
    assert (signal.name, signal.verdict, signal.values["columns"]) == ("grads_signal", "warning", 0)
    assert f"combine={DEFAULTS['combine']}" in signal.message
    assert "representativeness is the same for all of them" in signal.message


# --------------------------------------------------------------------------------------------- score


def test_the_score_by_hand() -> None:
    """One column with two close examples, one apart and one far apart; the embeddings show the opposite."""
    embeddings = vectors([1, 0], [0, 1], [3, 4], [4, 3])
    found = scored(gradients([1.0, 1.1, 2.0, 9.0]), embeddings, weights=[4, 2, 1], combine="norm")
    # density by rank: the second lies between the first and the third
    assert found.parts["representativeness"].tolist() == [2 / 3, 1, 1 / 3, 0]
    # mean cosines 1.4/3, 1.4/3, 2.36/3, 2.36/3; largest .8, .8, .96, .96
    assert found.parts["diversity"] == pytest.approx([5 / 6, 5 / 6, 1 / 6, 1 / 6])
    assert found.parts["redundancy"] == pytest.approx([1 / 6, 1 / 6, 5 / 6, 5 / 6])
    weighted = 4 * np.array([2 / 3, 1, 1 / 3, 0]) + 2 * np.array([5, 5, 1, 1]) / 6 + np.array([5, 5, 1, 1]) / 6
    np.testing.assert_allclose(found.score, weighted)
    assert set(found.status) == {SCORED}


def test_the_score_is_the_sum_of_its_parts_for_all_constants() -> None:
    rng = np.random.default_rng(2)
    embeddings = Features(unit_rows(rng.normal(size=(30, 6)).astype(np.float32)))
    for constants in ({}, {"scale": "minmax"}, {"region": "low", "neighbours": 4}, {"diversity": "words"}):
        found = scored(random_gradients(30), embeddings, weights=[0.5, 2, 3], bandwidth=0.7, **constants)
        r, c, s = (found.parts[name] for name in ("representativeness", "diversity", "redundancy"))
        np.testing.assert_allclose(found.score, 0.5 * r + 2 * c + 3 * (1 - s))
        # equal ones share a rank: two that are nearest to each other, and all that lie alone
        assert all(part.min() >= 0 and part.max() <= 1 and np.ptp(part) > 0.5 for part in (r, c, s))


def test_the_low_region_is_the_high_one_turned_over() -> None:
    embeddings = vectors(*np.eye(12).tolist())
    high, low = (scored(random_gradients(12), embeddings, weights=[1, 0, 0], region=r) for r in ("high", "low"))
    np.testing.assert_allclose(high.score, 1 - low.score)


@pytest.mark.parametrize(("left_out", "name"), [(0, "representativeness"), (1, "diversity"), (2, "redundancy")])
def test_a_component_of_weight_0_is_not_computed(left_out: int, name: str, monkeypatch: Any) -> None:
    def never(*arguments: Any, **options: Any) -> Any:
        raise AssertionError("computed all the same")

    monkeypatch.setattr(module, ("kernel_density", "mean_cosines", "nearest_cosines")[left_out], never)
    weights = [1.0, 1.0, 1.0]
    weights[left_out] = 0.0
    found = scored(random_gradients(9), vectors(*np.eye(9).tolist()), weights=weights)
    assert name not in found.parts
    assert len(found.parts) == 2
    assert np.isfinite(found.score).all()


def test_an_example_without_response_or_direction_has_no_score_and_changes_no_other() -> None:
    nan = float("nan")
    values = {name: [*getattr(random_gradients(6), name), nan] for name in COLUMNS}
    with_holes = EmbeddingGradients(**{n: np.array(v) for n, v in values.items()}, entries=ENTRIES)
    rows = np.random.default_rng(3).normal(size=(7, 4)).tolist()
    rows[0] = [0, 0, 0, 0]
    found = scored(with_holes, vectors(*rows))
    assert found.status.tolist() == [UNDEFINED, *[SCORED] * 5, UNDEFINED]
    assert found.reason.tolist() == ["its embedding has no direction", *[""] * 5, found.reason[6]]
    assert "no response token" in found.reason[6]
    assert np.isnan(found.score[[0, 6]]).all()
    assert all(np.isnan(part[[0, 6]]).all() and np.isfinite(part[1:6]).all() for part in found.parts.values())
    whole = EmbeddingGradients(**{n: np.array(v)[1:6] for n, v in values.items()}, entries=ENTRIES)
    np.testing.assert_allclose(
        scored(whole, vectors(*rows[1:6])).parts["representativeness"], found.parts["representativeness"][1:6]
    )
    without_embeddings = scored(with_holes, vectors(*rows), weights=[1, 1, 0], diversity="words")
    assert without_embeddings.status.tolist() == [*[SCORED] * 6, UNDEFINED]


@pytest.mark.parametrize(("diversity", "defined"), [("spread", False), ("words", True)])
def test_content_alone_asks_for_a_direction_where_it_is_measured_by_embeddings(diversity: str, defined: bool) -> None:
    embeddings = vectors([1, 0], [0, 1], [0, 0])
    found = scored(random_gradients(3), embeddings, weights=[0, 1, 0], diversity=diversity)
    assert found.status.tolist() == [SCORED, SCORED, SCORED if defined else UNDEFINED]


def test_copies_are_the_most_redundant() -> None:
    rows = np.random.default_rng(4).normal(size=(8, 5)).tolist()
    rows[5] = rows[2]
    redundancy = scored(random_gradients(8), vectors(*rows)).parts["redundancy"]
    assert set(np.argsort(redundancy)[-2:].tolist()) == {2, 5}


def test_rarity_of_words_by_hand() -> None:
    examples = pool("Red red", "red blue", "...")
    for example in examples:
        object.__setattr__(example, "instruction", "")
    np.testing.assert_allclose(word_rarity(examples), [np.log(1.5), (np.log(1.5) + np.log(3)) / 2, 0])


# --------------------------------------------------------------------------------------------- scale


def test_ranks_are_scipys_and_ties_count_half() -> None:
    values = np.random.default_rng(0).integers(0, 9, 50).astype(float)
    rows = np.arange(50) % 4 > 0
    found = to_unit(values, rows, "rank")
    np.testing.assert_allclose(found[rows], (rankdata(values[rows]) - 1) / (rows.sum() - 1))
    assert np.isnan(found[~rows]).all()
    assert to_unit(np.array([3.0, 5.0, 4.0]), np.ones(3, bool), "minmax").tolist() == [0, 1, 0.5]
    for scale in ("rank", "minmax"):
        assert to_unit(np.array([7.0]), np.ones(1, bool), scale).tolist() == [0.5]
        assert to_unit(np.array([7.0, 7.0]), np.ones(2, bool), scale).tolist() == [0.5, 0.5]


# ------------------------------------------------------------------------------------------ mistakes


def test_neighbours_that_are_not_there_are_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"scorer.neighbours=3 compares .* 3 others, but only 3 examples have an embedding"
    ):
        scored(random_gradients(4), vectors([1, 0], [0, 1], [1, 1], [0, 0]), neighbours=3)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("weights", [1, 1], "scorer.weights=[1, 1] must be three numbers"),
        ("weights", [0, 0, 0], "must be three numbers, w_g, w_d and w_s, not all 0"),
        ("weights", [1, -1, 1], "scorer.weights=-1 is out of range"),
        ("bandwidth", "silverman", "scorer.bandwidth='silverman' is not a number; give one above 0, or scott"),
        ("bandwidth", 0, "scorer.bandwidth=0 is out of range"),
        ("bandwidth", True, "scorer.bandwidth=True is not a number"),
        ("combine", "sum", "choose one of: statistics, norms, norm"),
        ("region", "middle", "choose one of: high, low"),
        ("diversity", "none", "choose one of: spread, words"),
        ("scale", "z", "choose one of: rank, minmax"),
        ("neighbours", 0, "scorer.neighbours=0 is out of range"),
    ],
)
def test_a_constant_that_cannot_be_used_is_named(option: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        GradsConfig(**{"_target_": "x", "name": "grads", option: value})
    assert message in str(caught.value)


def test_a_bandwidth_may_be_a_number() -> None:
    assert composed("scorer=grads", "scorer.bandwidth=0.3").scorer.bandwidth == 0.3
    assert composed("scorer=grads").scorer.weights == [1, 1, 1]
