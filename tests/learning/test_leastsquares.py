"""Least squares in core space against the formulas, large and dense."""

from __future__ import annotations

import pytest
import torch

from coremerge.learning.leastsquares import (
    Demand,
    Metric,
    Sums,
    allot,
    cut,
    demands,
    gains,
    lost,
    means_of,
    metric,
    pull,
    regmean,
    relative,
    router,
    shared,
    solve,
    weights_of,
)
from tolerances import DOUBLE, SINGLE

P, Q = 5, 4


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def spd(size, seed):
    x = randn(size, size + 2, seed=seed)
    return x @ x.T / size


@pytest.fixture
def asked():
    listed = []
    for seed in range(3):
        z, y = randn(30, Q, seed=10 + seed), randn(30, P, seed=20 + seed)
        given = spd(P, 30 + seed)
        listed.append(Demand(metric(randn(P, 3, seed=seed)), z.T @ z / 30, y.T @ z / 30, y.T @ y / 30, given))
    return listed


def objective(asked, core, prior, ridge):
    inputs = sum(d.zz for d in asked)
    return sum(d.residual(core) for d in asked) + ridge * inputs.diagonal().mean() * (core - prior).square().sum()


def test_the_solution_is_that_of_the_normal_equations(asked):
    prior, ridge = randn(P, Q, seed=5), 0.7
    rho = ridge * sum(d.zz for d in asked).diagonal().mean()
    system = sum(torch.kron(d.metric.dense(), d.zz) for d in asked) + rho * torch.eye(P * Q)
    wanted = sum(d.metric @ d.yz for d in asked) + rho * prior
    expected = torch.linalg.solve(system, wanted.reshape(-1)).reshape(P, Q)
    assert pull(asked, ridge, Q) == pytest.approx(float(rho))
    found = solve(asked, prior, float(rho))
    assert torch.allclose(found, expected, rtol=SINGLE, atol=DOUBLE)  # by eigenvectors, and of a system of 20 unknowns
    for seed in range(5):
        assert objective(asked, found + 1e-3 * randn(P, Q, seed=seed), prior, ridge) > objective(
            asked, found, prior, ridge
        )


def test_without_a_ridge_what_no_input_shows_stays_as_the_prior():
    z = randn(20, Q)
    z[:, -1] = 0
    core, prior = randn(P, Q, seed=1), randn(P, Q, seed=2)
    y = z @ core.T
    found = solve([Demand(Metric.plain(P), z.T @ z, y.T @ z, y.T @ y, spd(P, 1))], prior, 0.0)
    assert torch.allclose(found[:, :-1], core[:, :-1], atol=1e-5)  # singular: known to the root of rounding
    assert torch.allclose(found[:, -1], prior[:, -1])


def test_without_anything_that_comes_in_the_prior_stays():
    nothing = Demand(metric(randn(P, 3)), torch.zeros(Q, Q), torch.zeros(P, Q), spd(P, 1), spd(P, 2))
    prior = randn(P, Q)
    assert torch.equal(solve([nothing], prior, 0.3), prior) and torch.equal(solve([], prior, 0.3), prior)


def test_residuals_are_those_over_the_tokens(asked):
    z, y, core, size = randn(30, Q, seed=10), randn(30, P, seed=20), randn(P, Q, seed=3), asked[0].metric.dense()
    rest = z @ core.T - y
    assert asked[0].residual(core) == pytest.approx(float(torch.einsum("ti,ij,tj->", rest, size, rest)) / 30)
    assert relative(asked, torch.zeros(P, Q, dtype=torch.float64)) == pytest.approx(1.0)
    assert relative([], core) == 0.0


def test_sums_add_up_over_batches_and_parts():
    z, y = randn(20, Q), randn(20, P, seed=1)
    whole, parts = Sums.zero(P, Q), [{"a": Sums.zero(P, Q)} for _ in range(2)]
    whole += Sums.of(z, y, y)
    for i, part in enumerate(parts):
        part["a"] += Sums.of(z[i::2].float(), y[i::2].float(), y[i::2].float())
    added = shared(parts)["a"]
    assert added.count == whole.count == 20
    assert torch.equal(whole.oo, whole.yy)
    for name in ("zz", "yz", "yy", "o", "oo"):
        assert torch.allclose(getattr(added, name), getattr(whole, name), rtol=SINGLE, atol=SINGLE)


