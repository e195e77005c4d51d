"""Fused bfloat16 models against the same ones unfused and against float32: losses, norms, generation, gradients."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from test_norms import batch_norms
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from gradsift.config import ComputeConfig, LoraConfig
from gradsift.data.batching import collate
from gradsift.data.tokens import Encoded
from gradsift.gradients.per_sample import gradient_pass
from gradsift.training import fused, lora
from gradsift.training.backbones import _same_but_faster
from gradsift.training.finetuning import ResponseLosses
from gradsift.training.frozen import PackedConv1D, PackedLinear
from gradsift.training.fused import fuse, is_fused
from gradsift.training.head import OutputHead
from gradsift.training.kernels import are_there
from gradsift.training.residual import residual_in_float32

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not are_there(), reason="kernels.cpp cannot be compiled here"),
    pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="no bfloat16 on this processor"),
]

VOCABULARY = 301  # not a multiple of 16
WIDTH = 256
LLAMA_LIKE: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {"num_attention_heads": 8, "num_key_value_heads": 2}),
    "mistral": (
        MistralConfig,
        MistralForCausalLM,
        {"num_attention_heads": 4, "num_key_value_heads": 4, "sliding_window": 6},
    ),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {"num_attention_heads": 4, "num_key_value_heads": 2}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"num_attention_heads": 4, "num_key_value_heads": 1}),
}
KNOWN = ["gpt2", *LLAMA_LIKE]


def exact_model(architecture: str, width: int = WIDTH, **options: Any) -> Any:
    """Two blocks, in float32, of numbers that bfloat16 has; its biases are not zero."""
    torch.manual_seed(0)
    if architecture == "gpt2":
        shape = {"n_positions": 64, "n_embd": width, "n_layer": 2, "n_head": 4}
        settings = {"vocab_size": VOCABULARY, "activation_function": "gelu_pytorch_tanh", **shape, **options}
        model: Any = GPT2LMHeadModel(GPT2Config(**settings))
    else:
        config, kind, heads = LLAMA_LIKE[architecture]
        shape = {"hidden_size": width, "intermediate_size": 3 * width // 2, "num_hidden_layers": 2}
        shape |= {"head_dim": width // heads["num_attention_heads"], "max_position_embeddings": 64}
        model = kind(config(vocab_size=VOCABULARY, **shape, **heads, **options))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    return model.to(torch.bfloat16).float().requires_grad_(False).eval()


def in_bfloat16(model: Any) -> Any:
    """A copy; buffers, such as the frequencies of rotary positions, stay."""
    half = copy.deepcopy(model, {id(p): nn.Parameter(p.bfloat16(), requires_grad=False) for p in model.parameters()})
    assert residual_in_float32(half)
    half.set_attn_implementation("eager")
    return half


def models(architecture: str, **options: Any) -> tuple[Any, Any, Any]:
    """The same one in float32, in bfloat16, and there fused."""
    exact = exact_model(architecture, **options)
    quick = in_bfloat16(exact)
    assert fuse(quick)
    return exact, in_bfloat16(exact), quick


def adapted(model: Any, targets: list[str], scale: float = 0.02) -> Any:
    """With B away from zero, where the gradient of A vanishes."""
    found = lora.add_adapter(model, LoraConfig(rank=4, targets=targets), seed=1)
    torch.manual_seed(2)
    for name, parameter in lora.trainable_parameters(found).items():
        if "lora_B" in name:
            parameter.data.normal_(std=scale)
    return found.eval()


def examples() -> list[Encoded]:
    """Rows of 2 to 50 tokens."""
    draws = np.random.default_rng(3)
    sizes = enumerate((2, 5, 16, 17, 33, 50))
    return [
        Encoded(row, draws.integers(0, VOCABULARY, size).astype(np.int32), np.arange(size) > size // 3)
        for row, size in sizes
    ]


def losses_and_norms(model: Any, side: str = "right") -> tuple[torch.Tensor, np.ndarray]:
    with torch.no_grad():
        losses = ResponseLosses(model)(collate(examples(), 0, side)).float()
    return losses, batch_norms(model, examples(), 6, side)


def logits(model: Any, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, **options).logits.float()


def ids_of(examples: int, tokens: int) -> torch.Tensor:
    return torch.randint(VOCABULARY, (examples, tokens), generator=torch.Generator().manual_seed(4))


def error(found: Any, expected: Any) -> float:
    found, expected = torch.as_tensor(found).double(), torch.as_tensor(expected).double()
    return float((found - expected).norm() / expected.norm())


CASES = [(targets, "right") for targets in ("attention", "gate", "down", "all")] + [("all", "left")]


@pytest.mark.parametrize("architecture", KNOWN)
@pytest.mark.parametrize(("targets", "side"), CASES)
def test_losses_and_norms_are_as_near_to_float32s_as_without(architecture: str, targets: str, side: str) -> None:
    gpt2 = architecture == "gpt2"
    named = {
        "attention": ["c_attn"] if gpt2 else ["q_proj", "v_proj"],
        "gate": ["c_fc"] if gpt2 else ["gate_proj"],
        "down": ["mlp.c_proj"] if gpt2 else ["down_proj"],
        "all": ["all-linear"],
    }[targets]
    exact, plain, quick = (losses_and_norms(adapted(model, named), side) for model in models(architecture))
    for expected, without, found in zip(exact, plain, quick, strict=True):
        assert error(found, expected) < 2e-3
        assert error(found, expected) < 1.5 * error(without, expected) + 1e-4


@pytest.mark.parametrize("architecture", KNOWN)
def test_all_that_lies_between_the_products_is_fused(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, plain, quick = models(architecture)
    assert is_fused(quick)
    assert not is_fused(plain)
    kinds = {type(module) for module in quick.modules()} - {type(module) for module in plain.modules()}
    linear = PackedConv1D if architecture == "gpt2" else PackedLinear
    assert linear in kinds
    assert {bool(kind.__name__.startswith("Fused")) for kind in kinds - {linear}} == {True}
    turns_within = architecture in ("llama", "mistral", "qwen2")  # rotary positions, in attention
    assert len(kinds) == 3 + turns_within  # the linear layers, the norms, the MLPs
    assert type(quick.get_output_embeddings()) is nn.Linear
    head = OutputHead.of(quick)
    assert head is not None
    assert head.packed is not None
    assert OutputHead.of(copy.copy(quick)).packed is head.packed  # type: ignore[union-attr]
    calls = []
    monkeypatch.setattr(fused, "sdpa_attention_forward", lambda *args, **kwargs: calls.append(args))
    window = architecture == "mistral"
    quick(input_ids=ids_of(2, 5 if window else 40), use_cache=False)
    assert not calls


@pytest.mark.parametrize("architecture", KNOWN)
@pytest.mark.parametrize(("rows", "tokens"), [(1, 1), (1, 50), (3, 33)])
def test_logits_of_any_shape(architecture: str, rows: int, tokens: int) -> None:
    exact, plain, quick = models(architecture)
    ids = ids_of(rows, tokens)
    expected = logits(exact, ids)
    assert error(logits(quick, ids), expected) < 1.2 * error(logits(plain, ids), expected) + 1e-4
    with torch.inference_mode():
        assert torch.equal(quick(input_ids=ids).logits.float(), logits(quick, ids))


def token_by_token(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Logits of the places from 12 on, each from a cache of what is before it."""
    found, cache = [], None
    for end in range(12, ids.shape[1]):
        options = {"attention_mask": mask[:, :end], "past_key_values": cache, "use_cache": True}
        with torch.no_grad():
            output = model(input_ids=ids[:, 0 if cache is None else end - 1 : end], **options)
        cache = output.past_key_values
        found.append(output.logits[:, -1].float())
    return torch.stack(found, 1)


