"""Laws of gradient features: equal to LESS's formula example by example, whatever blocks, order or interruptions."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import made_once
from exactness import assert_close_by_norm
from safetensors.torch import load_file
from test_config import composed
from test_per_sample import assert_rows_close, loop_gradients

from gradsift.artifacts import Store
from gradsift.config import WarmupConfig
from gradsift.errors import GradsiftError
from gradsift.features import gradients as module
from gradsift.features.gradients import checkpoint_weights, draw_rows, gradient_features, require_room, warmup_rows
from gradsift.features.vectors import read_features
from gradsift.gradients.projection import Projection
from gradsift.gradients.statistics import read_norms
from gradsift.line import Line
from gradsift.planning import Planner
from gradsift.proxy.epochs import adapter
from gradsift.runtime import Display, Runtime
from gradsift.scoring.less import less
from gradsift.scoring.scores import NO_RESPONSE
from gradsift.training import lora
from gradsift.training.device import TokenBudget

pytestmark = [pytest.mark.numerics, pytest.mark.usefixtures("one_thread")]
OPTIONS = (
    "experiment=smoke",
    "report=false",
    "tracker=none",
    "data.size=40",
    "proxy.epochs=2",
    "scorer=less",
    "target_set=verifiable",
    "target_set.limit=3",
    "features.dimensions=48",
    "features.warmup.share=0.3",
    "features.warmup.epochs=2",
    "features.warmup.batch_size=4",
    "features.warmup.lora.rank=2",
    "features.warmup.lora.dropout=0.1",
)


def line_of(store: Path, *options: str, kind: type[Store] = Store) -> Line:
    config = composed(*OPTIONS, *options)
    return Line(config, Runtime(kind(store, lambda text: None), config.compute, Display(), seed=0))


@pytest.fixture(scope="session")
def store(backbones: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store that all tests add to."""
    return (
        made_once(tmp_path_factory, "features", lambda folder: shutil.copytree(backbones, folder / "store")) / "store"
    )


@pytest.fixture
def line(store: Path) -> Line:
    return line_of(store)


@pytest.fixture
def fresh(backbones: Path, tmp_path: Path) -> Path:
    """A store that holds only the backbones."""
    shutil.copytree(backbones, tmp_path / "store")
    return tmp_path / "store"


# ----------------------------------------------------------------------------------- LESS by its formula


def plain_gradients(line: Line, checkpoint: Any, examples: Any, adam: bool) -> np.ndarray:
    """Return (N, P) float64 gradients, example by example through peft's layers; Gamma with `adam`."""
    with adapter(line.proxy_backbone, line.config.features.warmup.lora, 5, line.config.compute) as adapted:
        lora.load_adapter(adapted, checkpoint.path)
        g = loop_gradients(adapted.eval(), examples)
        names = list(lora.trainable_parameters(adapted))
    if not adam:
        return g
    state = load_file(checkpoint.file("optimizer.safetensors"))
    exp_avg, exp_avg_sq = (
        torch.cat([state[f"{kind}:{name}"].double().flatten() for name in names]).numpy()
        for kind in ("exp_avg", "exp_avg_sq")
    )
    return (0.9 * exp_avg + 0.1 * g) / np.sqrt(0.999 * exp_avg_sq + 0.001 * g * g + 1e-8)


def projected(line: Line, checkpoint: Any, examples: Any, adam: bool) -> np.ndarray:
    """Return (N, D) float64 projected rows at length 1."""
    gradients = plain_gradients(line, checkpoint, examples, adam)
    signs = Projection(gradients.shape[1], 48, 0)(torch.eye(gradients.shape[1])).sign().double().numpy()
    rows = gradients @ signs
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def exact(store: Path) -> np.ndarray:
    """The pool's features in float64."""
    line = line_of(store)
    weights = checkpoint_weights(line.checkpoints)
    sides = [projected(line, checkpoint, line.proxy_inputs.encoded, adam=True) for checkpoint in line.checkpoints]
    return np.concatenate([side * weight**0.5 for side, weight in zip(sides, weights, strict=True)], axis=1)


