"""Laws of the float32 residual stream: results are closer to float32 than with bfloat16 alone; nothing else changes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from exactness import assert_close_by_norm, exact_copy
from test_engine import capped_model, exact_gradients
from test_norms import VOCABULARY, batch_norms, ragged_examples, tiny_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from gradsift.config import LoraConfig
from gradsift.data.batching import collate
from gradsift.training import lora
from gradsift.training.head import OutputHead, ResponseLosses
from gradsift.training.residual import residual_in_float32, residual_precision

pytestmark = [pytest.mark.numerics, pytest.mark.usefixtures("one_thread")]

EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LLAMA_LIKE = ["llama", "mistral", "qwen2", "qwen3", "smollm3", "gemma3_text", "olmo2", "olmo3", "gpt_oss", "qwen3_moe"]
KNOWN = ["gpt2", *LLAMA_LIKE]


def model_of(architecture: str, layers: int = 2, width: int = 32) -> Any:
    torch.manual_seed(0)
    if architecture == "gpt2":
        model = GPT2LMHeadModel(
            GPT2Config(vocab_size=VOCABULARY, n_positions=32, n_embd=width, n_layer=layers, n_head=2)
        )
    else:
        shape = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": layers, "head_dim": 16}
        shape |= {"num_attention_heads": width // 16, "num_key_value_heads": 1, "max_position_embeddings": 32}
        shape |= {"pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2}  # a pad embedding would be zero
        shape |= EXPERTS if architecture in ("gpt_oss", "qwen3_moe") else {}
        config = AutoConfig.for_model(architecture, vocab_size=VOCABULARY, **shape)
        model = AutoModelForCausalLM.from_config(config, experts_implementation="eager")
    return model.requires_grad_(False).eval()


def adapted(model: Any, *targets: str) -> Any:
    """Add an adapter whose B is not zero, where the gradient of A would vanish."""
    computed = lora.add_adapter(model, LoraConfig(rank=3, targets=list(targets) or ["all-linear"]), seed=1)
    torch.manual_seed(2)
    for name, parameter in lora.trainable_parameters(computed).items():
        if "lora_B" in name:
            parameter.data.normal_(std=0.02)
    return computed.eval()


@pytest.mark.parametrize(("architecture", "layers"), [("gpt2", 16), ("llama", 16), ("smollm3", 16), ("olmo2", 8)])
def test_gradients_of_a_deep_model_are_nearer_to_exact_ones(architecture: str, layers: int) -> None:
    """At equal weights only rounding differs: without that of the sums, the error is a third smaller."""
    examples, eps = ragged_examples(16), torch.finfo(torch.bfloat16).eps
    same = exact_copy(adapted(model_of(architecture, layers).to(torch.bfloat16).float()))
    exact = torch.cat([gradient.flatten() for gradient in exact_gradients(same, examples).values()])
    errors = []
    for keeps_stream in (False, True):
        half = model_of(architecture, layers).to(torch.bfloat16)
        if keeps_stream:
            residual_in_float32(half)
        computed = adapted(half)
        ResponseLosses(computed)(collate(examples, 0)).mean().backward()
        gradients = torch.cat([p.grad.flatten() for p in lora.trainable_parameters(computed).values()])
        errors.append(float((gradients.double() - exact).norm() / exact.norm()))
    assert errors[1] < errors[0] < 16 * eps
    assert errors[1] > eps / 16  # the products are still bfloat16


@pytest.mark.parametrize("architecture", KNOWN)
def test_the_stream_is_float32_both_ways_and_all_products_are_bfloat16(architecture: str) -> None:
    model = model_of(architecture).to(torch.bfloat16)
    residual_in_float32(model)
    computed = adapted(model)
    seen: dict[str, set[torch.dtype]] = {"stream": set(), "its gradient": set(), "products": set()}

    def stream(block: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        seen["stream"].add(output.dtype)
        if output.requires_grad:
            output.register_hook(lambda gradient: seen["its gradient"].add(gradient.dtype))

    def product(layer: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        seen["products"] |= {inputs[0].dtype, output.dtype}

    for block in getattr(model.base_model, "h" if architecture == "gpt2" else "layers"):
        block.register_forward_hook(stream)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D) and "lora_" not in name:
            module.register_forward_hook(product)
    norms = batch_norms(computed, ragged_examples(), 7)
    assert np.isfinite(norms).all()
    computed(input_ids=torch.arange(6)[None])  # through the model's own head too
    assert seen == {"stream": {torch.float32}, "its gradient": {torch.float32}, "products": {torch.bfloat16}}


@pytest.mark.parametrize("architecture", KNOWN)
def test_the_head_is_still_had_by_itself(architecture: str) -> None:
    model = model_of(architecture).to(torch.bfloat16)
    residual_in_float32(model)
    assert residual_precision(adapted(model)) == "float32"  # under adapters too
    assert OutputHead.of(model) is not None


def test_nothing_is_passed_backwards_below_the_first_adapter() -> None:
    model = model_of("llama", layers=3).to(torch.bfloat16)
    residual_in_float32(model)
    assert residual_precision(model) == "float32"
    computed, needs = adapted(model, "layers.1.self_attn.q_proj"), []
    for block in model.model.layers:
        block.register_forward_hook(lambda block, inputs, output: needs.append(output.requires_grad))
    computed(input_ids=torch.arange(6)[None])
    assert needs == [False, True, True]


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "gemma3_text", "olmo3"])
def test_answers_are_those_of_a_pass_without_cache(architecture: str) -> None:
    model, ids = model_of(architecture).to(torch.bfloat16), torch.arange(2, 9)[None]
    residual_in_float32(model)
    with torch.no_grad():
        whole = model(input_ids=ids, use_cache=False).logits
        start = model(input_ids=ids[:, :4], use_cache=True)
        rest = model(input_ids=ids[:, 4:], past_key_values=start.past_key_values, use_cache=True).logits
        exact = exact_copy(model_of(architecture).to(torch.bfloat16).float())(input_ids=ids).logits
    for computed in (whole[:, 4:], rest):
        assert_close_by_norm(computed, exact[:, 4:], k=16, dim=-1, dtype=torch.bfloat16)


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_a_float32_model_keeps_every_bit(architecture: str) -> None:
    model, ids = tiny_model(architecture), torch.arange(9)[None]
    before = model(input_ids=ids).logits
    residual_in_float32(model)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.equal(model(input_ids=ids).logits, before)


def test_blocks_that_are_not_known_stay_in_bfloat16() -> None:
    model = capped_model().unload().to(torch.bfloat16)
    ids = torch.arange(9)[None]
    before = model(input_ids=ids).logits
    residual_in_float32(model)
    assert residual_precision(model) == "bfloat16"
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert torch.equal(model(input_ids=ids).logits, before)


def test_a_foreign_model_of_a_known_name_stays_in_bfloat16() -> None:
    class Foreign(LlamaForCausalLM):  # as code that comes with a checkpoint
        pass

    model = Foreign(model_of("llama").config).to(torch.bfloat16)
    residual_in_float32(model)
    assert residual_precision(model) == "bfloat16"
