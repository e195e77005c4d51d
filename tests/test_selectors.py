"""Laws of every selector: exactly the budget, scored examples only, none twice, whatever the vectors and blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hydra import compose, initialize_config_dir

from gradsift.composition import conf_folder, register_schemas
from gradsift.config import load_config
from gradsift.data.examples import Example
from gradsift.errors import GradsiftError
from gradsift.features import vectors as products
from gradsift.features.vectors import Features, unit_rows
from gradsift.runtime import unseen
from gradsift.scoring.scores import EXCLUDED, SCORED, UNDEFINED, Scores
from gradsift.selection.choice import Choice
from gradsift.selection.clusters import clusters
from gradsift.selection.facility_location import facility_location
from gradsift.selection.gradient_walk import gradient_walk
from gradsift.selection.gumbel import gumbel
from gradsift.selection.quotas import quotas
from gradsift.selection.repr_filter import repr_filter
from gradsift.selection.round_robin import round_robin, round_robin_queries
from gradsift.selection.topk import topk
from gradsift.sources import Source, method

pytestmark = pytest.mark.numerics

WALK = {"explained": 0.5, "keep": 0.8, "fill": "strict", "graph": True, "neighbours": None}
QUERIES = 5


def examples_of(scores: Scores) -> list[Example]:
    """Return examples of two sources."""
    sources = ["ab"[int(value > 0)] for value in scores.parts["task:b"]]
    return [Example(row, str(row), "", (), "", "", "", {"source": name}) for row, name in enumerate(sources)]


def by_source(scores: Scores, size: int, **constants: Any) -> Choice:
    return quotas(scores, size, examples_of(scores), column="source", **constants)


# name: the selector, how many sets of vectors it takes, its constants
SELECTORS: dict[str, tuple[Callable[..., Choice], int, dict[str, Any]]] = {
    "topk": (topk, 0, {}),
    "facility_location": (facility_location, 1, {"similarity": "exp_distance", "candidates": 1.0}),
    "facility_location_cosine": (facility_location, 1, {"similarity": "cosine", "candidates": 1.0}),
    "repr_filter": (repr_filter, 1, {"threshold": 0.9}),
    "clusters": (clusters, 1, {"clusters": 4, "allocation": "proportional", "seed": 0}),
    "clusters_equal": (clusters, 1, {"clusters": 4, "allocation": "equal", "seed": 0}),
    "quotas": (by_source, 0, {"shares": None}),
    "quotas_given": (by_source, 0, {"shares": {"a": 1, "b": 3}}),
    "gumbel": (gumbel, 0, {"temperature": 1.0, "seed": 3}),
    "round_robin": (round_robin, 0, {}),
    "round_robin_queries": (round_robin_queries, 2, {"fidelity": "original"}),
    "gradient_walk": (gradient_walk, 2, WALK),
    "gradient_walk_topup": (gradient_walk, 2, {**WALK, "fill": "topup"}),
    "gradient_walk_neighbours": (gradient_walk, 2, {**WALK, "neighbours": 3}),
    "gradient_walk_without_graph": (gradient_walk, 2, {**WALK, "graph": False}),
}
ON_VECTORS = [name for name, (_, sources, _) in SELECTORS.items() if sources]
PARTLY = 7  # rows of a pool that are not scored

every_selector = pytest.mark.parametrize("name", SELECTORS)


def select(name: str, scores: Scores, size: int, vectors: np.ndarray) -> Choice:
    """Return a selector's choice, with fixed target vectors if it takes any."""
    function, sources, constants = SELECTORS[name]
    target = unit_rows(np.random.default_rng(99).normal(size=(QUERIES, vectors.shape[1])) + 1)
    features = [Features(vectors), Features(target, ("a",) * QUERIES)][:sources]
    return function(scores, size, *features, **constants)


def pool(count: int = 40, dimensions: int = 6, seed: int = 0) -> tuple[Scores, np.ndarray]:
    """Return a score table with some unscored rows, and vectors with a common direction."""
    rng = np.random.default_rng(seed)
    parts = {f"task:{task}": rng.normal(size=count) for task in ("b", "a")}
    scores = Scores(rng.normal(size=count), {"other": np.zeros(count), **parts})
    marked = rng.permutation(count)
    scores.mark(np.isin(np.arange(count), marked[:4]), UNDEFINED, "no response")
    scores.mark(np.isin(np.arange(count), marked[4:PARTLY]), EXCLUDED, "dropped")
    scores.score[scores.status == UNDEFINED] = np.nan
    return scores, unit_rows(rng.normal(size=(count, dimensions)) + 0.7)


