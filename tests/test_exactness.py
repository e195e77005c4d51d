"""The measure that other laws use can fail."""

from __future__ import annotations

import pytest
import torch
from exactness import assert_close_by_norm, exact_copy
from test_norms import adapted_model

pytestmark = pytest.mark.numerics


def test_an_error_of_more_than_k_roundings_is_refused() -> None:
    exact = torch.linspace(-1, 1, 101, dtype=torch.float64)
    assert_close_by_norm(exact.float(), exact, k=1)
    with pytest.raises(AssertionError, match="of the norm"):
        assert_close_by_norm((exact * (1 + 1e-5)).float(), exact, k=64)


def test_an_oracle_in_float32_and_other_shapes_are_refused() -> None:
    with pytest.raises(AssertionError, match="float64"):
        assert_close_by_norm(torch.ones(3), torch.ones(3), k=1)
    with pytest.raises(AssertionError, match="shapes differ"):
        assert_close_by_norm(torch.ones(3), torch.ones(3, 1, dtype=torch.float64), k=1)


def test_what_is_not_a_number_is_refused() -> None:
    with pytest.raises(AssertionError):
        assert_close_by_norm(torch.tensor([float("nan")]), torch.ones(1, dtype=torch.float64), k=1e9)


def test_a_norm_of_each_element_or_row_sees_what_the_norm_of_all_hides() -> None:
    exact = torch.tensor([[1e3, 0.0], [1.0, 0.0]], dtype=torch.float64)
    fast = (exact + torch.tensor([[0.0, 0.0], [1e-4, 0.0]])).float()
    assert_close_by_norm(fast, exact, k=2)
    for dim in (-1, ()):
        assert_close_by_norm(exact.float(), exact, k=1, dim=dim)
        with pytest.raises(AssertionError, match=r"\(1 norms\)"):
            assert_close_by_norm(fast, exact, k=2, dim=dim)


def test_eps_may_be_that_of_another_dtype_than_the_results() -> None:
    exact = torch.ones(3, dtype=torch.float64)
    assert_close_by_norm(exact + 1e-7, exact, k=1, dtype=torch.float32)
    with pytest.raises(AssertionError):
        assert_close_by_norm(exact + 1e-7, exact, k=1)


def test_an_exact_copy_computes_nothing_in_float32() -> None:
    """Doubling the weights is not enough: the RMS norm and the rotary angles of transformers stay in float32."""
    adapted, ids = adapted_model("llama", ["all-linear"]), torch.arange(9)[None]
    exact = exact_copy(adapted)
    logits = exact(input_ids=ids).logits
    assert_close_by_norm(adapted(input_ids=ids).logits, logits, k=64)
    error = (adapted.double()(input_ids=ids).logits - logits).norm() / logits.norm()
    assert error > 1e5 * torch.finfo(torch.float64).eps
    for parameter in exact.parameters():
        parameter.data.mul_(1 + 1e-12)
    change = (exact(input_ids=ids).logits - logits).norm() / logits.norm()
    assert 1e-14 < change < 1e-10  # what float32 cannot tell apart
    assert torch.get_default_dtype() == torch.float32
