"""Laws of per-sample gradients: they equal an autograd loop, Adam's formula and a dense projection."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from exactness import assert_close_by_norm, exact_copy
from test_norms import adapted_model, batch_norms, loop_norms, ragged_examples, tiny_model

from gradsift.config import LoraConfig
from gradsift.data.tokens import Encoded
from gradsift.errors import ConfigError, GradsiftError
from gradsift.gradients import per_sample
from gradsift.gradients.adam import AdamState
from gradsift.gradients.per_sample import gradient_pass
from gradsift.gradients.projection import Projection, on_cpu, on_device
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
    with gradient_pass(adapted, "lora", 0, side) as gradients:
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
        pytest.raises(ConfigError, match="its input embedding too"),
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


def whole(projection: Projection, tile: int) -> torch.Tensor:
    """Return a tile's signs in one strip, (S, D)."""
    ((_, signs),) = projection.signs(tile, torch.device("cpu"), projection.dimensions)
    return signs


@pytest.mark.parametrize(("size", "dimensions"), [(5, 3), (1024, 64), (2500, 100)])
def test_the_projection_is_an_explicit_matrix_of_signs(size: int, dimensions: int) -> None:
    projection = Projection(size, dimensions, seed=3)
    rows = torch.randn(4, size, generator=torch.Generator().manual_seed(0))
    matrix = (projection(torch.eye(size)) * dimensions**0.5).double()
    assert_close_by_norm(matrix.abs().float(), torch.ones(size, dimensions, dtype=torch.float64), k=4, dim=())
    assert_close_by_norm(projection(rows), rows.double() @ matrix.sign() / dimensions**0.5, k=64, dim=-1)
    assert abs(float(matrix.mean())) < 5 / (size * dimensions) ** 0.5  # as many of each sign
    assert len({tuple(column) for column in matrix.t().tolist()}) == dimensions or size < 10


def test_another_seed_is_another_matrix_and_a_prefix_of_parameters_the_same() -> None:
    ones = torch.eye(1500)
    assert torch.equal(Projection(1500, 64, 1)(ones), Projection(1500, 64, 1)(ones))
    assert not torch.equal(Projection(1500, 64, 1)(ones), Projection(1500, 64, 2)(ones))
    assert torch.equal(Projection(1200, 64, 1)(torch.eye(1200)), Projection(1500, 64, 1)(ones)[:1200])
    tiles = Projection(1500, 64, 1)
    assert not torch.equal(whole(tiles, 0), whole(tiles, 1))


def test_a_gpu_spells_out_the_same_signs_from_their_bits() -> None:
    drawn = np.random.default_rng(0).integers(0, 256, 5000, dtype=np.uint8)
    by_bits = np.unpackbits(drawn).reshape(-1, 8) * 2.0 - 1
    for signs in (on_cpu(drawn), on_device(drawn, torch.device("cpu"))):
        assert signs.dtype == torch.float32
        assert np.array_equal(signs.numpy(), by_bits)


def test_the_matrix_is_the_one_that_stored_features_were_made_with() -> None:
    """If these values change, the VERSION of the features stage has to be raised."""
    signs = whole(Projection(1024, 70, seed=5), 3)
    words = np.random.PCG64([5, 3]).random_raw(2 * 1024).reshape(1024, 2)
    for row, column in ((0, 0), (0, 69), (1, 7), (1023, 64)):
        word = int(words[row, column // 64]).to_bytes(8, "little")
        bit = word[column % 64 // 8] >> (7 - column % 8) & 1
        assert signs[row, column] == 2 * bit - 1


@pytest.mark.parametrize("dimensions", [511, 512, 520, 1100])
def test_strips_are_the_tile_side_by_side_and_change_no_projection(dimensions: int) -> None:
    projection = Projection(1300, dimensions, seed=4)
    starts, strips = zip(*projection.signs(1, torch.device("cpu"), 512), strict=True)
    assert list(starts) == list(range(0, dimensions, 512))
    assert torch.equal(torch.cat(strips, 1), whole(projection, 1))
    rows = torch.randn(3, 1300, generator=torch.Generator().manual_seed(0))
    signs = torch.cat([whole(projection, 0), whole(projection, 1)[:276]]).double()
    assert_close_by_norm(projection(rows), rows.double() @ signs / dimensions**0.5, k=64, dim=-1)


def test_how_many_rows_are_projected_at_once_changes_nothing() -> None:
    projection = Projection(3000, 128, seed=0)
    rows = torch.randn(9, 3000)
    signs = torch.cat([whole(projection, tile) for tile in range(3)])[:3000].double()
    exact = rows.double() @ signs / 128**0.5
    for at_once in (1, 2, 9):
        assert_close_by_norm(torch.cat([projection(part) for part in rows.split(at_once)]), exact, k=64, dim=-1)


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
