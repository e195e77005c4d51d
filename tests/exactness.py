"""How a fast computation is held against an exact one, whatever the processor, threads or libraries."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import peft
import torch
from torch.overrides import TorchFunctionMode

from gradsift.training import lora

Values = torch.Tensor | np.ndarray


def assert_close_by_norm(
    fast: Values, exact: Values, k: float, dim: int | tuple[()] | None = None, dtype: torch.dtype | None = None
) -> None:
    """Require |fast - exact| <= k * eps * |exact| in the Euclidean norm.

    An element near zero may be off by any factor of its own size, because the terms that cancel in it are rounded to
    eps of *their* size. The norm of the whole tensor is not, so its bound holds on every processor.

    Args:
        fast: any shape.
        exact: the same shape, computed in float64.
        k: roundings that add up: about the square root of the number of terms in a sum, times the layers.
        dim: over which norms are taken: None for all elements together, -1 for each row by itself, () for each
            element. The last is for what is a norm itself, or a sum of terms of one sign: nothing cancels in it.
        dtype: gives eps: what the fast result was computed in. None for the dtype in which it is kept.
    """
    fast, exact = (torch.tensor(v) if isinstance(v, np.ndarray) else v.detach() for v in (fast, exact))
    assert exact.dtype == torch.float64, "the exact result must be computed in float64"
    assert fast.shape == exact.shape, f"shapes differ: {tuple(fast.shape)} and {tuple(exact.shape)}"
    off = fast.double() - exact
    error, size = (v.abs() if dim == () else torch.linalg.vector_norm(v, dim=dim) for v in (off, exact))
    roundings = torch.finfo(dtype or fast.dtype).eps * size
    within = error <= k * roundings
    worst = (error / roundings)[~within].max() if not within.all() else 0
    assert within.all(), f"off by {worst:.4g} roundings of the norm, at most {k:g} ({int((~within).sum())} norms)"


def exact_copy(model: Any) -> Any:
    """A copy of a float32 model that computes in float64 throughout, through peft's own layers."""
    exact = copy.deepcopy(model)
    for _, layer in lora.lora_layers(exact):
        layer.__class__ = peft.tuners.lora.Linear
    exact.__class__ = _in_float64(type(exact))
    return exact.double()


def _in_float64(kind: Any) -> type:
    @functools.wraps(kind.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        with float64():
            return kind.forward(self, *args, **kwargs)

    return type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})


@contextmanager
def float64() -> Iterator[None]:
    """Compute in float64 what asks for float32.

    Norms, softmaxes and rotary angles of transformers do so whatever the dtype of the model.
    """
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Widened():
            yield
    finally:
        torch.set_default_dtype(default)


class _Widened(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        args = (torch.float64 if value is torch.float32 else value for value in args)
        kwargs = {key: torch.float64 if value is torch.float32 else value for key, value in (kwargs or {}).items()}
        return func(*args, **kwargs)
