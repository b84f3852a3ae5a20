"""Alignment and retention against dense formulas, and their laws."""

from __future__ import annotations

import pytest
import torch

from coremerge.diagnostics import align, align_module, retain, retain_module
from coremerge.diagnostics.alignment import subspace
from coremerge.lowrank import LowRank


def update(seed, m=9, n=7, r=3):
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.randn(*s, generator=generator, dtype=torch.float64) for s in ((m, r), (r, n)))
    return LowRank(left, right)


def dense_ratio(one, other):
    """SAR(i→j) = ‖U_k U_kᵀ Δ_i‖ / ‖Δ_i‖, U_k the fewest left singular vectors of Δ_j above 0.95."""
    u, s, _ = torch.linalg.svd(other.dense())
    k = next(k for k in range(1, len(s) + 1) if (s[:k].square().sum() / s.square().sum()).sqrt() > 0.95)
    return (u[:, :k] @ u[:, :k].T @ one.dense()).norm() / one.dense().norm()


def test_a_module_against_the_dense_formulas():
    updates = {"a": update(1), "b": update(2, r=5), "c": update(3, r=1)}
    found = align_module(updates)
    for i, one in enumerate(updates.values()):
        torch.testing.assert_close(found.norms[i], one.dense().norm())
        for j, other in enumerate(updates.values()):
            torch.testing.assert_close(found.inner[i, j], (one.dense() * other.dense()).sum())
            torch.testing.assert_close(found.ratio[i, j], dense_ratio(one, other))


def test_a_subspace_has_no_more_directions_than_it_needs():
    values = torch.tensor([3.0, 1.0, 0.1], dtype=torch.float64)  # √(9 / 10.01) = 0.948, √(10 / 10.01) = 0.9995
    svd = LowRank(torch.eye(3, dtype=torch.float64) * values, torch.eye(3, dtype=torch.float64)).svd
    assert subspace(svd).shape == (3, 2)
    assert subspace(svd, 0.9).shape == (3, 1)
    assert subspace(LowRank.zeros(3, 3).svd).shape == (3, 0)


def test_an_adapter_is_aligned_with_itself_whatever_its_factors():
    a = update(1, r=2)
    turn = torch.tensor([[2.0, 1.0], [0.0, 0.5]], dtype=torch.float64)
    same = LowRank(a.left @ turn, torch.linalg.inv(turn) @ a.right)
    found = align({"a": {"m": a}, "b": {"m": -3 * same}})
    torch.testing.assert_close(found.cosine[0, 1].item(), -1.0)
    torch.testing.assert_close(found.ratio[0, 1], found.ratio[0, 0])
    assert found.norms["b"] == pytest.approx(3 * found.norms["a"])


def test_adapters_are_compared_where_both_have_a_module():
    a = {"x": update(1), "y": update(2)}
    b = {"y": update(3), "z": update(4, 5, 5)}
    c = {"w": update(5)}
    seen = []
    found = align({"a": a, "b": b, "c": c}, threads=1, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert found.shared.tolist() == [[2, 1, 0], [1, 2, 0], [0, 0, 1]]
    one, other = a["y"].dense(), b["y"].dense()
    torch.testing.assert_close(found.cosine[0, 1], (one * other).sum() / one.norm() / other.norm())
    torch.testing.assert_close(found.cosine.diagonal(), torch.ones(3, dtype=torch.float64))
    assert found.cosine[0, 2].isnan()
    assert found.norms["a"] == pytest.approx((a["x"].norm() ** 2 + a["y"].norm() ** 2).sqrt().item())
    pairs = {(p["from"], p["to"]): p for p in found.to_dict()["pairs"]}
    assert pairs["a", "c"] == {
        "from": "a",
        "to": "c",
        "shared_modules": 0,
        "cosine": None,
        "subspace_alignment_ratio": None,
    }
    assert pairs["a", "b"]["cosine"] == found.cosine[0, 1].item()


def test_updates_of_another_shape_are_left_out():
    found = align({"a": {"x": update(1)}, "b": {"x": update(2, 4, 4)}})
    assert found.shared.tolist() == [[1, 0], [0, 0]]


def test_a_zero_update_is_aligned_with_nothing():
    zero = LowRank.zeros(9, 7)
    found = align_module({"a": update(1), "zero": zero})
    assert found.ratio[1].tolist() == [0, 0]
    assert found.ratio[0, 1] == 0


class TestRetention:
    def test_a_module_against_the_dense_formulas(self):
        merged, own = update(1, r=2), update(2)
        sums = retain_module(merged, own)
        u, _, vh = torch.linalg.svd(merged.dense())
        kept = u[:, :2].T @ own.dense() @ vh[:2].T
        assert sums.kept == pytest.approx(kept.square().sum().item())
        assert sums.inner == pytest.approx((own.dense() * merged.dense()).sum().item())
        assert sums.own == pytest.approx(own.dense().square().sum().item())
        assert sums.merged == pytest.approx(merged.dense().square().sum().item())

    def test_a_sum_keeps_all(self):
        a, b = {"x": update(1)}, {"x": update(2)}
        found = retain({"x": a["x"] + b["x"]}, {"a": a, "b": b})
        assert found["a"].energy == pytest.approx(1) and found["b"].energy == pytest.approx(1)

    def test_of_itself_everything(self):
        a = {"x": update(1), "y": update(2)}
        found = retain(a, {"a": a})["a"].to_dict()
        assert found == pytest.approx({"energy": 1, "cosine": 1, "projection": 1})

    def test_a_module_that_is_not_there_is_lost(self):
        a = {"x": update(1), "y": update(2)}
        found = retain({"x": a["x"]}, {"a": a})["a"]
        share = (a["x"].norm() ** 2 / (a["x"].norm() ** 2 + a["y"].norm() ** 2)).item()
        assert found.energy == pytest.approx(share)
        assert found.projection == pytest.approx(share)

    def test_nothing_is_kept_of_nothing(self):
        zero = {"x": LowRank.zeros(9, 7)}
        assert retain({"x": update(1)}, {"a": zero})["a"].to_dict() == {"energy": 1.0, "cosine": 0.0, "projection": 0.0}
        assert retain(zero, {"a": {"x": update(1)}})["a"].cosine == 0