@pytest.mark.parametrize("architecture", KNOWN)
@pytest.mark.parametrize("padded", [True, False])
def test_a_cache_and_padding_on_the_left(architecture: str, padded: bool) -> None:
    exact, plain, quick = models(architecture)
    ids, mask = ids_of(3, 20), torch.ones(3, 20, dtype=torch.int64)
    if padded:
        mask[0, :7] = mask[1, :1] = 0
    expected, without, found = (token_by_token(model, ids, mask) for model in (exact, plain, quick))
    assert error(found, expected) < 1.5 * error(without, expected) + 1e-3
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    text = quick.generate(ids, attention_mask=mask, **options)
    assert text.shape == (3, 26)
    best = logits(exact, text, attention_mask=torch.cat([mask, mask[:, :6] | 1], 1))[:, 19:25]
    chosen = best.gather(2, text[:, 20:, None])[..., 0]
    assert (best.amax(2) - chosen).max() < 0.05  # greedy, but for ties


@pytest.mark.parametrize("architecture", KNOWN)
def test_packed_rows_do_not_see_each_other(architecture: str) -> None:
    exact, _, quick = models(architecture)
    ids, places = ids_of(1, 20), torch.cat([torch.arange(11), torch.arange(9)])[None]
    expected = logits(exact, ids, position_ids=places, use_cache=False)
    assert error(logits(quick, ids, position_ids=places, use_cache=False), expected) < 0.01
    assert error(logits(quick, ids[:, 11:]), expected[:, 11:]) < 0.01


