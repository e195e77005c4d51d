"""Laws of the optional CPU kernels: each kernel against float64, and whole models against the same ones without.

Kernels are held element by element to a few roundings of the float64 result. A whole accelerated model must be as near
to float32 as the same bfloat16 model without kernels.
"""

from __future__ import annotations

import copy
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_norms import batch_norms
from torch import nn
from torch.nn import functional as F
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

import gradsift.cpu
from gradsift.config import ComputeConfig, LoraConfig, ModelConfig
from gradsift.cpu import accelerate, blocks
from gradsift.cpu import compiled as module
from gradsift.cpu.blocks import PackedHead, PackedLayer, PackedProducts
from gradsift.cpu.compiled import available, kernels
from gradsift.data.batching import collate
from gradsift.data.tokens import Encoded
from gradsift.errors import GradsiftError
from gradsift.gradients.per_sample import gradient_pass
from gradsift.training import lora
from gradsift.training.head import OutputHead, ResponseLosses
from gradsift.training.nano import nano_config
from gradsift.training.numerics import expected_numerics, numerics_of, prepare
from gradsift.training.residual import residual_in_float32, residual_precision

pytestmark = [pytest.mark.numerics, pytest.mark.usefixtures("one_thread")]
compiled = pytest.mark.skipif(not available(), reason="kernels.cpp cannot be compiled here")
HAS_PRODUCTS = torch.ops.mkldnn._is_mkldnn_bf16_supported()
has_products = pytest.mark.skipif(
    not HAS_PRODUCTS, reason="this processor has no bfloat16 products, so none are packed"
)
NAN, INF = float("nan"), float("inf")
BOTH = pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


def test_ci_compiles_the_kernels() -> None:
    """In CI the kernels must be available; elsewhere their laws may be skipped."""
    if "CI" not in os.environ:
        pytest.skip("this law is for CI")
    assert available()


def ops() -> Any:
    return kernels()


def normal(*shape: int, precision: torch.dtype = torch.float32, scale: float = 1.0, seed: int = 0) -> torch.Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(precision)


def near(computed: torch.Tensor, expected: torch.Tensor, *, slack: float = 1) -> None:
    """Compare to a few ulps in float32, and to one rounding in bfloat16, as intermediate values are float32."""
    fine = computed.dtype == torch.float32
    rtol, atol = (1e-6, 1e-6) if fine else (2**-8, 1e-5)
    torch.testing.assert_close(
        computed.double(), expected.double(), rtol=rtol * slack, atol=atol * slack, equal_nan=True, check_dtype=False
    )


# ------------------------------------------------------------------------------------------------- norms


def normed(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    if bias is not None:
        return F.layer_norm(x, x.shape[-1:], weight, bias, 1e-5)
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * weight


@compiled
@BOTH
@pytest.mark.parametrize("centred", [True, False], ids=["layer", "rms"])
@pytest.mark.parametrize("shape", [(1, 16), (3, 7, 48), (65, 768), (0, 32)])
def test_norms_and_their_gradients(shape: tuple[int, ...], centred: bool, precision: torch.dtype) -> None:
    x = (normal(*shape, scale=3) + 1).double().requires_grad_()
    weight, bias = normal(shape[-1], seed=1) + 1, normal(shape[-1], seed=2) if centred else None
    expected = normed(x, weight.double(), None if bias is None else bias.double())
    backprops = normal(*shape, seed=3, precision=precision)
    (to_x,) = torch.autograd.grad(expected, x, backprops.double())
    single = x.detach().float()
    y, means, scales = ops().norm(single, weight, bias, 1e-5, precision)
    assert y.dtype == precision
    near(y, expected, slack=4)
    near(ops().norm_backward(backprops, single, weight, means, scales, centred), to_x, slack=8)


@compiled
def test_a_row_that_is_not_a_number_stays_so_and_the_others_do_not_become_so() -> None:
    x = normal(3, 32)
    x[1, 5] = NAN
    for bias in (None, torch.zeros(32)):
        y, _, _ = ops().norm(x, torch.ones(32), bias, 1e-5, torch.bfloat16)
        assert y[1].isnan().all()
        assert y[[0, 2]].isfinite().all()


# -------------------------------------------------------------------------------------------- activations


@compiled
@BOTH
@pytest.mark.parametrize("shape", [(1, 16), (33, 48), (5, 3072), (0, 16)])
def test_gelu_and_its_slope(shape: tuple[int, ...], precision: torch.dtype) -> None:
    x = normal(*shape, scale=3, precision=precision)
    exact = x.double().requires_grad_()
    expected = F.gelu(exact, approximate="tanh")
    (slope,) = torch.autograd.grad(expected.sum(), exact)
    for computed, twin in zip(ops().gelu(x), (expected, slope), strict=True):
        near(computed, twin)


@compiled
@BOTH
@pytest.mark.parametrize("shape", [(1, 16), (33, 48), (5, 1536), (0, 16)])
def test_the_gated_product_and_its_gradients(shape: tuple[int, int], precision: torch.dtype) -> None:
    both = normal(shape[0], 2 * shape[1], scale=3, precision=precision)
    backprops = normal(*shape, seed=1, precision=precision)
    exact = both.double().requires_grad_()
    gate, up = exact.chunk(2, 1)
    expected = F.silu(gate) * up
    (to_both,) = torch.autograd.grad(expected, exact, backprops.double())
    near(ops().gated(both), expected, slack=4)
    near(ops().gated_backward(backprops, both), to_both, slack=4)


LARGE = [0.0, -0.0, 20.0, -20.0, 88.0, -88.0, 100.0, -100.0, 1e4, -1e4, 1e18, -1e18]


@compiled
@BOTH
def test_activations_of_extreme_numbers(precision: torch.dtype) -> None:
    x = torch.tensor([*LARGE, NAN, 3e38, -3e38, INF]).to(precision)
    y, slope = ops().gelu(x[None])
    near(y[0], F.gelu(x.double(), approximate="tanh"))
    near(slope[0, :12], torch.tensor([0.5, 0.5, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0]))
    assert slope[0, 12].isnan()
    both = torch.cat([x, torch.ones_like(x)])[None]
    near(ops().gated(both)[0], F.silu(x.double()), slack=2)
    to_gate, to_up = ops().gated_backward(torch.ones_like(x)[None], both)[0].chunk(2)
    near(to_gate[:12], torch.tensor([0.5, 0.5, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0]))
    near(to_up[:15], F.silu(x.double())[:15], slack=2)
    assert to_gate[12].isnan()
    assert to_up[12].isnan()


@compiled
@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FC00001, 0x7FFFFFFF, -1], ids=hex)
def test_whatever_is_not_a_number_stays_so(bits: int) -> None:
    x = torch.full((1, 32), bits, dtype=torch.int32).view(torch.float32)
    assert ops().gelu(x)[0].isnan().all()
    assert ops().gated(x).isnan().all()
    logits = torch.zeros(1, 32)
    logits[0, 3] = x[0, 0]
    loss = ops().cross_entropy_(logits, torch.tensor([5]), torch.zeros(1), 32, True)
    assert loss.isnan().all()
    assert logits.isnan().all()


