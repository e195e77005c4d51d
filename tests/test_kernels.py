"""Every compiled kernel against a slow twin in torch: values, gradients, extremes, odd sizes and wrong calls."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from gradsift.errors import GradsiftError
from gradsift.training import kernels as module
from gradsift.training.frozen import Packed
from gradsift.training.kernels import are_there, kernels

pytestmark = pytest.mark.usefixtures("one_thread")
compiled = pytest.mark.skipif(not are_there(), reason="kernels.cpp cannot be compiled here")
NAN, INF = float("nan"), float("inf")
BOTH = pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


def ops() -> Any:
    return kernels()


def normal(*shape: int, precision: torch.dtype = torch.float32, scale: float = 1.0, seed: int = 0) -> torch.Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(precision)


def near(found: torch.Tensor, expected: torch.Tensor, *, slack: float = 1) -> None:
    """To a few ulps in float32; in bfloat16 to its rounding, as all between is float32."""
    fine = found.dtype == torch.float32
    rtol, atol = (1e-6, 1e-6) if fine else (2**-8, 1e-5)
    torch.testing.assert_close(
        found.double(), expected.double(), rtol=rtol * slack, atol=atol * slack, equal_nan=True, check_dtype=False
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
    for found, twin in zip(ops().gelu(x), (expected, slope), strict=True):
        near(found, twin)


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


def packed(inputs: int, outputs: int, bias: bool = True) -> tuple[Packed, torch.Tensor, torch.Tensor | None]:
    weight = normal(inputs, outputs, scale=inputs**-0.5, precision=torch.bfloat16, seed=5)
    vector = normal(outputs, precision=torch.bfloat16, seed=6) if bias else None
    return Packed(weight, vector), weight, vector


ROWS = pytest.mark.parametrize("rows", [1, 31, 32, 33, 161])


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
    near(ops().product_times(backprops, layer.back, factor), product * factor.double(), slack=3)
    inner = (x.double() @ weight.double() + offset).bfloat16()
    y, slope = ops().product_gelu(x, layer.forth, vector, 48)
    for found, twin in zip((y, slope), ops().gelu(inner), strict=True):
        near(found, twin, slack=8)  # of a product whose last bit may be another


@compiled
def test_products_of_rows_that_do_not_lie_side_by_side() -> None:
    layer, _, _ = packed(64, 48)
    x = normal(40, 64, precision=torch.bfloat16)
    wide = torch.cat([x, x], 1)
    expected = layer.outputs(x)
    assert torch.equal(layer.outputs(wide[:, :64]), expected)
    assert torch.equal(layer.outputs(x.t().contiguous().t()), expected)
    assert torch.equal(layer.outputs(x[:1].expand(40, -1)), expected[:1].expand(40, -1))


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
    found = ops().cross_entropy_(logits, targets, chosen, vocabulary, wants_gradient)
    near(found, expected, slack=2)
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
    found = ops().cross_entropy_(logits, torch.full((len(rows),), 17), chosen, 20, True)
    # 1e4 is 9,984 in bfloat16
    torch.testing.assert_close(
        found, expected, rtol=1e-6 if precision == torch.float32 else 2e-3, atol=1e-6, equal_nan=True
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
    """(B, T, H, E) and the logarithms of the sums, (B, H, T)."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    later = torch.ones(q.shape[2], q.shape[2]).triu(1).bool()
    scores = (q @ k.transpose(2, 3) * scale).masked_fill(later, -INF)
    return (scores.softmax(3) @ v).transpose(1, 2), scores.logsumexp(3)


def turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x (B, H, T, E) by the angles (T, E) of its tokens, one pair (i, i + E / 2) at a time."""
    half = x.shape[-1] // 2
    found = torch.empty_like(x)
    for i in range(half):
        a, b = x[..., i], x[..., i + half]
        found[..., i] = a * cos[:, i] - b * sin[:, i]
        found[..., i + half] = b * cos[:, i + half] + a * sin[:, i + half]
    return found


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
    found = ops().attend_backward(backprops, q, k, v, out, lse, scale, *angles)
    rtol = 1e-6 if q.dtype == torch.float32 else 4e-3  # `out`, which the backward pass reads, is rounded too
    for to_x, twin in zip(found, gradients, strict=True):
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
    for found, expected in zip(ops().attend(*parts, 0.2), (out, lse), strict=True):
        assert torch.equal(found, expected)
    expected = ops().attend_backward(out, q, k, v, out, lse, 0.2)
    for found, twin in zip(ops().attend_backward(out, *parts, out, lse, 0.2), expected, strict=True):
        assert torch.equal(found, twin)
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
        for found, twin in zip(everything(), expected, strict=True):
            assert torch.equal(found, twin)


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
    layer, _, _ = packed(32, 16)
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
    yield "product: x", lambda: layer.outputs(torch.zeros(2, 16, dtype=torch.bfloat16))
    yield "product: x in float32", lambda: layer.outputs(x)
    yield "product: x of three", lambda: layer.outputs(half[None])
    yield "product: width", lambda: ops().product(half, layer.forth, None, 32)
    yield "product: bias", lambda: ops().product(half, layer.forth, torch.zeros(8, dtype=torch.bfloat16), 16)
    yield "product: not packed", lambda: ops().product(half, torch.zeros(16, 32, dtype=torch.bfloat16), None, 16)
    yield "product_times: rows", lambda: ops().product_times(half, layer.forth, half[:1, :16].contiguous())
    yield "product_times: width", lambda: ops().product_times(half, layer.forth, half)
    yield "product_times: vector", lambda: ops().product_times(half, layer.forth, half[0])
    yield "product_gelu: width", lambda: ops().product_gelu(half, layer.forth, None, 32)
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


@compiled
def test_wrong_calls_raise_and_read_nothing() -> None:
    accepted = []
    for name, call in wrong_calls():
        try:
            call()
        except (RuntimeError, IndexError):
            continue
        accepted.append(name)
    assert not accepted


# ---------------------------------------------------------------------------------- where they cannot be


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Nothing is known of the compiler yet; an empty cache folder. None of these tests may load what it compiles."""
    are_there.cache_clear()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CXX", raising=False)
    yield tmp_path
    are_there.cache_clear()


def compiler_that(folder: Path, script: str) -> str:
    file = folder / "compiler"
    file.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    file.chmod(file.stat().st_mode | stat.S_IXUSR)
    return str(file)


def test_no_compiler_is_said_once(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CXX", str(fresh / "nowhere"))
    assert not are_there()
    assert not are_there()
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
    assert not are_there()
    assert "a.cpp:1: error: no such flag" in caplog.messages[-1]
    assert "In file included" not in caplog.text
    left = [path.name for path in (fresh / "cache" / "gradsift").iterdir() if path.suffix != ".lock"]
    assert not left


def test_a_compiler_that_fails_in_silence_and_one_that_makes_no_library(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for script in ("exit 3", "exit 0", 'for last; do [ "$before" = -o ] && echo junk > "$last"; before=$last; done'):
        are_there.cache_clear()
        monkeypatch.setenv("CXX", compiler_that(fresh, script))
        assert not are_there()
        assert "cannot be compiled or loaded" in caplog.messages[-1]


def test_a_cache_folder_that_cannot_be_written(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (fresh / "file").write_text("", encoding="utf-8")
    monkeypatch.setenv("XDG_CACHE_HOME", str(fresh / "file"))
    assert not are_there()
    assert "cannot be compiled or loaded" in caplog.text


def test_a_user_without_a_home(fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", no_home)
    assert not are_there()
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
from gradsift.training import kernels
torch.ops.load_library = lambda path: open(path).close()
assert kernels.are_there(), "not there"
"""


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