# ------------------------------------------------------------------------- adapters and weights that train


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "qwen2"])
def test_an_adapter_comes_and_goes_and_leaves_no_trace(architecture: str) -> None:
    _, _, quick = models(architecture)
    ids = ids_of(2, 9)
    before = logits(quick, ids)
    for _ in range(2):
        found = adapted(quick, ["all-linear"])
        assert not torch.equal(logits(found, ids), before)
        with found.disable_adapter():
            assert error(logits(found, ids), before) < 0.01  # an adapted MLP is not fused
        quick = lora.remove_adapter(found)
        assert torch.equal(logits(quick, ids), before)


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "qwen2"])
def test_a_merged_adapter_is_in_the_weights_that_are_used(architecture: str) -> None:
    _, plain, quick = models(architecture)
    ids = ids_of(2, 9)
    without = logits(plain, ids)
    found, expected = adapted(quick, ["all-linear"], 0.2), adapted(plain, ["all-linear"], 0.2)
    before = logits(found, ids)
    assert error(without, before) > 0.1  # or nothing below would say much
    copied = copy.deepcopy(found).merge_and_unload()
    assert error(logits(copied, ids), logits(copy.deepcopy(expected).merge_and_unload(), ids)) < 0.03
    assert error(logits(copied, ids), before) < 0.03
    assert torch.equal(logits(found, ids), before)  # the copy's weights are its own
    found.merge_adapter()
    assert error(logits(found, ids), before) < 0.03
    found.unmerge_adapter()
    assert error(logits(found, ids), before) < 0.03
    assert error(logits(found.unload(), ids), without) < 0.03


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "qwen2"])
def test_gradients_of_all_weights(architecture: str) -> None:
    found = []
    ids = ids_of(1, 9)
    for model in models(architecture):
        each = adapted(model, ["all-linear"])
        before = logits(each, ids)
        with gradient_pass(each, "full", 0) as gradients:
            found.append(gradients(examples()[:3]))
        assert torch.equal(logits(each, ids), before)
    exact, plain, quick = found
    assert exact.shape == quick.shape
    assert (exact.norm(dim=1) > 0).all()
    assert error(quick, exact) < 1.2 * error(plain, exact) + 1e-3


@pytest.mark.parametrize("architecture", ["gpt2", "qwen2"])
def test_a_bias_that_trains_alone_has_a_gradient(architecture: str) -> None:
    _, plain, quick = models(architecture)
    gradients = []
    for model in (plain, quick):
        names = ("c_fc.bias", "ln_1.bias", "k_proj.bias")
        biases = [p.requires_grad_() for name, p in model.named_parameters() if name.endswith(names)]
        parts = torch.autograd.grad(model(input_ids=ids_of(2, 9)).logits.float().logsumexp(2).sum(), biases)
        gradients.append(torch.cat([part.flatten().float() for part in parts]))
    assert error(gradients[1], gradients[0]) < 0.02


