"""A first pass over all modules: the same for any order, threads, batches and executors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import oracles
from coremerge.adapter import Adapter
from coremerge.errors import ConfigError
from coremerge.lowrank import LowRank
from coremerge.merging import MergeResult, merge
from coremerge.methods import METHODS, Site
from coremerge.methods.largest import joined, tally
from coremerge.pipeline import merge_files
from coremerge.plan import make_plan
from coremerge.recipe import Recipe
from coremerge.surveying import surveyed
from laws import close, lowrank, make, normal
from posted import Posted
from tiny import make_adapter

SHAPES = {"a": (9, 7), "b": (9, 7), "c": (5, 12), "d": (9, 7)}
SIZES = {"a": 1.0, "b": 0.2, "c": 3.0, "d": 1.0}
WAYS = {"ties": {}, "magnitude": {}, "dare_ties": {"drop_rate": 0.3}}


def adapters(count: int = 3) -> dict[str, Adapter]:
    """Modules of different sizes; the last adapter lacks one."""
    return {
        f"a{t}": Adapter.from_updates(
            {
                name: lowrank(*shape, 2 + t % 2, seed=10 * t + i) * SIZES[name]
                for i, (name, shape) in enumerate(SHAPES.items())
                if (t, name) != (count - 1, "b")
            },
            name=f"a{t}",
        )
        for t in range(count)
    }


def run(given: dict[str, Adapter], method: str = "ties", **how: object) -> MergeResult:
    parameters = {"trim": "model", **WAYS.get(method, {}), **how.pop("parameters", {})}
    recipe = Recipe(**{"method": method, "scale": 1.0, **how.pop("recipe", {})}, parameters=parameters)
    return merge(given, recipe, **{"threads": 1, **how})


def entries_of(space: str, given: dict[str, Adapter]) -> dict[str, list[torch.Tensor]]:
    """Module → the cores of all adapters, dense, as the space makes them."""
    from coremerge.spaces import SPACES

    return {
        name: [
            x.dense()
            for x in SPACES.build(space)(
                [a[name] if name in a else LowRank.zeros(*shape) for a in given.values()]
            ).cores
        ]
        for name, shape in SHAPES.items()
    }


@pytest.mark.parametrize("space", ["full", "core", "knots"])
@pytest.mark.parametrize("density", [0.05, 0.3, 1.0])
def test_what_is_kept_is_the_largest_share_of_the_flattened_model(space: str, density: float) -> None:
    """By the published recipe: all entries of an adapter side by side, its largest ones kept, then TIES."""
    given = adapters()
    cores = entries_of(space, given)
    found = surveyed(
        make_plan(given, Recipe(method="ties", space=space, parameters={"trim": "model", "density": density}))
    )
    for t, (key, adapter) in enumerate(given.items()):
        flat = torch.cat([cores[name][t].flatten() for name in adapter])
        keep = round(density * len(flat))
        assert int((flat.abs() >= found.known[t]).sum()) == keep, key
        assert float(flat.abs().sort(descending=True).values[keep - 1]) == pytest.approx(found.known[t], rel=1e-10)


@pytest.mark.parametrize(("method", "density"), [("ties", 0.15), ("ties", 0.5), ("magnitude", 0.3)])
def test_the_merge_is_that_of_flattened_models(method: str, density: float) -> None:
    """The oracle of one matrix, given all modules of an adapter as one row."""
    given = {k: Adapter.from_updates(dict(a), name=k) for k, a in adapters(3).items() if k != "a2"}
    flat = [torch.cat([a[name].dense().flatten() for name in SHAPES]).unsqueeze(0) for a in given.values()]
    expected = getattr(oracles, method)(flat, density)
    found = run(given, method, recipe={"space": "full"}, parameters={"density": density}).adapter
    close(torch.cat([found[name].dense().flatten() for name in SHAPES]).unsqueeze(0), expected, tol=1e-8)


def test_modules_of_large_entries_keep_more_and_small_ones_less() -> None:
    given = adapters()
    alone = {"a0": given["a0"], "a1": Adapter.from_updates({n: LowRank.zeros(*SHAPES[n]) for n in SHAPES}, name="a1")}
    result = run(alone, "magnitude", recipe={"space": "full"}, parameters={"density": 0.3}).adapter
    kept = {name: int((result[name].dense().abs() > 1e-9).sum()) for name in SHAPES}
    sizes = {name: update.dense().numel() for name, update in given["a0"].items()}
    assert sum(kept.values()) == round(0.3 * sum(sizes.values()))
    assert kept["c"] / sizes["c"] > 2 * kept["a"] / sizes["a"] > 4 * kept["b"] / sizes["b"]
    for method in WAYS:
        whole, each = run(given, method), run(given, method, parameters={"trim": "module"})
        assert all((whole.adapter[name].dense() - each.adapter[name].dense()).norm() > 1e-3 for name in "ac")


@pytest.mark.parametrize("space", ["full", "core", "knots", "knots:scaled=false"])
@pytest.mark.parametrize("method", list(WAYS))
def test_threads_batches_and_the_order_of_modules_change_nothing(method: str, space: str) -> None:
    given = adapters()
    recipe = {"space": space}
    first = run(given, method, recipe=recipe)
    for name, update in run(given, method, recipe=recipe, threads=3).adapter.items():
        assert torch.equal(update.left, first.adapter[name].left) and torch.equal(
            update.right, first.adapter[name].right
        )
    for name, update in run(given, method, recipe=recipe, batch=1).adapter.items():
        close(update.dense(), first.adapter[name].dense(), tol=1e-8)
    for factor in (-1e80, 1e-80):
        scaled = {k: Adapter.from_updates({n: u * factor for n, u in a.items()}, name=k) for k, a in given.items()}
        for name, update in run(scaled, method, recipe=recipe).adapter.items():
            close(update.dense() / factor, first.adapter[name].dense(), tol=1e-8)


def test_an_adapter_that_is_zero_somewhere_is_as_if_it_were_not_there() -> None:
    given = adapters()
    zero = {
        **given,
        "a2": Adapter.from_updates(
            {**given["a2"], "b": LowRank(torch.zeros(9, 2).double(), torch.ones(2, 7).double())}, name="a2"
        ),
    }
    both = [run(some, recipe={"space": "full"}).adapter for some in (zero, given)]
    for name in SHAPES:
        close(both[0][name].dense(), both[1][name].dense(), tol=1e-8)


def test_weights_and_densities_are_each_adapters_own() -> None:
    given = adapters(2)
    weights = {"a0": {"a": 3.0, "b": 0.5}}
    plan = make_plan(
        given, Recipe(method="ties", space="full", weights=weights, parameters={"trim": "model", "density": [0.1, 0.6]})
    )
    found = surveyed(plan)
    for t, (key, density) in enumerate((("a0", 0.1), ("a1", 0.6))):
        flat = torch.cat([(weights.get(key, {}).get(n, 1.0) * u.dense()).flatten() for n, u in given[key].items()])
        assert int((flat.abs() >= found.known[t]).sum()) == round(density * len(flat))


def test_errors_of_what_was_stored_do_not_decide_what_is_kept() -> None:
    """A deficient update, balanced, has columns that are nothing but errors."""
    given = adapters(2)
    deficient = make("deficient", 9, 7, 3, normal(5), [])
    given = {**given, "a1": Adapter.from_updates({**given["a1"], "a": deficient}, name="a1")}
    noisy = deficient + lowrank(9, 7, 1, seed=3) * 1e-16
    other = {**given, "a1": Adapter.from_updates({**given["a1"], "a": noisy}, name="a1")}
    recipe = {"space": "full", "steps": ["balance"]}
    both = [run(one, recipe=recipe, parameters={"density": 0.9}).adapter for one in (given, other)]
    for name in SHAPES:
        close(both[0][name].dense(), both[1][name].dense(), tol=1e-8)


def test_copies_and_single_adapters_come_back_whole() -> None:
    given = adapters(1)
    for some in (given, {"x": given["a0"], "y": given["a0"]}):
        merged = run({k: Adapter.from_updates(dict(a), name=k) for k, a in some.items()}, recipe={"scale": "auto"})
        assert all(module.alone for module in merged.report.modules.values())
        for name, update in given["a0"].items():
            close(merged.adapter[name].dense(), update.dense(), tol=1e-8)


def test_a_density_by_layer_is_refused() -> None:
    with pytest.raises(ConfigError, match="differs by layer"):
        Recipe(method="ties", parameters={"trim": "model", "density": [[0.1, 0.5], 0.2]})
    with pytest.raises(ValueError, match="pass over all modules"):
        METHODS.build("ties:trim=model")([lowrank(4, 3, 1)], Site())


@pytest.mark.parametrize("space", ["core", "full"])
def test_elsewhere_it_is_the_same_to_the_byte(tmp_path: Path, space: str) -> None:
    types = (torch.float32, torch.float16, torch.bfloat16)
    sources = [
        make_adapter(tmp_path / name, r, seed=seed, layers=3, dtype=dtype)
        for seed, (name, r, dtype) in enumerate(zip("ABC", (4, 6, 2), types, strict=True))
    ]
    recipe = Recipe(method="ties", space=space, scale=0.5, parameters={"trim": "model"}, norms="equal")
    ways = {"here": {"threads": 2}, "there": {"executor": Posted()}, "again": {"threads": 1, "resume": True}}
    for name, how in ways.items():
        merge_files(sources, tmp_path / name, recipe, **how)
    written = {name: (tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ways}
    assert written["here"] == written["there"] == written["again"]
    plan = make_plan([], recipe) if not sources else merge_files(sources, tmp_path / "more", recipe).plan
    assert "over all its modules" in plan.resolved.method.cuts[0]


class TestTally:
    def test_it_does_not_depend_on_how_numbers_come(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("coremerge.methods.largest.MOST", 500)
        x = normal(1)(6000) * torch.logspace(-3, 3, 6000).double()
        whole = tally(x)
        parts = [tally(one) for one in x[torch.randperm(6000)].split(700)]
        for other in (joined(parts), joined([joined(parts[:2]), *parts[:1:-1]])):
            assert torch.equal(whole.keys, other.keys) and torch.equal(whole.counts, other.counts)
            assert whole.dropped == other.dropped
        assert whole.total == 6000 and len(whole.keys) <= 500

    def test_it_is_the_size_of_the_kth_largest(self, monkeypatch: pytest.MonkeyPatch) -> None:
        x = normal(2)(5000)
        order = x.abs().sort(descending=True).values
        for k in (1, 2, 77, 5000):
            assert int((x.abs() >= tally(x).largest(k)).sum()) == k
            assert tally(x).largest(k) == pytest.approx(float(order[k - 1]), rel=1e-10)
        monkeypatch.setattr("coremerge.methods.largest.MOST", 300)
        for k in (1, 77, 2500):
            assert k <= int((x.abs() >= tally(x).largest(k)).sum()) <= k + 0.03 * len(x)
