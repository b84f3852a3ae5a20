"""The null-space ratio against an explicit projector, and its gradient against differences."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from coremerge.learning import null_space_ratio
from coremerge.learning.ratio import FLOOR, MeanRatios, mean_over, ratio_to_basis, row_basis


def oracle(x: Tensor, right: Tensor) -> Tensor:
    """‖z − Aᵀ(A Aᵀ)⁺ A z‖ / ‖z‖, token by token, in float64."""
    a = right.double()
    projector = a.T @ torch.linalg.pinv(a @ a.T) @ a
    z = x.double()
    return (z - z @ projector).norm(dim=-1) / z.norm(dim=-1)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(deadline=None)
@given(n=st.integers(2, 12), rank=st.integers(1, 6), seed=st.integers(0, 1000))
def test_it_is_the_projectors(n: int, rank: int, seed: int) -> None:
    x, right = normal(2, 5, n, seed=seed), normal(rank, n, seed=seed + 1)
    expected = oracle(x, right)
    torch.testing.assert_close(
        null_space_ratio(x, right), expected, rtol=1e-6, atol=3e-4
    )  # the floor's a quarter of 1e-3
    torch.testing.assert_close(null_space_ratio(x.float(), right.float()).double(), expected, rtol=1e-4, atol=2e-3)


@settings(deadline=None)
@given(scale=st.floats(1e-3, 1e3), seed=st.integers(0, 1000))
def test_neither_scale_nor_gauge_matters(scale: float, seed: int) -> None:
    x, right, mix = normal(4, 9, seed=seed), normal(3, 9, seed=seed + 1), normal(3, 3, seed=seed + 2) + 3 * torch.eye(3)
    expected = null_space_ratio(x, right)
    for other in (scale * right, mix @ right, torch.cat([right, right[:1]])):
        torch.testing.assert_close(null_space_ratio(x, other), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(null_space_ratio(scale * x, right), expected, rtol=1e-6, atol=1e-6)


def test_both_ends() -> None:
    right = torch.eye(2, 5)
    inside, outside = torch.tensor([3.0, -4.0, 0, 0, 0]), torch.tensor([0, 0, 1.0, 2.0, 3.0])
    assert null_space_ratio(torch.stack([inside, outside, 0 * inside]), right).tolist() == [0.0, 1.0, 1.0]
    assert null_space_ratio(outside, torch.zeros(2, 5)).item() == 1.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e4])
def test_it_is_never_nan(dtype: torch.dtype, size: float) -> None:
    right = normal(4, 16, seed=1).to(dtype)
    x = (torch.cat([normal(8, 4, seed=2).to(dtype) @ right, normal(8, 16, seed=3).to(dtype)]) * size).to(dtype)
    ratio = null_space_ratio(x.requires_grad_(), right)
    ratio.sum().backward()
    assert ratio.dtype == torch.float32
    assert all(0 <= value <= 1 for value in ratio.tolist())
    assert x.grad is not None and bool(x.grad.isfinite().all())
    with torch.autocast("cpu", torch.bfloat16):
        assert null_space_ratio(x, right).dtype == torch.float32


def test_the_gradient_is_that_of_differences() -> None:
    right = normal(3, 7, seed=1)
    x = normal(5, 7, seed=2).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: null_space_ratio(z, right), x, atol=1e-5)
    near = (normal(1, 3, seed=3) @ right + 1e-5 * normal(1, 7, seed=4)).requires_grad_()  # below the floor
    assert null_space_ratio(near, right).item() < FLOOR**0.5
    assert torch.autograd.gradcheck(lambda z: null_space_ratio(z, right), near, atol=1e-3, rtol=1e-2)


def test_padding_does_not_count() -> None:
    right, x = normal(3, 7, seed=1), normal(2, 4, 7, seed=2)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]])
    kept = torch.cat([x[0, :2], x[1, :3]])
    torch.testing.assert_close(null_space_ratio(x, right, mask), null_space_ratio(kept, right).mean())
    assert float(mean_over(x[..., 0], torch.zeros(2, 4))) == 0


def test_the_basis_has_the_numerical_rank() -> None:
    right = normal(3, 7, seed=1)
    basis = row_basis(torch.cat([right, right @ torch.eye(7).double() * 2]).float())
    assert basis.shape == (3, 7)
    torch.testing.assert_close(basis @ basis.T, torch.eye(3).double())


def test_means_are_over_tokens_however_they_are_shared_out():
    x, basis = torch.randn(6, 5, 8), row_basis(torch.randn(3, 8))
    mask = torch.arange(5) < torch.tensor([1, 5, 2, 0, 3, 4]).unsqueeze(1)
    whole, shared = MeanRatios(), MeanRatios()
    whole.add("x", x, basis, mask)
    for rows in (slice(0, 1), slice(1, 4), slice(4, 6)):
        shared.add("x", x[rows], basis, mask[rows])
    assert (
        shared.get("x") == pytest.approx(whole.get("x")) == pytest.approx(float(ratio_to_basis(x[mask], basis).mean()))
    )
    whole.add("y", x, basis, torch.zeros(6, 5))
    assert whole.get("y") is None and whole.get("z") is None