@pytest.mark.parametrize("architecture", KNOWN)
def test_the_gradient_of_the_inputs(architecture: str) -> None:
    gradients = []
    for model in models(architecture):
        inputs = model.get_input_embeddings()(ids_of(2, 21)).detach().requires_grad_()
        hidden = model.base_model(inputs_embeds=inputs, use_cache=False)[0]
        weights = torch.linspace(-1, 1, WIDTH)
        gradients.append(torch.autograd.grad((hidden.float() * weights).sum(), inputs)[0])
        torch.autograd.grad(model.base_model(inputs_embeds=inputs, use_cache=False)[0].sum(), inputs)  # of stride 0
    exact, plain, quick = gradients
    assert error(quick, exact) < 1.2 * error(plain, exact) + 1e-3


def test_two_threads_change_the_last_digits_at_most() -> None:
    _, _, quick = models("llama")
    found = adapted(quick, ["all-linear"])
    one = losses_and_norms(found)
    torch.set_num_threads(2)
    for losses, expected in zip(losses_and_norms(found), one, strict=True):
        assert error(losses, expected) < 2e-3


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
@pytest.mark.parametrize("where", ["norm", "weight", "embedding"])
def test_what_is_not_a_number_reaches_the_loss(architecture: str, where: str) -> None:
    half = in_bfloat16(exact_model(architecture))
    name = {"norm": ("ln_1.weight", "input_layernorm.weight"), "weight": ("c_fc.weight", "up_proj.weight")}
    names = name.get(where, ("wte.weight", "embed_tokens.weight"))
    for parameter_name, parameter in half.named_parameters():
        if parameter_name.endswith(names):
            parameter.data[..., 0] = float("nan")
    assert fuse(half)
    found = adapted(half, ["all-linear"])
    losses = ResponseLosses(found)(collate(examples(), 0))
    assert losses.isnan().all()


# -------------------------------------------------------------------------------------- what is not fused


@pytest.mark.parametrize("width", [128, 272])  # too small to pay; heads of 68
def test_models_that_do_not_fit_stay_as_they_are(width: int) -> None:
    half = in_bfloat16(exact_model("gpt2", width=width))
    kinds = [type(module) for module in half.modules()]
    assert not fuse(half)
    assert kinds == [type(module) for module in half.modules()]
    assert half.config._attn_implementation == "eager"


def test_a_stream_that_is_not_float32_and_float32_models_stay_as_they_are() -> None:
    exact = exact_model("gpt2")
    assert not fuse(exact)
    assert not fuse(exact.to(torch.bfloat16))


@pytest.mark.parametrize("lacking", ["compiler", "oneDNN"])
def test_without_a_compiler_or_library_a_model_has_the_old_path(lacking: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if lacking == "compiler":
        monkeypatch.setattr(fused, "are_there", lambda: False)
    else:
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    plain, half = (in_bfloat16(exact_model("llama")) for _ in range(2))
    half.set_attn_implementation("sdpa")
    _same_but_faster(half, ComputeConfig(precision="bfloat16", device="cpu"))
    assert not is_fused(half)
    assert torch.equal(logits(half, ids_of(2, 9)), logits(plain, ids_of(2, 9)))


def test_weights_that_are_spread_over_processes_are_not_packed() -> None:
    compute = ComputeConfig(precision="bfloat16", device="cpu", devices=2, strategy="fsdp")
    half = in_bfloat16(exact_model("llama"))
    _same_but_faster(half, compute)
    assert not is_fused(half)
    _same_but_faster(half, ComputeConfig(precision="bfloat16", device="cpu"))
    assert is_fused(half)


def test_gpt2s_dropout_and_other_activations_keep_their_own_mlp() -> None:
    exact, plain, quick = models("gpt2", activation_function="relu")
    ids = ids_of(2, 9)
    assert error(logits(quick, ids), logits(exact, ids)) < 1.2 * error(logits(plain, ids), logits(exact, ids)) + 1e-4
    _, _, quick = models("gpt2")
    assert not torch.equal(logits(quick.train(), ids), logits(quick, ids))
