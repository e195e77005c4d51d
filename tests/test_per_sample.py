"""Laws of per-sample gradients: they equal an autograd loop, Adam's formula and a dense projection."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from exactness import assert_close_by_norm, exact_copy
from test_norms import adapted_model, batch_norms, loop_norms, ragged_examples, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gradsift.config import LoraConfig
from gradsift.data.batching import collate
from gradsift.data.tokens import Encoded
from gradsift.errors import ConfigError, GradsiftError
from gradsift.features.gradients import AdamState
from gradsift.gradients import per_sample
from gradsift.gradients import projection as projections
from gradsift.gradients.per_sample import gradient_pass
from gradsift.gradients.projection import Projection
from gradsift.training import lora

pytestmark = [pytest.mark.numerics, pytest.mark.usefixtures("one_thread")]


def example_loss(model: torch.nn.Module, example: Encoded) -> torch.Tensor:
    """Return the mean negative log-likelihood of the response tokens, by definition."""
    ids = torch.tensor(example.input_ids, dtype=torch.long)[None]
    log_probabilities = torch.log_softmax(model(input_ids=ids).logits[0, :-1], -1)
    chosen = log_probabilities[torch.arange(ids.shape[1] - 1), ids[0, 1:]]
    return -chosen[torch.tensor(example.is_response[1:])].mean()


def loop_gradients(model: torch.nn.Module, examples: list[Encoded]) -> np.ndarray:
    """Return gradients (B, P) float64, by one backward pass per example, in the order of the trainable parameters."""
    exact = exact_copy(model)
    parameters = list(lora.trainable_parameters(exact).values())
    rows = [torch.autograd.grad(example_loss(exact, example), parameters) for example in examples]
    return torch.stack([torch.cat([gradient.flatten() for gradient in row]) for row in rows]).numpy()


def batched(adapted: torch.nn.Module, examples: list[Encoded], size: int, side: str = "right") -> np.ndarray:
    padded = mock.patch.object(per_sample, "collate", partial(collate, padding_side=side))
    with padded, gradient_pass(adapted, "lora", 0) as gradients:
        return np.concatenate([gradients(examples[i : i + size]).numpy() for i in range(0, len(examples), size)])


def assert_rows_close(computed: np.ndarray, exact: np.ndarray, k: float = 2048) -> None:
    """Compare rows relative to their length, to as many roundings as `assert_norms_close` allows."""
    assert computed.dtype == np.float32
    assert_close_by_norm(computed, exact, k, dim=-1)


# --------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("size", [1, 3, 7])
def test_gradients_equal_the_one_example_loop(architecture: str, side: str, size: int) -> None:
    adapted, examples = adapted_model(architecture, ["all-linear"]), ragged_examples()
    expected = loop_gradients(adapted, examples)
    assert (np.linalg.norm(expected, axis=1) > 1e-2).all()
    assert_rows_close(batched(adapted, examples, size, side), expected)


@pytest.mark.parametrize(("architecture", "targets"), [("gpt2", ["c_fc"]), ("llama", ["q_proj", "down_proj"])])
def test_their_lengths_are_the_norms_of_the_engine(architecture: str, targets: list[str]) -> None:
    adapted, examples = adapted_model(architecture, targets), ragged_examples()
    exact = np.linalg.norm(loop_norms(adapted, examples)[:, :2], axis=1)
    for computed in (batched(adapted, examples, 7), batch_norms(adapted, examples, 7)[:, :2]):
        assert_close_by_norm(np.linalg.norm(computed, axis=1), exact, k=2048, dim=())


def test_dropout_is_off_and_nothing_is_left_behind() -> None:
    adapted = lora.add_adapter(tiny_model("gpt2"), LoraConfig(rank=3, dropout=0.5), seed=1)
    examples = ragged_examples(4)
    np.testing.assert_array_equal(batched(adapted, examples, 4), batched(adapted, examples, 4))
    assert all(parameter.grad is None for parameter in adapted.parameters())
    assert all(layer.probe is None and layer.lora_dropout.training for _, layer in lora.lora_layers(adapted))


def test_a_batch_is_split_where_its_gradients_would_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    adapted, examples = adapted_model("gpt2", ["c_attn"]), ragged_examples()
    expected = loop_gradients(adapted, examples)
    monkeypatch.setattr(per_sample, "_BATCH_BYTES", 2 * 4 * expected.shape[1])
    assert_rows_close(batched(adapted, examples, 7), expected)


@pytest.mark.parametrize(("architecture", "tied"), [("gpt2", True), ("llama", False)])
def test_full_gradients_are_those_of_the_merged_models_weights(architecture: str, tied: bool) -> None:
    adapted, examples = adapted_model(architecture, ["all-linear"], tied), ragged_examples(3)
    before = [parameter.detach().clone() for parameter in adapted.parameters()]
    with gradient_pass(adapted, "full", 0) as gradients:
        computed = gradients(examples).numpy()
    assert all(torch.equal(old, new) for old, new in zip(before, adapted.parameters(), strict=True))
    merged = adapted.merge_and_unload().requires_grad_(True)
    assert gradients.size == computed.shape[1] == merged.num_parameters()
    assert_rows_close(computed, loop_gradients(merged, examples))


def test_a_weight_that_no_loss_depends_on_has_a_gradient_of_zero() -> None:
    adapted, examples = adapted_model("gpt2", ["all-linear"]), ragged_examples(2)
    adapted.get_base_model().register_parameter("spare", torch.nn.Parameter(torch.ones(5)))
    with gradient_pass(adapted, "full", 0) as gradients:
        computed = gradients(examples).numpy()
    assert gradients.size == computed.shape[1]
    assert not computed[:, :5].any()  # the model's own parameter comes before those of its layers


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_an_adapter_of_a_tied_head_is_not_merged_into_the_embedding(architecture: str) -> None:
    examples = ragged_examples(2)
    with (
        pytest.raises(ConfigError, match=r"another module uses too \(.*lm_head\)"),
        gradient_pass(adapted_model(architecture, ["lm_head"], tied=True), "full", 0),
    ):
        pass
    adapted = adapted_model(architecture, ["lm_head"], tied=False)
    with gradient_pass(adapted, "full", 0) as gradients:
        computed = gradients(examples).numpy()
    assert_rows_close(computed, loop_gradients(adapted.merge_and_unload().requires_grad_(True), examples))


def test_a_model_without_adapters_has_no_lora_gradients() -> None:
    with pytest.raises(GradsiftError, match="LoRA adapters"), gradient_pass(tiny_model("gpt2"), "lora", 0):
        pass


# -------------------------------------------------------------------------------------------- Adam


def trained_state(adapted: torch.nn.Module, path: Path) -> None:
    """Take two steps of AdamW and write its state as a checkpoint does."""
    parameters = lora.trainable_parameters(adapted)
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-2)
    for example in ragged_examples(2, seed=9):
        optimizer.zero_grad()
        example_loss(adapted, example).backward()
        optimizer.step()
    lora.save_optimizer(optimizer, parameters, path)
    adapted.zero_grad()


def test_adams_adjustment_is_the_formula_parameter_by_parameter(tmp_path: Path) -> None:
    adapted, examples = adapted_model("llama", ["all-linear"]), ragged_examples(4)
    trained_state(adapted, tmp_path / "state.safetensors")
    from safetensors.torch import load_file

    state = load_file(tmp_path / "state.safetensors")
    exp_avg, exp_avg_sq = (
        torch.cat([state[f"{kind}:{name}"].double().flatten() for name in lora.trainable_parameters(adapted)]).numpy()
        for kind in ("exp_avg", "exp_avg_sq")
    )
    exact = loop_gradients(adapted, examples)
    m, v = 0.9 * exp_avg + 0.1 * exact, 0.999 * exp_avg_sq + 0.001 * exact**2
    adam = AdamState.read(tmp_path / "state.safetensors", lora.trainable_parameters(adapted), torch.device("cpu"))
    adjusted = adam.adjust(torch.from_numpy(batched(adapted, examples, 4)))
    assert_rows_close(adjusted.numpy(), m / np.sqrt(v + 1e-8))


def test_adam_gives_nothing_to_an_example_without_a_gradient() -> None:
    adam = AdamState(torch.ones(3), torch.ones(3))
    adjusted = adam.adjust(torch.tensor([[0.0, 0.0, 0.0], [0.0, 1.0, 0.0]]))
    assert adjusted[0].tolist() == [0, 0, 0]
    assert (adjusted[1] != 0).all()  # the moments of the others are there


def test_a_state_of_other_parameters_is_refused(tmp_path: Path) -> None:
    trained_state(adapted_model("gpt2", ["c_fc"]), tmp_path / "state.safetensors")
    parameters = lora.trainable_parameters(adapted_model("gpt2", ["c_attn"]))
    with pytest.raises(GradsiftError, match=r"no Adam moments of .*c_attn"):
        AdamState.read(tmp_path / "state.safetensors", parameters, torch.device("cpu"))


# -------------------------------------------------------------------------------------- projection


def matrix_of(projection: Projection) -> torch.Tensor:
    """Return the projection as a matrix (P, D) float64, drawn place by place."""
    width = projection.dimensions
    places, signs = projection.drawn(0, -(-projection.size // width), torch.device("cpu"))
    matrix = torch.zeros(places.numel(), width, dtype=torch.float64)
    for chunk, row in enumerate(places.tolist()):
        for dimension, place in enumerate(row):
            matrix[place, dimension] = signs[chunk, dimension]
    return matrix[: projection.size]


@pytest.mark.parametrize(("size", "dimensions"), [(5, 3), (1024, 64), (2500, 100), (50, 64)])
def test_the_projection_is_a_matrix_with_one_sign_per_parameter(size: int, dimensions: int) -> None:
    projection = Projection(size, dimensions, seed=3)
    matrix = matrix_of(projection)
    assert torch.equal(matrix.abs().sum(1), torch.ones(size, dtype=torch.float64))
    assert set(matrix.unique().tolist()) <= {-1.0, 0.0, 1.0}
    rows = torch.randn(4, size, generator=torch.Generator().manual_seed(0))
    assert_close_by_norm(projection(rows), rows.double() @ matrix, k=64, dim=-1)


def test_another_seed_is_another_matrix_and_a_prefix_of_parameters_the_same() -> None:
    ones = torch.eye(1500)
    assert torch.equal(Projection(1500, 64, 1)(ones), Projection(1500, 64, 1)(ones))
    assert not torch.equal(Projection(1500, 64, 1)(ones), Projection(1500, 64, 2)(ones))
    assert torch.equal(Projection(1200, 64, 1)(torch.eye(1200)), Projection(1500, 64, 1)(ones)[:1200])


def test_the_matrix_is_the_one_that_stored_features_were_made_with() -> None:
    """By plain integers; if these values change, the VERSION of the features stage has to be raised."""

    def mixed(number: int) -> int:
        x = (number + 0x9E3779B97F4A7C15) % 2**64
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
        return x ^ x >> 31

    def odd(number: int) -> int:
        return (mixed(number) % 2**32 - 2**31) % 2**32 | 1

    def sign(chunk_seed: int, dimension: int) -> float:
        x = odd(chunk_seed) * odd(dimension) % 2**32
        x = (x ^ x >> 15) * 0x7FEB352D % 2**32
        return 1.0 if x < 2**31 else -1.0

    projection, width = Projection(1024, 70, seed=5), 70
    places, signs = projection.drawn(3, 2, torch.device("cpu"))
    for chunk in (0, 1):
        seed = mixed(mixed(5) + 3 + chunk)
        shift = mixed(seed) % 2**31 % width
        for dimension in (0, 7, 69):
            assert places[chunk, dimension] == chunk * width + (dimension - shift) % width
            assert signs[chunk, dimension] == sign(seed, dimension)


def test_how_many_rows_are_projected_at_once_changes_nothing() -> None:
    projection = Projection(3000, 128, seed=0)
    rows = torch.randn(9, 3000)
    exact = rows.double() @ matrix_of(projection)
    for at_once in (1, 2, 9):
        assert_close_by_norm(torch.cat([projection(part) for part in rows.split(at_once)]), exact, k=64, dim=-1)


class Traffic(TorchDispatchMode):
    """Counts the bytes that operations read and write, each once; views move none."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            tensors = [each for each in tree_leaves((args, kwargs, result)) if isinstance(each, torch.Tensor)]
            self.bytes += sum(each.nbytes for each in tensors)
        return result


