"""How a fast computation is held against an exact one, whatever the processor, threads or libraries."""

from __future__ import annotations

import torch


def assert_close_by_norm(fast: torch.Tensor, exact: torch.Tensor, k: float) -> None:
    """Require |fast - exact| <= k * eps * |exact| in the Euclidean norm over all elements.

    An element near zero may be off by any factor of its own size, because the terms that cancel in it are rounded to
    eps of *their* size. The norm of the whole tensor is not, so its bound holds on every processor.

    Args:
        fast: any shape; its dtype gives eps.
        exact: the same shape, computed in float64.
        k: roundings that add up: about the square root of the number of terms in a sum, times the layers.
    """
    assert exact.dtype == torch.float64, "the exact result must be computed in float64"
    assert fast.shape == exact.shape, f"shapes differ: {tuple(fast.shape)} and {tuple(exact.shape)}"
    error, size = float((fast.double() - exact).norm()), float(exact.norm())
    bound = k * torch.finfo(fast.dtype).eps * size
    assert error <= bound, (
        f"off by {error / size if size else error:.2e} of the norm, at most {bound / (size or 1):.2e}"
    )
