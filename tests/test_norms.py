"""Laws of per-sample gradient norms: they equal a float64 autograd loop over single examples, for any batches."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from exactness import assert_close_by_norm, exact_copy
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from gradsift.config import LoraConfig
from gradsift.data.batching import collate
from gradsift.data.tokens import Encoded
from gradsift.errors import ConfigError, GradsiftError
from gradsift.gradients.per_sample import attached
from gradsift.gradients.probes import NormProbe
from gradsift.training import lora
from gradsift.training.head import ResponseLosses

pytestmark = pytest.mark.numerics

VOCABULARY = 61
LAYERS = {
    "gpt2": ["c_attn", "c_fc", "c_proj", "lm_head"],
    "llama": ["down_proj", "gate_proj", "k_proj", "lm_head", "o_proj", "q_proj", "up_proj", "v_proj"],
}
CASES = [
    (architecture, targets)
    for architecture, names in LAYERS.items()
    for targets in (["all-linear"], names, *([name] for name in names))  # all-linear leaves out the head
]


def tiny_model(architecture: str, tied: bool = True) -> torch.nn.Module:
    torch.manual_seed(0)
    if architecture == "gpt2":
        config = GPT2Config(
            vocab_size=VOCABULARY, n_positions=32, n_embd=16, n_layer=2, n_head=2, tie_word_embeddings=tied
        )
        model = GPT2LMHeadModel(config)
    else:
        config = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=32,
            tie_word_embeddings=tied,
        )
        model = LlamaForCausalLM(config)
    return model.requires_grad_(False).eval()


def adapted_model(
    architecture: str, targets: list[str], tied: bool = True, rank: int = 3, alpha: float = 16.0
) -> torch.nn.Module:
    """Return a model whose B is not zero, as after some training: at B = 0 the gradient of A vanishes."""
    config = LoraConfig(rank=rank, alpha=alpha, targets=targets)
    adapted = lora.add_adapter(tiny_model(architecture, tied), config, seed=1)
    torch.manual_seed(2)
    for name, parameter in lora.trainable_parameters(adapted).items():
        if "lora_B" in name:
            parameter.data.normal_(std=0.3)
    return adapted.eval()


def ragged_examples(count: int = 7, seed: int = 3) -> list[Encoded]:
    rng = np.random.default_rng(seed)
    examples = []
    for row in range(count):
        length = int(rng.integers(3, 14))
        is_response = np.arange(length) >= rng.integers(1, length)
        examples.append(Encoded(row, 10 + row, rng.integers(0, VOCABULARY, length).astype(np.int32), is_response))
    return examples


def loop_norms(adapted: torch.nn.Module, examples: list[Encoded]) -> np.ndarray:
    """Return norms of A and B, and losses, (N, 3) float64: one backward pass per example through peft's own layers."""
    exact = exact_copy(adapted)
    parameters = lora.trainable_parameters(exact)
    norms = []
    for example in examples:
        ids = torch.tensor(example.input_ids, dtype=torch.long)[None]
        logits = exact(input_ids=ids, use_cache=False).logits[0, :-1]
        log_probabilities = torch.log_softmax(logits, -1)[torch.arange(len(logits)), ids[0, 1:]]
        loss = -log_probabilities[torch.tensor(example.is_response[1:])].mean()
        squares = {"A": 0.0, "B": 0.0}
        for name, gradient in zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True):
            squares["A" if "lora_A" in name else "B"] += float(gradient.square().sum())
        norms.append([squares["A"] ** 0.5, squares["B"] ** 0.5, loss.item()])
    return np.array(norms)


def assert_norms_close(computed: np.ndarray, exact: np.ndarray) -> None:
    """Compare each norm and each loss relative to itself.

    Most norms are off by less than 10 roundings. Where a normalisation layer meets an almost constant vector, it
    divides by a small deviation and multiplies their roundings by some hundred. Losses are hardly touched.
    """
    assert (exact > 1e-3).all()  # or the comparison would be of noise
    assert_close_by_norm(computed[:, :2], exact[:, :2], k=2048, dim=())
    assert_close_by_norm(computed[:, 2], exact[:, 2], k=128, dim=())


def batch_norms(
    adapted: torch.nn.Module, examples: list[Encoded], batch_size: int, side: str = "right", mean: bool = False
) -> np.ndarray:
    norms = np.empty((len(examples), 3), np.float32)
    response_losses = ResponseLosses(adapted)
    with attached(adapted, NormProbe()) as probe:
        for start in range(0, len(examples), batch_size):
            part = examples[start : start + batch_size]
            batch = collate(part, 0, padding_side=side)
            losses = response_losses(batch)
            (losses.mean() if mean else losses.sum()).backward()
            norm_a, norm_b = probe.take(len(part) if mean else 1.0)
            norms[[example.row for example in part]] = torch.stack([norm_a, norm_b, losses], 1).detach().numpy()
    return norms


@pytest.mark.parametrize("architecture", LAYERS)
def test_the_laws_are_of_all_linear_layers(architecture: str) -> None:
    assert lora.linear_layer_names(tiny_model(architecture)) == LAYERS[architecture]