@pytest.mark.parametrize(("rate", "bandwidth"), [(312e12, 2.0e12), (990e12, 3.35e12)], ids=["A100", "H100"])
def test_a_projection_moves_so_few_bytes_that_it_takes_a_tenth_of_a_backward_pass_at_most(
    rate: float, bandwidth: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At 7B, rank 128 and 8,192 dimensions: bytes counted here at a smaller size, and the cards' published figures."""
    rows, dimensions = 32, 8192
    size = dimensions * 16
    gradients = torch.randn(rows, size)
    monkeypatch.setattr(projections, "numbers_at_once", lambda device, on_cpu: rows * size)  # a GPU takes more
    with Traffic() as traffic:
        Projection(size, dimensions, seed=0)(gradients)
    a_number = traffic.bytes / (rows * size)  # of a row, drawing included
    numbers = 32 * 4 * 2 * 4096 * 128  # A and B on q, k, v and o of 32 layers
    products = 2 * 6.6e9 * 512  # backward to the inputs of the frozen layers, for 512 tokens
    assert a_number * numbers / bandwidth < 0.1 * products / (rate / 2)


def test_inner_products_survive_within_the_bound() -> None:
    """200 pairs of all cosines: errors have the stated deviation, none exceeds five of them, and there is no bias."""
    size, dimensions, pairs = 4000, 512, 200
    rng = np.random.default_rng(0)
    x = rng.standard_normal((pairs, size))
    y = np.linspace(-3, 3, pairs)[:, None] * x + rng.standard_normal((pairs, size))
    projection = Projection(size, dimensions, seed=1)
    px, py = (projection(torch.from_numpy(rows.astype(np.float32))).double().numpy() for rows in (x, y))
    exact = (x * y).sum(1)
    deviation = np.sqrt((np.square(x).sum(1) * np.square(y).sum(1) + exact**2) / dimensions)
    errors = ((px * py).sum(1) - exact) / deviation
    assert np.abs(errors).max() < 5
    assert 0.8 < np.sqrt(np.mean(errors**2)) < 1.2
    assert abs(errors.mean()) < 0.35  # five standard errors


def test_inner_products_of_unlike_vectors_survive_over_all_seeds() -> None:
    """Vectors with a few large entries at equal distances, a multiple of D, and their shifted copies."""
    size, dimensions, seeds = 640, 32, 400
    sparse = np.zeros((2, size), dtype=np.float32)
    sparse[:, ::dimensions] = 1.0
    sparse[1, 5::dimensions] = 2.0
    exact = float(sparse[0] @ sparse[1])
    products = [
        float(np.prod(Projection(size, dimensions, seed)(torch.from_numpy(sparse)).numpy(), axis=0).sum())
        for seed in range(seeds)
    ]
    norms = float(np.square(sparse[0]).sum() * np.square(sparse[1]).sum())
    deviation = ((norms + exact**2) / dimensions) ** 0.5
    errors = (np.array(products) - exact) / deviation
    assert abs(errors.mean()) < 5 / seeds**0.5
    assert 0.5 < np.sqrt(np.mean(errors**2)) < 1.2