# ----------------------------------------------------------------------------------------------- products


def packed(inputs: int, outputs: int, bias: bool = True) -> tuple[PackedProducts, torch.Tensor, torch.Tensor | None]:
    weight = normal(inputs, outputs, scale=inputs**-0.5, precision=torch.bfloat16, seed=5)
    vector = normal(outputs, precision=torch.bfloat16, seed=6) if bias else None
    return PackedProducts(weight, vector), weight, vector


ROWS = pytest.mark.parametrize("rows", [1, 31, 32, 33, 161])


@has_products
@compiled
@ROWS
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("threads", [1, 2])
def test_products_with_packed_weights(rows: int, bias: bool, threads: int) -> None:
    torch.set_num_threads(threads)
    layer, weight, vector = packed(64, 48, bias)
    x, backprops = (normal(rows, width, precision=torch.bfloat16, seed=width) for width in (64, 48))
    offset = 0 if vector is None else vector.double()
    near(layer.outputs(x), x.double() @ weight.double() + offset, slack=2)
    near(layer.to_inputs(backprops), backprops.double() @ weight.double().t(), slack=2)
    factor = normal(rows, 64, precision=torch.bfloat16, seed=8)
    product = (backprops.double() @ weight.double().t()).bfloat16().double()
    near(ops().product_times(backprops, layer.backward_weight, factor), product * factor.double(), slack=3)
    inner = (x.double() @ weight.double() + offset).bfloat16()
    y, slope = ops().product_gelu(x, layer.forward_weight, vector, 48)
    for computed, twin in zip((y, slope), ops().gelu(inner), strict=True):
        near(computed, twin, slack=8)  # of a product whose last bit may be another


@has_products
@compiled
def test_products_of_rows_that_do_not_lie_side_by_side() -> None:
    layer, _, _ = packed(64, 48)
    x = normal(40, 64, precision=torch.bfloat16)
    wide = torch.cat([x, x], 1)
    expected = layer.outputs(x)
    assert torch.equal(layer.outputs(wide[:, :64]), expected)
    assert torch.equal(layer.outputs(x.t().contiguous().t()), expected)
    assert torch.equal(layer.outputs(x[:1].expand(40, -1)), expected[:1].expand(40, -1))


@has_products
@compiled
def test_a_product_of_no_rows_is_empty() -> None:
    layer, _, _ = packed(64, 48)
    assert layer.outputs(torch.empty(0, 64, dtype=torch.bfloat16)).shape == (0, 48)


# ------------------------------------------------------------------------------------------ cross entropy


@compiled
@BOTH
@pytest.mark.parametrize(("vocabulary", "padded"), [(1, 1), (7, 16), (16, 16), (61, 64), (50, 50), (1000, 1024)])
@pytest.mark.parametrize("wants_gradient", [True, False])
def test_cross_entropy_and_its_gradient(
    vocabulary: int, padded: int, wants_gradient: bool, precision: torch.dtype
) -> None:
    places = 9
    logits = normal(places, padded, scale=4, precision=precision)
    targets = torch.arange(places) * 7 % vocabulary
    exact = logits[:, :vocabulary].double().scatter(1, targets[:, None], normal(places, 1, seed=2).double())
    chosen = exact.gather(1, targets[:, None])[:, 0].float()
    exact.requires_grad_()
    expected = F.cross_entropy(exact, targets, reduction="none")
    (gradient,) = torch.autograd.grad(expected.sum(), exact)
    computed = ops().cross_entropy_(logits, targets, chosen, vocabulary, wants_gradient)
    near(computed, expected, slack=2)
    if wants_gradient:
        near(logits[:, :vocabulary], gradient)
        assert not logits[:, vocabulary:].any()


@compiled
@BOTH
def test_cross_entropy_of_extreme_logits(precision: torch.dtype) -> None:
    rows = [
        ([1e4, -1e4, 0.0], 0.0, 1e4),  # the target's own is the last of the numbers
        ([-1e4] * 3, 1e4, 0.0),
        ([-INF, -INF, 0.0], 0.0, torch.tensor(2.0).log()),
        ([-INF] * 3, 2.0, 0.0),
        ([1e4] * 3, -1e4, 2e4 + torch.tensor(3.0).log()),
        ([NAN, 0.0, 0.0], 0.0, NAN),
        ([0.0, 0.0, 0.0], NAN, NAN),
        ([0.0, INF, 0.0], 0.0, NAN),  # as torch has it
        ([-INF] * 3, -INF, NAN),
        ([0.0, 0.0, 0.0], -INF, INF),
    ]
    logits = torch.zeros(len(rows), 20)  # a whole piece and a shorter one
    logits[:] = -INF
    for row, (others, _, _) in enumerate(rows):
        logits[row, [0, 15, 19]] = torch.tensor(others)
    logits = logits.to(precision)
    chosen = torch.tensor([own for _, own, _ in rows])
    expected = torch.tensor([float(loss) for _, _, loss in rows])
    computed = ops().cross_entropy_(logits, torch.full((len(rows),), 17), chosen, 20, True)
    # 1e4 is 9,984 in bfloat16
    torch.testing.assert_close(
        computed, expected, rtol=1e-6 if precision == torch.float32 else 2e-3, atol=1e-6, equal_nan=True
    )
    lost = expected.isnan()
    assert logits[lost].isnan().any(1).all()
    assert logits[~lost].isfinite().all()