def permuted(scores: Scores, order: np.ndarray) -> Scores:
    turned = Scores(scores.score[order], {name: part[order] for name, part in scores.parts.items()})
    turned.status, turned.reason = scores.status[order], scores.reason[order]
    return turned


def require_lawful(choice: Choice, scores: Scores, size: int) -> None:
    positions = choice.positions
    assert positions.dtype == np.int64
    assert len(set(positions.tolist())) == len(positions) <= size
    assert (scores.status[positions] == SCORED).all()
    if len(positions) < min(size, int((scores.status == SCORED).sum())):
        (said,) = [diagnostic for diagnostic in choice.diagnostics if diagnostic.name == "shortfall"]
        assert said.values["missing"] == size - len(positions)
        assert said.verdict == "warning"


@every_selector
@pytest.mark.parametrize("size", [1, 2, 10, 33, 34, 40])
def test_scored_examples_fill_the_budget_or_a_shortfall_is_reported(name: str, size: int) -> None:
    scores, vectors = pool()
    require_lawful(select(name, scores, size, vectors), scores, size)


@every_selector
def test_all_candidates_are_taken_where_the_budget_has_room_for_them_and_nothing_stops_the_method(name: str) -> None:
    scores, vectors = pool()
    candidates = np.flatnonzero(scores.status == SCORED)
    choice = select(name, scores, len(candidates), vectors)
    if not any(diagnostic.name == "shortfall" for diagnostic in choice.diagnostics):
        assert sorted(choice.positions.tolist()) == candidates.tolist()
    else:
        assert name in ("repr_filter", *(walk for walk in SELECTORS if walk.startswith("gradient_walk")))


@every_selector
@pytest.mark.parametrize("size", [3, 12])
def test_a_permuted_pool_gives_the_permuted_choice(name: str, size: int) -> None:
    scores, vectors = pool()
    order = np.random.default_rng(5).permutation(len(vectors))
    straight = select(name, scores, size, vectors).positions
    turned = select(name, permuted(scores, order), size, vectors[order]).positions
    assert order[turned].tolist() == straight.tolist()


@every_selector
def test_the_same_call_gives_the_same_choice(name: str) -> None:
    scores, vectors = pool()
    again = [select(name, scores, 12, vectors).positions.tolist() for _ in range(2)]
    assert again[0] == again[1]


@every_selector
@pytest.mark.parametrize("size", [1, 12, 33])
def test_identical_vectors_are_borne(name: str, size: int) -> None:
    scores, vectors = pool()
    require_lawful(select(name, scores, size, np.repeat(vectors[:1], len(vectors), axis=0)), scores, size)


@pytest.mark.parametrize("name", ["facility_location", "facility_location_cosine", "clusters", "clusters_equal"])
def test_among_identical_embeddings_the_score_decides(name: str) -> None:
    scores, vectors = pool()
    chosen = select(name, scores, 12, np.repeat(vectors[:1], len(vectors), axis=0)).positions
    assert set(chosen) == set(np.argsort(np.where(scores.status == SCORED, -scores.score, np.inf))[:12])


@pytest.mark.parametrize("name", ON_VECTORS)
def test_what_has_no_direction_is_taken_last_or_never(name: str) -> None:
    scores, vectors = pool()
    zeros = np.flatnonzero(scores.status == SCORED)[::3]
    vectors[zeros] = 0
    directed = int((scores.status == SCORED).sum()) - len(zeros)
    for size in (directed, directed + 3):
        choice = select(name, scores, size, vectors)
        require_lawful(choice, scores, size)
        chosen = np.isin(zeros, choice.positions)
        if name.startswith("gradient_walk"):
            assert not chosen.any()
        else:
            most = size - directed if name != "repr_filter" else 3 + directed
            assert chosen.sum() <= most