def test_demands_weigh_each_task_by_what_it_asks():
    sums = {"large": Sums.zero(P, Q), "small": Sums.zero(P, Q), "none": Sums.zero(P, Q)}
    sums["large"] += Sums.of(randn(20, Q), 10 * randn(20, P, seed=1), 0.1 * randn(20, P, seed=4))
    sums["small"] += Sums.of(randn(10, Q, seed=2), randn(10, P, seed=3), 0.1 * randn(10, P, seed=5))
    metrics = {name: metric(randn(P, P, seed=i)) for i, name in enumerate(sums)}
    asked = demands(sums, metrics, weights_of(means_of(sums, metrics), {}))
    assert len(asked) == 2 and [d.largest for d in asked] == pytest.approx([1.0, 1.0])
    for demand in asked:
        values = torch.linalg.eigvals(demand.metric.dense() @ demand.yy).real
        assert demand.largest == pytest.approx(float(values.max()))
        assert demand.size == pytest.approx(float(values.sum()))
    means = means_of(sums, metrics)
    assert weights_of(means, {"large": 3, "small": 0}) == {
        "large": pytest.approx(3 / means["large"].largest),
        "small": 0,
    }
    (only,) = demands(sums, metrics, weights_of(means, {"large": 3, "small": 0}))
    assert only.largest == pytest.approx(3.0)
    assert weights_of({"a": asked[0] * 0.0}, {}) == {"a": 1.0}


def test_what_is_small_beside_what_the_module_gives_counts_no_more_for_being_a_large_part_of_what_is_asked():
    sums = {"asks": Sums.zero(P, Q), "asks little": Sums.zero(P, Q)}
    for seed, (task, share) in enumerate({"asks": 1.0, "asks little": 1e-3}.items()):
        sums[task] += Sums.of(
            randn(20, Q, seed=seed), share * randn(20, P, seed=seed + 2), 5 + 3 * randn(20, P, seed=seed + 4)
        )
    metrics = {"asks": metric(randn(P, P)), "asks little": Metric.plain(P)}
    found = weights_of(means_of(sums, metrics), {})
    plain = 3 * randn(20, P, seed=5)
    wanted = 0.2 * torch.linalg.eigvalsh(torch.cov(plain.T, correction=0))[-1]
    assert found["asks little"] == pytest.approx(1 / float(wanted))
    assert found["asks"] == pytest.approx(1 / means_of(sums, metrics)["asks"].largest, rel=0.9)


@pytest.mark.parametrize("unit", [1e-3, 1.0, 1e3])
def test_where_nothing_varies_a_task_that_asks_nothing_does_not_outweigh_the_others(unit):
    sums = {"asks": Sums.zero(P, Q), "asks nothing": Sums.zero(P, Q)}
    sums["asks"] += Sums.of(randn(1, Q), unit * randn(1, P, seed=1), randn(1, P, seed=2))
    sums["asks nothing"] += Sums.of(randn(1, Q), torch.zeros(1, P), randn(1, P, seed=2))
    found = weights_of(means_of(sums, dict.fromkeys(sums, Metric.plain(P))), {})
    assert found["asks nothing"] == pytest.approx(200 * found["asks"])


def test_the_metric_counts_what_the_adapter_writes():
    direction = randn(P, 1)
    found = metric(direction, aside=0.1, soft=1e-2).dense()
    unit = direction / direction.norm()
    assert float(unit.T @ found @ unit) == pytest.approx(0.1 + 0.9 / 1.01)
    across = randn(P, 1, seed=9)
    across -= unit @ (unit.T @ across)
    assert torch.allclose(found @ across, 0.1 * across)
    assert torch.equal(metric(torch.zeros(P, 2, dtype=torch.float64)).dense(), torch.eye(P, dtype=torch.float64))


@pytest.mark.parametrize("aside", [0.0, 0.2, 1.0])
def test_a_metric_is_what_its_matrix_is(aside):
    found = metric(torch.cat([randn(P, 2), torch.zeros(P, 1)], 1).double(), aside=aside)
    dense, x, y = found.dense(), randn(P, Q, seed=1), randn(P, Q, seed=2)
    assert torch.allclose(found @ x, dense @ x)
    assert found.between(x, y) == pytest.approx(float((x.T @ dense @ y).trace()))
    assert found.of(x @ x.T) == pytest.approx(float((dense @ x @ x.T).trace()))
    root = found.root().dense()
    assert torch.allclose(root @ root, dense)
    assert torch.equal(Metric.plain(P).dense(), torch.eye(P, dtype=torch.float64))


