"""Compress, then merge."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given

import oracles
from coremerge.adapter import Adapter
from coremerge.lowrank import LowRank
from coremerge.merging import merge
from coremerge.recipe import Recipe
from coremerge.report.cuts import cuts_of
from coremerge.spaces import SPACES
from coremerge.spaces.ctm import shared_directions
from laws import close, largest, lowrank, merged, named, normal, orthogonal, regauged, run, stacks

GENERIC = ("plain", "same right", "same left")


def adapters(count: int = 3) -> list[LowRank]:
    return [lowrank(20, 30, 4, seed=s) * (1 + s) for s in range(count)]


@given(stacks(kinds=GENERIC, low=6, tasks=(2, 4)))
def test_it_is_its_oracle(updates: list[LowRank]) -> None:
    p, q, cores = oracles.ctm_space([u.dense() for u in updates], 3)
    for method in ("sum", "ties"):
        expected = p @ getattr(oracles, "sum_" if method == "sum" else method)(cores) @ q.T
        close(merged(updates, method=method, space="ctm:rank=3"), expected, largest(updates) * 4, tol=1e-3)


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_the_directions_are_those_that_hold_most(share: float) -> None:
    """More than the leading ones of either side alone, more than random ones, and no rotation of one side helps."""
    updates = adapters()
    dense = [u.dense() for u in updates]
    norms = torch.stack([x.norm() for x in dense])
    scaled = torch.stack([x / n * (share * n + (1 - share) * norms.mean()) for x, n in zip(dense, norms, strict=True)])
    space = SPACES.build(f"ctm:rank=5,share={share}")(updates)
    eye = LowRank(torch.eye(5).double(), torch.eye(5).double())
    whole = space.lift(eye, updates)
    p, q = whole.left, whole.right.mT
    close(p.T @ p, torch.eye(5).double(), tol=1e-8)
    close(q.T @ q, torch.eye(5).double(), tol=1e-8)

    def kept(left: torch.Tensor, right: torch.Tensor) -> float:
        return float((left.T @ scaled @ right).square().sum())

    u, v = oracles.thin(torch.cat(list(scaled), 1))[0][:, :5], oracles.thin(torch.cat(list(scaled), 0))[2][:5].T
    assert kept(p, q) >= kept(u, v) * (1 - 1e-9)
    for seed in range(5):
        near = torch.linalg.qr(p + 0.05 * normal(seed)(20, 5))[0], torch.linalg.qr(q + 0.05 * normal(seed)(30, 5))[0]
        assert kept(p, q) > max(kept(near[0], q), kept(p, near[1]))


def test_cores_are_the_updates_between_them() -> None:
    updates = adapters()
    space = SPACES.build("ctm:rank=5")(updates)
    whole = space.lift(LowRank(torch.eye(5).double(), torch.eye(5).double()), updates)
    for core, update in zip(space.cores, updates, strict=True):
        close(core.dense(), whole.left.T @ update.dense() @ whole.right.T, tol=1e-8)


def test_nothing_is_lost_at_full_rank() -> None:
    updates = adapters()
    close(merged(updates, method="sum", space="ctm"), sum(u.dense() for u in updates))
    assert run(named(updates), method="ties", space="ctm:rank=5").report.rank <= 5


def test_rotations_and_gauge_do_not_matter() -> None:
    updates = adapters()
    left, right = orthogonal(20, 1), orthogonal(30, 2)
    for method in ("tsv", "ties"):
        plain = merged(updates, method=method, space="ctm:rank=5")
        turned = merged([LowRank(left @ u.left, u.right @ right) for u in updates], method=method, space="ctm:rank=5")
        close(turned, left @ plain @ right, tol=1e-6)
        close(merged([regauged(u) for u in updates], method=method, space="ctm:rank=5"), plain, tol=1e-6)


@pytest.mark.parametrize("factor", [1e-80, -1e80])
def test_it_does_not_depend_on_scale(factor: float) -> None:
    updates = adapters()
    plain = merged(updates, method="ties", space="ctm:rank=5")
    close(merged([u * factor for u in updates], method="ties", space="ctm:rank=5") / factor, plain, tol=1e-8)


def test_a_batch_is_its_elements_though_each_ends_by_itself() -> None:
    many = {
        f"a{t}": Adapter.from_updates({str(i): lowrank(12, 15, 4, seed=10 * t + i) for i in range(6)}, name=f"a{t}")
        for t in range(3)
    }
    recipe = Recipe(method="ties", space="ctm:rank=4", scale=1.0)
    one, six = (merge(many, recipe, threads=1, batch=batch).adapter for batch in (1, 6))
    for name in one:
        close(six[name].dense(), one[name].dense(), tol=1e-8)


def test_what_is_kept_of_each_adapter_is_said() -> None:
    given = named(adapters())
    result = run(given, method="sum", space="ctm:rank=5", scale="auto")
    report, space = result.report, SPACES.build("ctm:rank=5")(adapters())
    for key, core, update in zip(given, space.cores, adapters(), strict=True):
        share = float(core.norm() ** 2 / update.norm() ** 2)
        assert report.input_kept[key] == pytest.approx(share, rel=1e-8) and share < 0.9
    module = report.modules["layer"]
    norms = [torch.linalg.matrix_norm(u.dense(), 2).item() for u in adapters()]
    assert module.input_norm == pytest.approx(sum(norms) / 3)  # of the whole updates, which the scale goes by
    assert result.plan.rank == 5
    (line,) = cuts_of("sum", {}, [], report.input_kept, space="ctm:rank=5")
    assert line.startswith("the space ctm keeps at most 5 directions on each side") and "a0" in line
    assert not list(cuts_of("sum", {}, [], run(given, method="sum", space="ctm").report.input_kept, space="ctm"))
    few = run(given, method="sum", space="ctm:rank=1").report
    assert any("the space ctm (rank=1) keeps less than 50%" in warning for warning in few.warnings)
    lifted = run(given, method="sum", space="ctm:rank=5", steps=["lift", "truncate:rank=2"]).report
    assert lifted.input_kept == pytest.approx(report.input_kept)


def test_zeros_and_nothing() -> None:
    zero = LowRank.zeros(6, 5)
    for some in ([zero], [zero, lowrank(6, 5, 2)], [0.0 * lowrank(6, 5, 2), lowrank(6, 5, 2)]):
        close(merged(some, method="sum", space="ctm:rank=4"), sum(u.dense() for u in some))
    left, right = shared_directions(torch.zeros(2, 3, 0, 4, dtype=torch.float64), 2)
    assert left.shape == (3, 0, 0) and right.shape == (3, 4, 2)