def assert_cosines_close(found: np.ndarray, exact: np.ndarray) -> None:
    """Compare cosines to 512 roundings of 1, however small they are."""
    assert np.abs(found - exact).max() <= 512 * np.finfo(np.float32).eps


def mean_rates(steps: int, epochs: int, peak: float) -> list[float]:
    """Return the mean rate of each epoch, for a linear decay after a rise from 0 over 3 % of the steps."""
    total, rising = steps * epochs, int(np.ceil(0.03 * steps * epochs))
    rates = [peak * min(step / rising, (total - step) / (total - rising)) for step in range(total)]
    return [float(np.mean(rates[steps * epoch : steps * (epoch + 1)])) for epoch in range(epochs)]


def test_scores_are_those_of_less_by_its_formula(line: Line, exact: np.ndarray) -> None:
    rates = mean_rates(steps=3, epochs=2, peak=2e-3)  # 12 of 40 rows in batches of 4
    assert [checkpoint.info["learning_rate"] for checkpoint in line.checkpoints] == pytest.approx(rates)
    targets = line._target_inputs()
    cosines = np.zeros((40, 6))
    for rate, checkpoint, block in zip(rates, line.checkpoints, np.split(exact, 2, axis=1), strict=True):
        ours = block / np.linalg.norm(block, axis=1, keepdims=True)
        cosines += rate / sum(rates) * ours @ projected(line, checkpoint, targets.inputs.encoded, adam=False).T
    expected = np.maximum(cosines[:, :3].mean(1), cosines[:, 3:].mean(1))
    assert targets.tasks == ["sort"] * 3 + ["reverse"] * 3
    scores = less(read_features(line.gradients), read_features(line.target_gradients))
    assert_cosines_close(scores.score, expected)
    assert_cosines_close(scores.parts["task:sort"], cosines[:, :3].mean(1))
    assert scores.score.std() > 1e-3


def test_rows_are_unit_blocks_by_the_root_of_their_weights(line: Line) -> None:
    vectors = np.asarray(read_features(line.gradients).vectors)
    weights = checkpoint_weights(line.checkpoints)
    assert vectors.shape == (40, 2 * 48)
    assert weights.sum() == pytest.approx(1)
    assert weights[0] > weights[1] > 0
    for index, weight in enumerate(weights):
        lengths = np.linalg.norm(vectors[:, index * 48 : (index + 1) * 48], axis=1)
        assert_close_by_norm(lengths, np.full(40, weight**0.5), k=16, dim=())


def test_without_projection_and_normalising_rows_are_the_gradients(store: Path) -> None:
    options = ("features.dimensions=null", "features.normalise=false", "features.checkpoints=last")
    line = line_of(store, *options, "features.adam=false")
    exact = plain_gradients(line, line.checkpoints[-1], line.proxy_inputs.encoded, adam=False)
    assert_rows_close(np.asarray(read_features(line.gradients).vectors), exact)


def test_full_gradients_have_a_column_for_every_weight_of_the_model(store: Path) -> None:
    options = ("features.gradient_params=full", "features.adam=false", "features.checkpoints=last")
    line = line_of(store, *options, "target_set.limit=1")
    parameters = line.proxy_backbone.model.num_parameters()
    before = {name: value.clone() for name, value in line.proxy_backbone.model.state_dict().items()}
    assert line.target_gradients.info["parameters"] == parameters
    assert line.target_gradients.info["dimensions"] == 48
    after = line.proxy_backbone.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


# ----------------------------------------------------------------------------- what changes no result


def made(line: Line, fresh: Path, given: Any = None) -> np.ndarray:
    """Compute the pool's features again, in another store."""
    runtime = Runtime(Store(fresh, lambda text: None), line.config.compute, Display(), seed=0)
    load = line._pool_inputs if given is None else lambda: given
    config = line.config
    artifact = gradient_features(
        runtime, config.features, config.proxy, line.checkpoints, line.loaded, load, "pool", adam=True
    )
    assert sorted(artifact.manifest["files"]) == ["features.npy", "ids.json"]
    return np.array(read_features(artifact).vectors)