def test_a_cut_in_the_inputs_metric_is_what_a_numerical_optimiser_finds(asked):
    core, rank = randn(P, Q, seed=4), 2
    inputs = sum(d.zz for d in asked)
    inputs = inputs + 1e-2 * 0.5 * inputs.diagonal().mean() * torch.eye(Q)
    left, right = randn(P, rank, seed=6).requires_grad_(), randn(rank, Q, seed=7).requires_grad_()

    def loss(found):
        return ((found - core) @ inputs * (found - core)).sum()

    optimizer = torch.optim.LBFGS([left, right], max_iter=2000, tolerance_grad=1e-12, tolerance_change=1e-16)

    def step():
        optimizer.zero_grad()
        value = loss(left @ right)
        value.backward()
        return value

    optimizer.step(step)
    found = cut(asked, core, rank, 0.5)
    assert torch.linalg.matrix_rank(found) == rank
    assert float(loss(found)) == pytest.approx(float(loss(left @ right).detach()), rel=1e-6)
    u, s, v = torch.linalg.svd(core, full_matrices=False)
    assert loss(found) < loss(u[:, :rank] * s[:rank] @ v[:rank])
    assert torch.equal(cut(asked, core, Q, 0.5), core)


def test_the_router_is_its_formula():
    factors = {"a": (randn(P, 2), randn(2, Q, seed=1)), "b": (randn(P, 3, seed=2), randn(3, Q, seed=3))}
    moments = {"a": spd(Q, 1), "b": spd(Q, 2)}
    rights = torch.cat([factors["a"][1], factors["b"][1]])
    grams = {task: (g := rights @ m @ rights.T) / g.trace() for task, m in moments.items()}
    wanted = torch.zeros(5, 5, dtype=torch.float64)
    wanted[:2], wanted[2:] = grams["a"][:2], grams["b"][2:]
    whole = grams["a"] + grams["b"]
    mixed = wanted @ torch.linalg.inv(whole + 0.1 * whole.diagonal().mean() * torch.eye(5))
    expected = torch.cat([factors["a"][0], factors["b"][0]], 1) @ mixed @ rights
    assert torch.allclose(router(moments, factors, 0.1), expected)
    assert torch.allclose(router({}, factors, 0.1), torch.cat([f[0] for f in factors.values()], 1) @ rights)


def test_regmean_is_its_formula():
    factors = {"a": (randn(P, 2), randn(2, Q, seed=1)), "b": (randn(P, 3, seed=2), randn(3, Q, seed=3))}
    moments = {"a": spd(Q, 1), "b": spd(Q, 2), "lacks it": spd(Q, 3)}
    whole = moments["a"] + moments["b"]
    wanted = sum(factors[k][0] @ factors[k][1] @ moments[k] for k in "ab")
    expected = wanted @ torch.linalg.inv(whole + 0.1 * whole.diagonal().mean() * torch.eye(Q))
    assert torch.allclose(regmean(moments, factors, 0.1), expected)
    assert torch.allclose(
        regmean({}, factors, 0.1),
        torch.cat([f[0] for f in factors.values()], 1) @ torch.cat([f[1] for f in factors.values()]),
    )


def test_gains_are_what_a_cut_loses(asked):
    core = randn(P, Q, seed=4)
    shares = gains(asked, core, 0.0)
    inputs, size = sum(d.zz for d in asked), sum(d.size for d in asked)
    for rank in (1, 2, 3):
        rest = core - cut(asked, core, rank, 0.0)
        assert float((rest @ inputs * rest).sum()) / size == pytest.approx(float(shares[rank:].sum()), rel=1e-5)
        assert lost(shares, rank) == pytest.approx(float(shares[rank:].sum() / shares.sum()))
    assert lost(shares, None) == lost(shares, Q) == lost(torch.zeros(3), 1) == 0.0
    assert lost(torch.tensor([1.0, 1e-30]), 1) == 0.0  # rounding


def test_a_budget_goes_to_the_largest_shares():
    shares = {
        "a": torch.tensor([9.0, 5.0, 4.0, 0.1]),
        "b": torch.tensor([0.3, 0.2, 0.1]),
        "c": torch.tensor([1.0, 0.9]),
    }
    assert allot(shares, 1) == {"a": 1, "b": 1, "c": 1}
    assert allot(shares, 2) == {"a": 3, "b": 1, "c": 2}
    assert allot(shares, 99) == {"a": 4, "b": 3, "c": 2}
    assert allot(shares, 2, 2) == {"a": 2, "b": 2, "c": 2}
    assert allot(shares, 1, 1) == allot(shares, 1)
