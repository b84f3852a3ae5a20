"""Directions of inputs that no adapter reads."""

from __future__ import annotations

import torch

from coremerge.learning.beyond import Sketch, directions, drawn
from tolerances import DOUBLE

N, Q = 20, 3


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rows(seed=0):
    return torch.linalg.qr(randn(N, Q, seed=seed))[0].mT


def sketch(x, count=4):
    return Sketch.of(x, drawn(N, count))


def test_they_are_those_in_which_inputs_are_largest_outside_what_is_read():
    right, sizes = rows(), torch.tensor([9.0, 5.0, 3.0, 2.0], dtype=torch.float64)
    outside = torch.linalg.qr(torch.cat([right.mT, randn(N, 4, seed=1)], 1))[0][:, Q:].mT
    x = randn(500, Q, seed=2) @ right + (randn(500, 4, seed=3) * sizes) @ outside
    found = directions([sketch(x)], right, 2)
    assert found.shape == (2, N)
    assert torch.allclose(found @ found.mT, torch.eye(2, dtype=torch.float64), atol=DOUBLE)
    assert float((found @ right.mT).abs().max()) < 1e-10
    assert torch.allclose(
        (found @ outside.mT)[:, :2].abs().square().sum(1), torch.ones(2, dtype=torch.float64), atol=0.05
    )


def test_all_that_inputs_have_is_found_and_no_more():
    right = rows()
    x = randn(50, 2, seed=1) @ randn(2, N, seed=2) + randn(50, Q, seed=3) @ right
    found = directions([sketch(x, 100)], right, 100)
    assert len(found) == 2
    basis = torch.cat([right, found])
    assert torch.allclose(x @ basis.mT @ basis, x, atol=1e-8)


def test_tasks_count_alike_whatever_the_size_of_their_inputs():
    right = rows()
    outside = torch.linalg.qr(torch.cat([right.mT, randn(N, 2, seed=1)], 1))[0][:, Q:].mT
    large, small = (scale * randn(100, 1, seed=seed) @ outside[seed : seed + 1] for seed, scale in ((0, 1e3), (1, 1.0)))
    found = directions([sketch(large), sketch(small)], right, 2)
    assert torch.allclose((found @ outside.mT).square().sum(), torch.tensor(2.0, dtype=torch.float64))


def test_sketches_add_up_over_tokens_of_any_precision():
    x = randn(30, N)
    whole, parts = sketch(x), sketch(x[:10]) + sketch(x[10:])
    assert torch.allclose(whole.along, parts.along) and abs(whole.size - parts.size) < 1e-9
    half = sketch(x.bfloat16())
    assert half.along.dtype == torch.float64 and torch.allclose(half.along, whole.along, rtol=0.1, atol=2.0)


def test_large_inputs_are_seen_like_others():
    x, right = randn(30, N).float(), rows()
    small, large = (directions([sketch(scale * x)], right, 3) for scale in (1.0, 1e25))
    assert torch.allclose(small.mT @ small, large.mT @ large, atol=1e-4)


def test_nothing_comes_of_nothing():
    right = rows()
    assert len(directions([], right, 4)) == len(directions([sketch(torch.zeros(5, N))], right, 4)) == 0
    assert len(directions([sketch(randn(5, N))], right, 0)) == 0
    assert len(directions([sketch(torch.full((5, N), torch.inf))], right, 4)) == 0
    everything = torch.eye(N, dtype=torch.float64)
    assert len(directions([sketch(randn(50, N))], everything, 4)) == 0
