"""The measure that other laws use can fail."""

from __future__ import annotations

import pytest
import torch
from exactness import assert_close_by_norm


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