@compiled
@pytest.mark.parametrize("target", [-1, -100, 61, 63, 64, 2**40])
def test_a_target_outside_the_vocabulary_is_refused(target: int) -> None:
    logits = torch.zeros(3, 64)
    with pytest.raises(IndexError, match="vocabulary of 61"):
        ops().cross_entropy_(logits, torch.tensor([0, target, 1]), torch.zeros(3), 61, True)
    assert not logits.any()


# ---------------------------------------------------------------------------------------------- attention


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the attention (B, T, H, E) and the logarithms of its sums, (B, H, T)."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    later = torch.ones(q.shape[2], q.shape[2]).triu(1).bool()
    scores = (q @ k.transpose(2, 3) * scale).masked_fill(later, -INF)
    return (scores.softmax(3) @ v).transpose(1, 2), scores.logsumexp(3)


def turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate x (B, H, T, E) by the angles (T, E) of its tokens, one pair (i, i + E / 2) at a time."""
    half = x.shape[-1] // 2
    computed = torch.empty_like(x)
    for i in range(half):
        a, b = x[..., i], x[..., i + half]
        computed[..., i] = a * cos[:, i] - b * sin[:, i]
        computed[..., i + half] = b * cos[:, i + half] + a * sin[:, i + half]
    return computed


def attends(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *angles: torch.Tensor, slack: float = 4) -> None:
    scale = q.shape[-1] ** -0.5
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    seen = [turned(x, *angles) for x in exact[:2]] if angles else exact[:2]
    expected, log_sums = attention(*seen, exact[2], scale)
    out, lse = ops().attend(q, k, v, scale, *angles)
    near(out, expected, slack=slack)
    near(lse, log_sums, slack=4)
    backprops = normal(*out.shape, seed=9, precision=q.dtype)
    gradients = torch.autograd.grad(expected, exact, backprops.double())
    computed = ops().attend_backward(backprops, q, k, v, out, lse, scale, *angles)
    rtol = 1e-6 if q.dtype == torch.float32 else 4e-3  # `out`, which the backward pass reads, is rounded too
    for to_x, twin in zip(computed, gradients, strict=True):
        assert to_x.shape == twin.shape
        assert to_x.dtype == q.dtype
        assert (to_x.double() - twin).norm() <= rtol * twin.norm() + 1e-5


def q_k_v(
    examples: int, heads: int, groups: int, tokens: int, width: int, precision: torch.dtype, scale: float = 1
) -> list[torch.Tensor]:
    counts = (heads, groups, groups)
    return [
        normal(examples, count, tokens, width, seed=seed, scale=scale, precision=precision)
        for seed, count in enumerate(counts)
    ]


@compiled
@BOTH
@pytest.mark.parametrize("tokens", [1, 2, 15, 16, 17, 47, 48, 49, 96, 101])
def test_attention_of_any_number_of_tokens(tokens: int, precision: torch.dtype) -> None:
    attends(*q_k_v(2, 4, 2, tokens, 32, precision))


@compiled
@BOTH
@pytest.mark.parametrize(("tokens", "width"), [(1, 32), (33, 64), (101, 128)])
def test_queries_and_keys_are_turned_by_any_angles(tokens: int, width: int, precision: torch.dtype) -> None:
    attends(*q_k_v(2, 4, 2, tokens, width, precision), normal(tokens, width, seed=5), normal(tokens, width, seed=6))


@compiled
@BOTH
@pytest.mark.parametrize(("heads", "groups"), [(1, 1), (4, 4), (6, 2), (9, 3), (5, 1)])
@pytest.mark.parametrize("width", [16, 48, 64, 80, 128])
def test_attention_of_any_heads(heads: int, groups: int, width: int, precision: torch.dtype) -> None:
    attends(*q_k_v(1, heads, groups, 33, width, precision))


@compiled
@BOTH
def test_attention_of_parts_of_other_tensors(precision: torch.dtype) -> None:
    q, k, v = q_k_v(3, 4, 4, 21, 32, precision)
    out, lse = ops().attend(q, k, v, 0.2)
    joined = torch.cat([x.transpose(1, 2) for x in (q, k, v)], 3)  # (B, T, H, 3 E), as GPT-2 has them
    parts = [x.transpose(1, 2) for x in joined.split(32, 3)]
    assert not any(x.is_contiguous() for x in parts)
    for computed, expected in zip(ops().attend(*parts, 0.2), (out, lse), strict=True):
        assert torch.equal(computed, expected)
    expected = ops().attend_backward(out, q, k, v, out, lse, 0.2)
    for computed, twin in zip(ops().attend_backward(out, *parts, out, lse, 0.2), expected, strict=True):
        assert torch.equal(computed, twin)
    same = k[:, :1].expand(-1, 4, -1, -1)  # of stride 0
    assert torch.equal(ops().attend(q, same, v, 0.2)[0], ops().attend(q, same.contiguous(), v, 0.2)[0])


@compiled
@BOTH
def test_attention_to_extreme_scores(precision: torch.dtype) -> None:
    q, k, v = q_k_v(1, 2, 1, 50, 32, precision, scale=50)  # scores of thousands: one key takes all
    expected, log_sums = attention(*(x.double() for x in (q, k, v)), 1.0)
    out, lse = ops().attend(q, k, v, 1.0)
    near(out, expected, slack=4)
    near(lse, log_sums, slack=4)
    to_q, to_k, _ = ops().attend_backward(torch.ones_like(out), q, k, v, out, lse, 1.0)
    assert max(to_q.abs().max(), to_k.abs().max()) < 1  # of products of 50 x 50 x 32 that are all but equal


@compiled
def test_what_is_not_a_number_reaches_the_tokens_from_its_own_on() -> None:
    q, k, v = q_k_v(1, 1, 1, 60, 16, torch.float32)
    k[0, 0, 20, 3] = NAN
    out, lse = ops().attend(q, k, v, 0.25)
    assert out[0, :20].isfinite().all()
    assert out[0, 20:].isnan().all()
    assert lse[0, 0, 20:].isnan().all()
    gradients = ops().attend_backward(torch.ones_like(out), q, k, v, out, lse, 0.25)
    assert all(x.isnan().any() for x in gradients)


@compiled
@BOTH
def test_no_examples_and_no_tokens(precision: torch.dtype) -> None:
    for shape in [(0, 4, 2, 5, 16), (2, 4, 2, 0, 16)]:
        q, k, v = q_k_v(*shape, precision)
        out, lse = ops().attend(q, k, v, 1.0)
        assert [x.shape for x in ops().attend_backward(out, q, k, v, out, lse, 1.0)] == [q.shape, k.shape, v.shape]


# ------------------------------------------------------------------------------------------------ threads


@compiled
@BOTH
def test_any_number_of_threads_gives_the_same_bits_but_for_products(precision: torch.dtype) -> None:
    x, weight = normal(300, 256), normal(256, seed=1)
    both, logits = normal(300, 512, precision=precision), normal(300, 512, precision=precision, scale=3)
    heads = q_k_v(3, 6, 2, 70, 32, precision)

    # oneDNN adds up a product's terms in an order that depends on the number of rows, which threads share
    def everything() -> list[torch.Tensor]:
        y, means, scales = ops().norm(x, weight, weight, 1e-5, precision)
        out, lse = ops().attend(*heads, 0.2)
        own = logits.clone()
        return [
            *(y, means, scales, out, lse, own),
            ops().norm_backward(y, x, weight, means, scales, True),
            *ops().gelu(both),
            ops().gated(both),
            ops().gated_backward(y, both),
            ops().cross_entropy_(own, torch.arange(300), torch.zeros(300), 500, True),
            *ops().attend_backward(out, *heads, out, lse, 0.2),
        ]

    expected = everything()
    for threads in (2, 3, 7):
        torch.set_num_threads(threads)
        for computed, twin in zip(everything(), expected, strict=True):
            assert torch.equal(computed, twin)


@has_products
@compiled
@pytest.mark.parametrize("threads", [1, 2])
def test_kernels_run_where_nothing_is_recorded(threads: int) -> None:
    torch.set_num_threads(threads)
    layer, _, _ = packed(64, 48)
    x = normal(100, 64, precision=torch.bfloat16)
    expected = layer.outputs(x)
    with torch.inference_mode():
        assert torch.equal(layer.outputs(x + 0), expected)
    assert not layer.outputs(x.clone().requires_grad_().detach()).requires_grad


# -------------------------------------------------------------------------------------------- wrong calls


def wrong_calls() -> Iterator[tuple[str, Any]]:
    x, weight, rows = torch.zeros(2, 32), torch.ones(32), torch.zeros(2)
    half = torch.zeros(2, 32, dtype=torch.bfloat16)
    q, k, v = q_k_v(1, 4, 2, 5, 16, torch.float32)
    targets = torch.zeros(2, dtype=torch.int64)
    yield "norm: width", lambda: ops().norm(torch.zeros(2, 20), torch.ones(20), None, 1e-5, torch.float32)
    yield "norm: no width", lambda: ops().norm(torch.zeros(2, 0), torch.ones(0), None, 1e-5, torch.float32)
    yield "norm: no rows at all", lambda: ops().norm(torch.zeros(()), torch.ones(1), None, 1e-5, torch.float32)
    yield "norm: strides", lambda: ops().norm(torch.zeros(32, 32).t(), weight, None, 1e-5, torch.float32)
    yield "norm: weight", lambda: ops().norm(x, torch.ones(16), None, 1e-5, torch.float32)
    yield "norm: bias", lambda: ops().norm(x, weight, torch.ones(16), 1e-5, torch.float32)
    yield "norm: x in bfloat16", lambda: ops().norm(half, weight, None, 1e-5, torch.bfloat16)
    yield "norm: to float16", lambda: ops().norm(x, weight, None, 1e-5, torch.float16)
    yield "norm: meta", lambda: ops().norm(x.to("meta"), weight, None, 1e-5, torch.float32)
    yield "norm: sparse", lambda: ops().norm(x.to_sparse(), weight, None, 1e-5, torch.float32)
    yield "norm_backward: means", lambda: ops().norm_backward(x, x, weight, torch.zeros(1), rows, True)
    yield "norm_backward: scales", lambda: ops().norm_backward(x, x, weight, rows, torch.zeros(1), True)
    yield "norm_backward: backprops", lambda: ops().norm_backward(torch.zeros(1, 32), x, weight, rows, rows, True)
    yield "norm_backward: in double", lambda: ops().norm_backward(x.double(), x, weight, rows, rows, True)
    yield "gelu: width", lambda: ops().gelu(torch.zeros(2, 20))
    yield "gelu: double", lambda: ops().gelu(x.double())
    yield "gelu: strides", lambda: ops().gelu(torch.zeros(32, 32).t())
    yield "gated: width", lambda: ops().gated(torch.zeros(2, 48))
    yield "gated: odd", lambda: ops().gated(torch.zeros(2, 33))
    yield "gated: shape", lambda: ops().gated(torch.zeros(2, 2, 32))
    yield "gated_backward: backprops", lambda: ops().gated_backward(torch.zeros(1, 16), x)
    yield "gated_backward: precision", lambda: ops().gated_backward(torch.zeros(2, 16), half)
    yield "cross_entropy_: vector", lambda: ops().cross_entropy_(weight, targets, rows, 32, True)
    yield "cross_entropy_: targets", lambda: ops().cross_entropy_(x, targets[:1], rows, 32, True)
    yield "cross_entropy_: int32", lambda: ops().cross_entropy_(x, targets.int(), rows, 32, True)
    yield "cross_entropy_: chosen", lambda: ops().cross_entropy_(x, targets, rows[:1], 32, True)
    yield "cross_entropy_: vocabulary", lambda: ops().cross_entropy_(x, targets, rows, 33, True)
    yield "cross_entropy_: strides", lambda: ops().cross_entropy_(torch.zeros(32, 2).t(), targets, rows, 32, True)
    angles = torch.zeros(q.shape[2], q.shape[3])
    yield "attend: one angle", lambda: ops().attend(q, k, v, 1.0, angles)
    yield "attend: angles", lambda: ops().attend(q, k, v, 1.0, angles[:-1], angles[:-1])
    yield "attend: precise angles", lambda: ops().attend(q, k, v, 1.0, angles.double(), angles.double())
    yield "attend: width", lambda: ops().attend(q[..., :8], k[..., :8], v[..., :8], 1.0)
    yield "attend: stride", lambda: ops().attend(q.transpose(2, 3).contiguous().transpose(2, 3), k, v, 1.0)
    yield "attend: groups", lambda: ops().attend(q[:, :3], k, v, 1.0)
    yield "attend: no groups", lambda: ops().attend(q, k[:, :0], v[:, :0], 1.0)
    yield "attend: tokens", lambda: ops().attend(q, k[:, :, :4], v[:, :, :4], 1.0)
    yield "attend: values", lambda: ops().attend(q, k, v[:, :, :4], 1.0)
    yield "attend: precision", lambda: ops().attend(q, k.bfloat16(), v, 1.0)
    yield "attend: double", lambda: ops().attend(q.double(), k.double(), v.double(), 1.0)
    yield "attend: three", lambda: ops().attend(q[0], k[0], v[0], 1.0)
    out, lse = torch.zeros(1, 5, 4, 16), torch.zeros(1, 4, 5)
    yield "attend_backward: backprops", lambda: ops().attend_backward(out[:, :4], q, k, v, out, lse, 1.0)
    yield "attend_backward: out", lambda: ops().attend_backward(out, q, k, v, q, lse, 1.0)
    yield "attend_backward: lse", lambda: ops().attend_backward(out, q, k, v, out, lse[:, :2], 1.0)


def wrong_products() -> Iterator[tuple[str, Any]]:
    x, half = torch.zeros(2, 32), torch.zeros(2, 32, dtype=torch.bfloat16)
    layer, _, _ = packed(32, 16)
    yield "product: x", lambda: layer.outputs(torch.zeros(2, 16, dtype=torch.bfloat16))
    yield "product: x in float32", lambda: layer.outputs(x)
    yield "product: x of three", lambda: layer.outputs(half[None])
    yield "product: width", lambda: ops().product(half, layer.forward_weight, None, 32)
    yield "product: bias", lambda: ops().product(half, layer.forward_weight, torch.zeros(8, dtype=torch.bfloat16), 16)
    yield "product: not packed", lambda: ops().product(half, torch.zeros(16, 32, dtype=torch.bfloat16), None, 16)
    yield "product_times: rows", lambda: ops().product_times(half, layer.forward_weight, half[:1, :16].contiguous())
    yield "product_times: width", lambda: ops().product_times(half, layer.forward_weight, half)
    yield "product_times: vector", lambda: ops().product_times(half, layer.forward_weight, half[0])
    yield "product_gelu: width", lambda: ops().product_gelu(half, layer.forward_weight, None, 32)


def accepted(calls: Iterator[tuple[str, Any]]) -> list[str]:
    """Return the calls that raise nothing."""
    names = []
    for name, call in calls:
        try:
            call()
        except (RuntimeError, IndexError):
            continue
        names.append(name)
    return names


@compiled
def test_wrong_calls_raise_and_read_nothing() -> None:
    assert not accepted(wrong_calls())


@compiled
@has_products
def test_wrong_products_raise_and_read_nothing() -> None:
    assert not accepted(wrong_products())


# ---------------------------------------------------------------------------------- where they cannot be


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Forget the compiler and use an empty cache folder; these tests must not load what they compile."""
    available.cache_clear()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CXX", raising=False)
    yield tmp_path
    available.cache_clear()