@pytest.mark.parametrize(("rows", "tokens"), [(1, 4096), (7, 40), (512, 100)])
def test_neither_blocks_nor_the_token_budget_change_features(
    rows: int, tokens: int, line: Line, exact: np.ndarray, fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_MOST_ROWS", rows)
    given = line._pool_inputs()
    given = replace(given, inputs=given.inputs._replace(budget=TokenBudget(tokens)))
    assert_rows_close(made(line, fresh, given), exact)


def test_large_gradients_take_small_blocks(
    line: Line, exact: np.ndarray, fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_BLOCK_BYTES", 7 * 4 * line.gradients.info["parameters"])
    assert module.block_rows(line.gradients.info["parameters"], torch.device("cpu")) == 4
    assert_rows_close(made(line, fresh), exact)


def test_row_order_changes_no_examples_features(line: Line, exact: np.ndarray, fresh: Path) -> None:
    given = line._pool_inputs()
    order = np.random.default_rng(0).permutation(40)
    place = {int(row): index for index, row in enumerate(order)}
    moved = sorted((replace(example, row=place[example.row]) for example in given.inputs.encoded), key=lambda e: e.row)
    shuffled = replace(given, inputs=given.inputs._replace(encoded=moved))
    assert_rows_close(made(line, fresh, shuffled), exact[order])


def test_a_killed_stage_goes_on_after_its_last_whole_block(
    line: Line, fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_MOST_ROWS", 8)  # 5 blocks at each of 2 checkpoints
    expected = made(line, fresh)
    shutil.rmtree(fresh / "features")
    block, starts = module.gradient_block, []

    def dying(*arguments: Any) -> torch.Tensor:
        if len(starts) in (3, 7):
            starts.append(-1)
            raise KeyboardInterrupt
        starts.append(arguments[3])
        return block(*arguments)

    monkeypatch.setattr(module, "gradient_block", dying)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            made(line, fresh)
    found = made(line, fresh)
    assert starts == [0, 8, 16, -1, 24, 32, 0, -1, 8, 16, 24, 32]  # nothing twice
    np.testing.assert_array_equal(found, expected)


def test_an_example_without_a_response_has_a_row_of_zeros_and_no_score(line: Line, fresh: Path) -> None:
    given = line._pool_inputs()
    lacking = [example for example in given.inputs.encoded if example.row not in (4, 39)]
    config, runtime = line.config, Runtime(Store(fresh, lambda text: None), line.config.compute, Display(), seed=0)
    load = lambda: replace(given, inputs=given.inputs._replace(encoded=lacking))  # noqa: E731
    artifact = gradient_features(
        runtime, config.features, config.proxy, line.checkpoints, line.loaded, load, "pool", adam=True
    )
    features = read_features(artifact)
    assert features.silent == (4, 39)
    assert np.flatnonzero(~features.has_direction).tolist() == [4, 39]
    scores = less(features, read_features(line.target_gradients))
    assert scores.status[[4, 39]].tolist() == ["undefined"] * 2
    assert set(scores.reason[[4, 39]]) == {NO_RESPONSE}
    assert np.isfinite(np.delete(scores.score, [4, 39])).all()


# ----------------------------------------------------------------------------------- what is refused


def test_a_full_disk_is_seen_before_the_warm_up(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = line_of(fresh)
    usage = shutil.disk_usage(fresh)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage._replace(free=4 * 40 * 2 * 48 - 1))
    with pytest.raises(GradsiftError, match=r"40 rows x 2 checkpoints x 48 dimensions.* lower features\.dimensions"):
        _ = line.gradients
    assert not list((fresh / "warmup").glob("*/manifest.json"))
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage._replace(free=4 * 40 * 2 * 48))
    require_room(line.runtime, line.config.features, line._pool_inputs(), 2)
    with pytest.raises(GradsiftError, match=r"40 rows x 2 checkpoints x [\d,]{5,} dimensions"):
        _ = line_of(fresh, "features.dimensions=null").gradients
    assert not list((fresh / "warmup").glob("*/manifest.json"))


def test_a_gradient_that_is_not_finite_is_named_by_its_row(line: Line, fresh: Path) -> None:
    _ = line.checkpoints  # the warm-up is trained with the weights as they are
    given = line._pool_inputs()
    broken = given.inputs.backbone.model.transformer.wte.weight
    token = int(given.inputs.encoded[7].input_ids[-2])
    kept = broken[token].clone()
    broken[token] = torch.inf
    try:
        with pytest.raises(GradsiftError, match=r"gradient of row .* is not finite"):
            made(line, fresh)
    finally:
        broken[token] = kept


# ------------------------------------------------------------------------------------------- warm-up


def test_the_seed_determines_rows_and_weights_of_the_warm_up(line: Line, store: Path) -> None:
    config = line.config.features.warmup
    assert len(draw_rows(config, 40, 0)) == len(set(draw_rows(config, 40, 0).tolist())) == 12
    assert draw_rows(config, 40, 0).tolist() != draw_rows(config, 40, 1).tolist()
    other = line_of(store, "features.warmup.seed=1", kind=Planner)  # trains nothing
    assert other.checkpoints[0].fingerprint != line.checkpoints[0].fingerprint
    same = line_of(store, "features.warmup.seed=0")  # the run's own
    assert same.checkpoints[1].fingerprint == line.checkpoints[1].fingerprint


def test_the_number_of_warm_up_rows() -> None:
    assert warmup_rows(WarmupConfig(share=0.05), 1000) == 50
    assert warmup_rows(WarmupConfig(share=0.29), 100) == 29  # .29 * 100 is 28.999999999999996
    assert warmup_rows(WarmupConfig(share=None, rows=5000), 300) == 300
    with pytest.raises(GradsiftError, match=r"features\.warmup\.share=0.05 of 19 rows is less than one row"):
        warmup_rows(WarmupConfig(share=0.05), 19)


def test_the_last_checkpoint_alone_shares_the_warm_up_and_weighs_one(
    line: Line, exact: np.ndarray, store: Path
) -> None:
    last = line_of(store, "features.checkpoints=last")
    assert [c.fingerprint for c in last.checkpoints] == [c.fingerprint for c in line.checkpoints]
    vectors = np.asarray(read_features(last.gradients).vectors)
    assert_rows_close(vectors, exact[:, 48:] / checkpoint_weights(line.checkpoints)[1] ** 0.5)


# ---------------------------------------------------------------------------------------- directions


def test_directions_are_cosines_with_the_mean_gradient_example_by_example(line: Line) -> None:
    from gradsift.proxy.member_tables import DIRECTIONS_FILE, read_cosines

    found = read_cosines(line.directions, 40)
    assert found.shape == (2, 40)
    for chain, shards, cosines, made in zip(line.adapters, line.late_norms, found, line.directions, strict=True):
        with adapter(line.proxy_backbone, line.config.proxy.lora, 3, line.config.compute) as adapted:
            lora.load_adapter(adapted, chain[1].path)
            gradients = loop_gradients(adapted.eval(), line.proxy_inputs.encoded)
        mean = gradients.mean(0)
        lengths = np.linalg.norm(gradients, axis=1)
        assert_cosines_close(cosines, gradients @ mean / lengths / np.linalg.norm(mean))
        norms = read_norms(shards)
        found = np.hypot(norms["norm_A"], norms["norm_B"]).astype(np.float32)
        assert_close_by_norm(found, lengths, k=2048, dim=())
        table = pq.read_table(made.file(DIRECTIONS_FILE))
        assert table.column_names == ["row", "cosine", "norm"]
        assert_close_by_norm(table["norm"].to_numpy().astype(np.float32), lengths, k=2048, dim=())


def test_members_that_share_their_weights_share_their_direction(store: Path) -> None:
    line = line_of(store, "scorer=gsnr_direction", "proxy.ensemble=mc_dropout", "proxy.lora.dropout=0.1")
    assert len({shard.path for shards in line.late_norms for shard in shards}) == 2
    assert line.sources["directions"].value().shape == (1, 40)
