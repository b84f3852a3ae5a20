"""Compress, then merge."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from benchmarks.accuracy.ctm import registered, shared_directions

from coremerge import Adapter, LowRank, Recipe, merge


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    with registered():
        yield


@pytest.fixture
def adapters() -> dict[str, Adapter]:
    torch.manual_seed(0)
    made = {name: LowRank(torch.randn(20, 4).double(), torch.randn(4, 30).double()) for name in "abc"}
    return {name: Adapter.from_updates({"one": update, "two": 2 * update}) for name, update in made.items()}


def test_nothing_is_lost_at_full_rank(adapters: dict[str, Adapter]) -> None:
    merged = merge(adapters, Recipe(method="sum", space="ctm:rank=12", scale=1.0, dtype="float64")).adapter
    for name in merged:
        expected = sum(adapter[name].dense() for adapter in adapters.values())
        torch.testing.assert_close(merged[name].dense(), expected)


def test_the_result_has_its_rank(adapters: dict[str, Adapter]) -> None:
    report = merge(adapters, Recipe(method="ties", space="ctm:rank=5")).report
    assert {module.rank for module in report.modules.values()} == {5}


def test_the_directions_are_those_that_hold_most() -> None:
    torch.manual_seed(1)
    cores = [torch.randn(6, 7).double() for _ in range(3)]
    left, right = shared_directions(cores, 2)
    assert torch.allclose(left.mT @ left, torch.eye(2).double()) and torch.allclose(
        right.mT @ right, torch.eye(2).double()
    )

    def kept(left: torch.Tensor, right: torch.Tensor) -> float:
        return sum(float((left.mT @ core @ right).square().sum()) for core in cores)

    best = kept(left, right)
    assert best > kept(torch.linalg.svd(sum(cores))[0][:, :2], torch.linalg.svd(sum(cores))[2][:2].mT)
    for scale in (1e-3, 1e-1):
        near = [torch.linalg.qr(x + scale * torch.randn_like(x)).Q for x in (left, right)]
        assert kept(*near) <= best * (1 + 1e-4)