def compiler_that(folder: Path, script: str) -> str:
    file = folder / "compiler"
    file.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    file.chmod(file.stat().st_mode | stat.S_IXUSR)
    return str(file)


def test_a_missing_compiler_gives_one_warning(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CXX", str(fresh / "nowhere"))
    assert not available()
    assert not available()
    assert len(caplog.messages) == 1
    assert "CXX" in caplog.text
    with pytest.raises(GradsiftError, match="cannot be compiled"):
        kernels()


def test_a_failing_compiler_is_quoted(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    script = (
        '[ "$1" = --version ] || { echo "In file included from" >&2; echo "a.cpp:1: error: no such flag" >&2; exit 1; }'
    )
    monkeypatch.setenv("CXX", compiler_that(fresh, script))
    assert not available()
    assert "a.cpp:1: error: no such flag" in caplog.messages[-1]
    assert "In file included" not in caplog.text
    left = [path.name for path in (fresh / "cache" / "gradsift").iterdir() if path.suffix != ".lock"]
    assert not left


def test_a_compiler_that_fails_in_silence_and_one_that_makes_no_library(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for script in ("exit 3", "exit 0", 'for last; do [ "$before" = -o ] && echo junk > "$last"; before=$last; done'):
        available.cache_clear()
        monkeypatch.setenv("CXX", compiler_that(fresh, script))
        assert not available()
        assert "cannot be compiled or loaded" in caplog.messages[-1]


def test_a_compiler_that_hangs_is_given_up(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "_PATIENCE", 0.3)
    for script in ("exec sleep 20", '[ "$1" = --version ] || exec sleep 20'):
        available.cache_clear()
        caplog.clear()
        monkeypatch.setenv("CXX", compiler_that(fresh, script))
        assert not available()
        assert "the compiler did not end within" in caplog.messages[-1]


def test_a_cache_folder_that_cannot_be_written(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (fresh / "file").write_text("", encoding="utf-8")
    monkeypatch.setenv("XDG_CACHE_HOME", str(fresh / "file"))
    assert not available()
    assert "cannot be compiled or loaded" in caplog.text


def test_a_user_without_a_home(fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", no_home)
    assert not available()
    assert "home" in caplog.text


def test_another_compiler_processor_or_option_has_a_library_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = [sys.executable]  # says its version too
    keys = {module._key(compiler), module._key([*compiler, "-B"])}
    monkeypatch.setattr(module, "_processor", lambda: "another")
    keys.add(module._key(compiler))
    monkeypatch.setattr(module, "_FLAGS", [])
    keys.add(module._key(compiler))
    assert len(keys) == 4


COUNT_COMPILATIONS = """
import sys, torch
from gradsift.cpu import compiled
torch.ops.load_library = lambda path: open(path).close()
assert compiled.available(), "not there"
"""


@pytest.mark.slow
def test_of_two_processes_one_compiles(fresh: Path) -> None:
    script = (
        f'[ "$1" = --version ] && exit; echo once >> {fresh}/count; sleep 1\n'
        'for last; do [ "$before" = -o ] && echo made > "$last"; before=$last; done; true'
    )
    environment = {**os.environ, "CXX": compiler_that(fresh, script), "OMP_NUM_THREADS": "1"}
    runs = [
        subprocess.Popen([sys.executable, "-c", COUNT_COMPILATIONS], env=environment, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for run in runs:
        _, said = run.communicate()
        assert run.returncode == 0, said
    assert (fresh / "count").read_text(encoding="utf-8") == "once\n"


# ------------------------------------------------------------------------------------------- whole models


class EmulatedProducts:
    """Replace oneDNN's products by torch's, so that the other laws run on any processor."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.ops.gradsift, name)

    @staticmethod
    def product(x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None, width: int) -> torch.Tensor:
        return F.linear(x.float(), packed.float(), None if bias is None else bias.float()).bfloat16()

    def product_times(self, x: torch.Tensor, packed: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        return self.product(x, packed, None, 0) * factor

    def product_gelu(
        self, x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None, width: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        y, slope = torch.ops.gradsift.gelu(self.product(x, packed, bias, width))
        return y, slope


@pytest.fixture
def products_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    if HAS_PRODUCTS:
        return
    emulated = EmulatedProducts()
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    monkeypatch.setattr(blocks, "_pack", torch.Tensor.contiguous)
    monkeypatch.setattr(blocks, "_product", lambda x, packed: emulated.product(x, packed, None, 0))
    monkeypatch.setattr(blocks, "kernels", lambda: emulated)


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
    """Return a float32 model of two blocks whose weights are bfloat16 numbers, with nonzero biases."""
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
    """Return a copy in bfloat16; buffers, such as rotary frequencies, keep their precision."""
    half = copy.deepcopy(model, {id(p): nn.Parameter(p.bfloat16(), requires_grad=False) for p in model.parameters()})
    residual_in_float32(half)
    assert residual_precision(half) == "float32"
    half.set_attn_implementation("eager")
    return half


def models(architecture: str, **options: Any) -> tuple[Any, Any, Any]:
    """Return one model in float32, in bfloat16, and in bfloat16 with fused blocks."""
    exact = exact_model(architecture, **options)
    quick = in_bfloat16(exact)
    assert accelerate(quick)
    return exact, in_bfloat16(exact), quick


def adapted(model: Any, targets: list[str], scale: float = 0.02) -> Any:
    """Add an adapter whose B is not zero, where the gradient of A would vanish."""
    with_adapter = lora.add_adapter(model, LoraConfig(rank=4, targets=targets), seed=1)
    torch.manual_seed(2)
    for name, parameter in lora.trainable_parameters(with_adapter).items():
        if "lora_B" in name:
            parameter.data.normal_(std=scale)
    return with_adapter.eval()


def examples() -> list[Encoded]:
    """Return rows of 2 to 50 tokens."""
    draws = np.random.default_rng(3)
    sizes = enumerate((2, 5, 16, 17, 33, 50))
    return [
        Encoded(row, row, draws.integers(0, VOCABULARY, size).astype(np.int32), np.arange(size) > size // 3)
        for row, size in sizes
    ]


def losses_and_norms(model: Any, side: str = "right") -> tuple[torch.Tensor, np.ndarray]:
    with torch.no_grad():
        losses = ResponseLosses(model)(collate(examples(), 0, side)).float()
    return losses, batch_norms(model, examples(), 6, side)


def is_accelerated(model: Any) -> bool:
    return numerics_of(model)["kernels"] == module.version()


def logits(model: Any, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, **options).logits.float()


def ids_of(examples: int, tokens: int) -> torch.Tensor:
    return torch.randint(VOCABULARY, (examples, tokens), generator=torch.Generator().manual_seed(4))


def error(computed: Any, expected: Any) -> float:
    computed, expected = torch.as_tensor(computed).double(), torch.as_tensor(expected).double()
    return float((computed - expected).norm() / expected.norm())


CASES = [(targets, "right") for targets in ("attention", "gate", "down", "all")] + [("all", "left")]


@compiled
@pytest.mark.usefixtures("products_everywhere")
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
    for expected, without, computed in zip(exact, plain, quick, strict=True):
        assert error(computed, expected) < 2e-3
        assert error(computed, expected) < 1.5 * error(without, expected) + 1e-4


@compiled
@pytest.mark.usefixtures("products_everywhere")
@pytest.mark.parametrize("architecture", KNOWN)
def test_all_that_lies_between_the_products_is_fused(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, plain, quick = models(architecture)
    assert is_accelerated(quick)
    assert not is_accelerated(plain)
    kinds = {type(module) for module in quick.modules()} - {type(module) for module in plain.modules()}
    assert any(issubclass(kind, PackedLayer) for kind in kinds)
    assert {kind.__bases__[0].__module__ for kind in kinds} == {"gradsift.cpu.blocks"}
    turns_within = architecture in ("llama", "mistral", "qwen2")  # rotary positions, in attention
    assert len(kinds) == 3 + turns_within  # the linear layers, the norms, the MLPs
    assert type(quick.get_output_embeddings()) is nn.Linear
    head = OutputHead.of(quick)
    assert head is not None
    assert isinstance(head.own, PackedHead)
    assert OutputHead.of(copy.copy(quick)).own is head.own  # type: ignore[union-attr]
    calls = []
    monkeypatch.setattr(blocks, "sdpa_attention_forward", lambda *args, **kwargs: calls.append(args))
    window = architecture == "mistral"
    quick(input_ids=ids_of(2, 5 if window else 40), use_cache=False)
    assert not calls


@compiled
@pytest.mark.usefixtures("products_everywhere")
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
    """Return the logits of the places from 12 on, each computed with a cache of the places before it."""
    computed, cache = [], None
    for end in range(12, ids.shape[1]):
        options = {"attention_mask": mask[:, :end], "past_key_values": cache, "use_cache": True}
        with torch.no_grad():
            output = model(input_ids=ids[:, 0 if cache is None else end - 1 : end], **options)
        cache = output.past_key_values
        computed.append(output.logits[:, -1].float())
    return torch.stack(computed, 1)


@compiled
@pytest.mark.usefixtures("products_everywhere")
@pytest.mark.parametrize("architecture", KNOWN)
@pytest.mark.parametrize("padded", [True, False])
def test_a_cache_and_padding_on_the_left(architecture: str, padded: bool) -> None:
    exact, plain, quick = models(architecture)
    ids, mask = ids_of(3, 20), torch.ones(3, 20, dtype=torch.int64)
    if padded:
        mask[0, :7] = mask[1, :1] = 0
    expected, without, computed = (token_by_token(model, ids, mask) for model in (exact, plain, quick))
    assert error(computed, expected) < 1.5 * error(without, expected) + 1e-3
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    text = quick.generate(ids, attention_mask=mask, **options)
    assert text.shape == (3, 26)
    best = logits(exact, text, attention_mask=torch.cat([mask, mask[:, :6] | 1], 1))[:, 19:25]
    chosen = best.gather(2, text[:, 20:, None])[..., 0]
    assert (best.amax(2) - chosen).max() < 0.05  # greedy, but for ties


@compiled
@pytest.mark.usefixtures("products_everywhere")
@pytest.mark.parametrize("architecture", KNOWN)
def test_packed_rows_do_not_see_each_other(architecture: str) -> None:
    exact, _, quick = models(architecture)
    ids, places = ids_of(1, 20), torch.cat([torch.arange(11), torch.arange(9)])[None]
    expected = logits(exact, ids, position_ids=places, use_cache=False)
    assert error(logits(quick, ids, position_ids=places, use_cache=False), expected) < 0.01
    assert error(logits(quick, ids[:, 11:]), expected[:, 11:]) < 0.01


# ------------------------------------------------------------------------- adapters and weights that train


@compiled
@pytest.mark.usefixtures("products_everywhere")
@pytest.mark.parametrize("architecture", ["gpt2", "llama", "qwen2"])
def test_an_adapter_comes_and_goes_and_leaves_no_trace(architecture: str) -> None:
    _, _, quick = models(architecture)
    ids = ids_of(2, 9)
    before = logits(quick, ids)
    for _ in range(2):
        with_adapter = adapted(quick, ["all-linear"])
        assert not torch.equal(logits(with_adapter, ids), before)
        with with_adapter.disable_adapter():
            assert error(logits(with_adapter, ids), before) < 0.01  # an adapted MLP is not fused
        quick = with_adapter.unload()
        assert torch.equal(logits(quick, ids), before)


@compiled
@pytest.mark.usefixtures("products_everywhere")
@pytest.mark.parametrize("architecture", ["gpt2", "llama", "qwen2"])
def test_a_merged_adapter_is_in_the_weights_that_are_used(architecture: str) -> None:
    _, plain, quick = models(architecture)
    ids = ids_of(2, 9)
    without = logits(plain, ids)
    with_adapter, expected = adapted(quick, ["all-linear"], 0.2), adapted(plain, ["all-linear"], 0.2)
    before = logits(with_adapter, ids)
    assert error(without, before) > 0.1  # or nothing below would say much
    copied = copy.deepcopy(with_adapter).merge_and_unload()
    assert error(logits(copied, ids), logits(copy.deepcopy(expected).merge_and_unload(), ids)) < 0.03
    assert error(logits(copied, ids), before) < 0.03
    assert torch.equal(logits(with_adapter, ids), before)  # the copy's weights are its own
    with_adapter.merge_adapter()
    assert error(logits(with_adapter, ids), before) < 0.03
    with_adapter.unmerge_adapter()
    assert error(logits(with_adapter, ids), before) < 0.03
    assert error(logits(with_adapter.unload(), ids), without) < 0.03


@compiled
@pytest.mark.usefixtures("products_everywhere")
@pytest.mark.parametrize("architecture", ["gpt2", "llama", "qwen2"])
def test_gradients_of_all_weights(architecture: str) -> None:
    computed = []
    ids = ids_of(1, 9)
    for model in models(architecture):
        each = adapted(model, ["all-linear"])
        before = logits(each, ids)
        with gradient_pass(each, "full", 0) as gradients:
            computed.append(gradients(examples()[:3]))
        assert torch.equal(logits(each, ids), before)
    exact, plain, quick = computed
    assert exact.shape == quick.shape
    assert (exact.norm(dim=1) > 0).all()
    assert error(quick, exact) < 1.2 * error(plain, exact) + 1e-3


@compiled
@pytest.mark.usefixtures("products_everywhere")
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


@compiled
@pytest.mark.usefixtures("products_everywhere")
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


@compiled
@pytest.mark.usefixtures("products_everywhere")
def test_two_threads_change_the_last_digits_at_most() -> None:
    _, _, quick = models("llama")
    computed = adapted(quick, ["all-linear"])
    one = losses_and_norms(computed)
    torch.set_num_threads(2)
    for losses, expected in zip(losses_and_norms(computed), one, strict=True):
        assert error(losses, expected) < 2e-3


@compiled
@pytest.mark.usefixtures("products_everywhere")
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
@pytest.mark.parametrize("where", ["norm", "weight", "embedding"])
def test_what_is_not_a_number_reaches_the_loss(architecture: str, where: str) -> None:
    half = in_bfloat16(exact_model(architecture))
    name = {"norm": ("ln_1.weight", "input_layernorm.weight"), "weight": ("c_fc.weight", "up_proj.weight")}
    names = name.get(where, ("wte.weight", "embed_tokens.weight"))
    for parameter_name, parameter in half.named_parameters():
        if parameter_name.endswith(names):
            parameter.data[..., 0] = float("nan")
    assert accelerate(half)
    computed = adapted(half, ["all-linear"])
    losses = ResponseLosses(computed)(collate(examples(), 0))
    assert losses.isnan().all()


# -------------------------------------------------------------------------------------- what is not fused


@compiled
@pytest.mark.usefixtures("products_everywhere")
@pytest.mark.parametrize("width", [128, 272])  # too small to pay; heads of 68
def test_models_that_do_not_fit_stay_as_they_are(width: int) -> None:
    half = in_bfloat16(exact_model("gpt2", width=width))
    kinds = [type(module) for module in half.modules()]
    assert not accelerate(half)
    assert kinds == [type(module) for module in half.modules()]
    assert half.config._attn_implementation == "eager"


@compiled
@pytest.mark.usefixtures("products_everywhere")
def test_a_stream_that_is_not_float32_and_float32_models_stay_as_they_are() -> None:
    exact = exact_model("gpt2")
    assert not accelerate(exact)
    assert not accelerate(exact.to(torch.bfloat16))


@compiled
@pytest.mark.usefixtures("products_everywhere")
@pytest.mark.parametrize("lacking", ["compiler", "oneDNN"])
def test_without_a_compiler_or_library_a_model_has_the_old_path(lacking: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if lacking == "compiler":
        monkeypatch.setattr(gradsift.cpu, "available", lambda: False)
    else:
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    plain, half = (in_bfloat16(exact_model("llama")) for _ in range(2))
    half.set_attn_implementation("sdpa")
    prepare(half, ComputeConfig(precision="bfloat16", device="cpu"))
    assert not is_accelerated(half)
    assert torch.equal(logits(half, ids_of(2, 9)), logits(plain, ids_of(2, 9)))


@compiled
@pytest.mark.usefixtures("products_everywhere")
def test_weights_that_are_spread_over_processes_are_not_packed() -> None:
    compute = ComputeConfig(precision="bfloat16", device="cpu", devices=2, strategy="fsdp")
    half = in_bfloat16(exact_model("llama"))
    prepare(half, compute)
    assert not is_accelerated(half)
    prepare(half, ComputeConfig(precision="bfloat16", device="cpu"))
    assert is_accelerated(half)


@compiled
@pytest.mark.usefixtures("products_everywhere")
def test_gpt2s_dropout_and_other_activations_keep_their_own_mlp() -> None:
    exact, plain, quick = models("gpt2", activation_function="relu")
    ids = ids_of(2, 9)
    assert error(logits(quick, ids), logits(exact, ids)) < 1.2 * error(logits(plain, ids), logits(exact, ids)) + 1e-4
    _, _, quick = models("gpt2")
    assert not torch.equal(logits(quick.train(), ids), logits(quick, ids))


# ------------------------------------------------------------------------------------------------ the seam


@compiled
@pytest.mark.usefixtures("products_everywhere")
@pytest.mark.parametrize("architecture", KNOWN)
@pytest.mark.parametrize("kernels_option", ["auto", "off"])
def test_the_numerics_of_a_model_are_known_before_it_is_loaded(architecture: str, kernels_option: str) -> None:
    compute = ComputeConfig(precision="bfloat16", device="cpu", kernels=kernels_option)
    half = in_bfloat16(exact_model(architecture))
    prepare(half, compute)
    assert numerics_of(half) == expected_numerics(half.config, compute, ModelConfig(kind="nano"))
    assert (numerics_of(half)["kernels"] == "off") is (kernels_option == "off")


def test_nothing_of_the_package_is_imported_where_kernels_are_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """`test_imports` has the law for the modules that every run loads."""
    monkeypatch.setitem(sys.modules, "gradsift.cpu", None)  # as if the folder was not there
    compute = ComputeConfig(precision="bfloat16", device="cpu", kernels="off")
    assert expected_numerics(nano_config("gpt2"), compute, ModelConfig(kind="nano"))["kernels"] == "off"


def test_another_source_or_flag_is_another_version(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    versions = {module.version()}
    monkeypatch.setattr(module, "_FLAGS", [*module._FLAGS, "-g"])
    versions.add(module.version())
    edited = tmp_path / "kernels.cpp"
    edited.write_text(module._SOURCE.read_text(encoding="utf-8") + "// edited", encoding="utf-8")
    monkeypatch.setattr(module, "_SOURCE", edited)
    versions.add(module.version())
    assert len(versions) == 3