@pytest.mark.parametrize("name", ON_VECTORS)
def test_a_pool_without_any_direction_is_selected_by_score_or_refused(name: str) -> None:
    scores, vectors = pool()
    if name.startswith("gradient_walk"):
        with pytest.raises(GradsiftError, match="every gradient of the pool is zero"):
            select(name, scores, 5, np.zeros_like(vectors))
    else:
        chosen = select(name, scores, 5, np.zeros_like(vectors)).positions
        by_score = np.argsort(np.where(scores.status == SCORED, -scores.score, np.inf))
        assert chosen.tolist() == by_score[:5].tolist()


@pytest.mark.parametrize("name", ON_VECTORS)
@pytest.mark.parametrize(("limit", "value"), [("_MOST_ROWS", 1), ("_MOST_ROWS", 3), ("_BLOCK_BYTES", 500)])
def test_the_block_size_changes_nothing(name: str, limit: str, value: int, monkeypatch: pytest.MonkeyPatch) -> None:
    scores, vectors = pool(count=60)
    vectors[10:20] = vectors[20:30]  # ties as well
    in_one = select(name, scores, 15, vectors).positions.tolist()
    monkeypatch.setattr(products, limit, value)
    assert select(name, scores, 15, vectors).positions.tolist() == in_one


@pytest.mark.parametrize("name", [name for name in ON_VECTORS if not name.startswith("clusters")])
def test_no_more_than_a_block_of_vectors_is_read_at_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither all of N x D nor anything of N x N is read: the largest array has a block's rows."""
    scores, vectors = pool(count=60)
    monkeypatch.setattr(products, "_MOST_ROWS", 8)
    monkeypatch.setattr("gradsift.features.vectors._READ_BYTES", 8 * 4 * vectors.shape[1])
    monkeypatch.setattr("gradsift.selection.facility_location._LARGEST_BATCH", 8)
    monkeypatch.setattr("gradsift.selection.facility_location._FIRST_BATCH", 8)
    watched = vectors.view(Watched)
    select(name, scores, 5, watched)
    assert 1 < max(Watched.taken) <= 8
    Watched.taken.clear()


class Watched(np.ndarray):
    """Vectors that record how many rows are read at once."""

    taken: list[int] = []  # noqa: RUF012

    def __getitem__(self, key: Any) -> Any:
        found = np.asarray(self)[key]
        Watched.taken.append(len(found) if found.ndim > 1 else 1)
        return found


@pytest.mark.parametrize("name", ON_VECTORS)
def test_vectors_of_other_data_are_refused(name: str) -> None:
    scores, vectors = pool()
    with pytest.raises(GradsiftError, match="39 vectors for 40 scores"):
        select(name, scores, 5, vectors[:-1])


def test_products_equal_their_definition_for_any_blocks_and_equal_rows_tie(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    vectors = unit_rows(np.random.default_rng(1).normal(size=(600, 301)))
    vectors[300:] = vectors[:300]
    positions = np.random.default_rng(2).permutation(600)
    found = products.products(Features(vectors), positions, vectors[:4])
    np.testing.assert_allclose(found, vectors[positions].astype(float) @ vectors[:4].T.astype(float), atol=1e-9)
    back = found[np.argsort(positions)]
    assert (back[:300] == back[300:]).all()
    for rows in (1, 7):
        monkeypatch.setattr(products, "_MOST_ROWS", rows)
        assert (products.products(Features(vectors), positions, vectors[:4]) == found).all()
    assert (np.round(found, 9) == found).all()


@pytest.mark.parametrize("choice", sorted(path.stem for path in (conf_folder() / "selector").glob("*.yaml")))
def test_every_selectors_yaml_gives_its_function_all_that_it_takes(choice: str) -> None:
    """The function is found, its constants have values, and it runs on the sources that it names."""
    assert choice in SELECTORS  # so that the laws hold for it
    register_schemas()
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        config = load_config(
            compose("config", overrides=[f"selector={choice}", "scorer=less", "target_set=verifiable"])
        )
    scores, vectors = pool()
    values = {name: Features(vectors) for name in ("embeddings", "gradients")}
    values |= {name: Features(vectors[:3], ("a", "a", "b")) for name in ("target_embeddings", "target_gradients")}
    sources = {name: Source(list, lambda value=value: value) for name, value in values.items()}  # type: ignore[misc]
    sources["task"] = Source(list, lambda: unseen)
    sources["examples"] = Source(list, lambda: examples_of(scores))
    selector = method("selector", config.selector, tuple(sources))
    require_lawful(selector(scores, 4, sources=sources), scores, 4)