@pytest.mark.parametrize(("architecture", "targets"), CASES)
@pytest.mark.parametrize("tied", [True, False])
def test_norms_equal_the_one_example_loop(architecture: str, targets: list[str], tied: bool) -> None:
    adapted, examples = adapted_model(architecture, targets, tied), ragged_examples()
    assert_norms_close(batch_norms(adapted, examples, 7), loop_norms(adapted, examples))


@pytest.mark.parametrize("architecture", LAYERS)
@pytest.mark.parametrize(("rank", "alpha"), [(1, 1.0), (2, 16.0), (8, 8.0), (24, 3.0)])  # 24: wider than the layers
def test_norms_of_any_rank_and_scale_equal_the_loop(architecture: str, rank: int, alpha: float) -> None:
    adapted, examples = adapted_model(architecture, LAYERS[architecture], rank=rank, alpha=alpha), ragged_examples()
    expected = loop_norms(adapted, examples)
    assert_norms_close(batch_norms(adapted, examples, 7), expected)
    for _, layer in lora.lora_layers(adapted):
        layer.scaling["default"] *= 1.5
    assert np.abs(batch_norms(adapted, examples, 7) / expected - 1).max() > 0.1  # the scale is in them


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_batch_size_and_padding_side_change_nothing(architecture: str) -> None:
    adapted, examples = adapted_model(architecture, ["all-linear"]), ragged_examples()
    expected = loop_norms(adapted, examples)
    for batch_size in (1, 2, 3, 7):
        for side in ("right", "left"):
            assert_norms_close(batch_norms(adapted, examples, batch_size, side), expected)


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_row_order_changes_nothing(architecture: str) -> None:
    adapted, examples = adapted_model(architecture, ["all-linear"]), ragged_examples()
    shuffled = [examples[i] for i in np.random.default_rng(5).permutation(len(examples))]
    assert_norms_close(batch_norms(adapted, shuffled, 3), loop_norms(adapted, examples))


def test_the_mean_loss_of_a_training_step_gives_the_same_norms() -> None:
    adapted, examples = adapted_model("gpt2", ["all-linear"]), ragged_examples()
    assert_norms_close(batch_norms(adapted, examples, 3, mean=True), loop_norms(adapted, examples))


def test_a_fresh_adapter_has_no_gradient_of_a() -> None:
    adapted = lora.add_adapter(tiny_model("gpt2"), LoraConfig(rank=3), seed=1).eval()
    norms = batch_norms(adapted, ragged_examples(), 7)
    assert (norms[:, 0] == 0).all()
    assert (norms[:, 1] > 0).all()


def test_probes_leave_with_the_context() -> None:
    adapted, examples = adapted_model("gpt2", ["c_attn"]), ragged_examples(2)
    with attached(adapted, NormProbe()) as probe:
        pass
    ResponseLosses(adapted)(collate(examples, 0)).sum().backward()
    with pytest.raises(GradsiftError, match="no backward pass"):
        probe.take()


def test_a_model_without_adapters_is_refused() -> None:
    with pytest.raises(GradsiftError, match="LoRA adapters"), attached(tiny_model("gpt2"), NormProbe()):
        pass


@pytest.mark.parametrize("targets", [["nowhere"], ["wte"]])
def test_targets_that_are_no_linear_layers_are_refused_with_the_names_there_are(targets: list[str]) -> None:
    with pytest.raises(ConfigError, match="c_attn"):
        lora.add_adapter(tiny_model("gpt2"), LoraConfig(targets=targets), seed=0)


def test_adapters_with_the_same_seed_are_equal_and_others_differ() -> None:
    def first_a(seed: int) -> torch.Tensor:
        adapted = lora.add_adapter(tiny_model("gpt2"), LoraConfig(), seed)
        return next(iter(lora.trainable_parameters(adapted).values())).detach().clone()

    assert torch.equal(first_a(1), first_a(1))
    assert not torch.equal(first_a(1), first_a(2))


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize("tied", [True, False])
def test_an_adapters_file_holds_the_adapter_alone(tied: bool, tmp_path: Path) -> None:
    adapted = adapted_model("gpt2", LAYERS["gpt2"], tied)
    lora.save_adapter(adapted, tmp_path)
    kept = load_file(tmp_path / lora.ADAPTER_FILE)
    assert kept and all(".lora_A." in name or ".lora_B." in name for name in kept)  # no whole head, say
    other = adapted_model("gpt2", LAYERS["gpt2"], tied)
    for parameter in lora.trainable_parameters(other).values():
        parameter.data.normal_()
    lora.load_adapter(other, tmp_path)
    ids = torch.arange(9)[None]
    assert torch.equal(other(input_ids=ids).logits, adapted(input_ids=ids).logits)


def test_a_removed_adapter_leaves_the_backbone_as_it_was() -> None:
    model = tiny_model("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    adapted = lora.add_adapter(model, LoraConfig(), seed=0)
    after = adapted.unload().state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
