"""Every method is its oracle, in every space and with every step: one that is registered is found by its name.

The oracle of a method is the function of that name in tests/oracles.py (``sum_`` for ``sum``): dense cores → the merged
core, at the method's default parameters; if it has a parameter ``uniforms``, that is given what ``Site.uniform`` draws.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

import oracles
from coremerge.adapter import Adapter
from coremerge.lowrank import LowRank
from coremerge.merging import merge
from coremerge.methods import METHODS, Site
from coremerge.recipe import Recipe
from coremerge.registry import Spec
from coremerge.spaces import SPACES
from coremerge.steps import STEPS
from laws import close, examples, label, lowrank, variants

SHAPES = {"long": (9, 6), "wide": (5, 8)}
RANKS = {"a": {"long": 2, "wide": 1}, "b": {"long": 1, "wide": 3}, "c": {"long": 2}}
Merge = Callable[[Sequence[Tensor]], Tensor]


def in_core(updates: Sequence[LowRank], merged: Merge) -> Tensor:
    u, v, cores = oracles.core_space([x.left for x in updates], [x.right for x in updates])
    return u @ merged(cores) @ v.T


def in_knots(updates: Sequence[LowRank], merged: Merge) -> Tensor:
    u, s, vs = oracles.knots_space([x.dense() for x in updates])
    return u @ merged([s[:, None] * v for v in vs])


def in_full(updates: Sequence[LowRank], merged: Merge) -> Tensor:
    return merged([x.dense() for x in updates])


def in_ctm(updates: Sequence[LowRank], merged: Merge) -> Tensor:
    p, q, cores = oracles.ctm_space([x.dense() for x in updates])
    return p @ merged(cores) @ q.T


SPACE_ORACLES = {"core": in_core, "knots": in_knots, "full": in_full, "ctm": in_ctm}
STEP_ORACLES: dict[str, Callable[..., Tensor]] = {
    "isotropize": oracles.isotropize,
    "truncate": lambda x: oracles.truncate(x, 2),
    "soften": oracles.soften,
    "svc": oracles.svc,
    "lines": oracles.lines,
    **dict.fromkeys(("balance", "star", "lift"), lambda x: x),  # of the update, below; its core stays what it is
}
STEP_SPECS: list[Spec | None] = [
    None,
    *(spec for name in STEPS for spec in variants(STEPS[name]) if not STEPS.resolve(spec).spreads),  # arbitrary vectors
]


def oracle_of(method: str) -> Callable[..., Tensor]:
    found = getattr(oracles, method, None) or getattr(oracles, f"{method}_", None)
    assert found, f"tests/oracles.py has no function {method}: write the method's oracle there"
    return found  # type: ignore[no-any-return]


def expected(space: str, method: str, step: str | None, name: str, updates: Sequence[LowRank]) -> Tensor:
    """The merged update, by oracles alone."""
    oracle, site = oracle_of(method), Site(0, (name,), tuple(RANKS))
    if step == "balance":
        updates = [LowRank(*oracles.balanced(x.dense())) for x in updates]
    if step == "star":
        updates = [LowRank(*oracles.balanced(oracles.star(x.dense()))) for x in updates]

    def merged(cores: Sequence[Tensor]) -> Tensor:
        drawn = {"uniforms": [site.uniform(t, core) for t, core in enumerate(cores)]}
        core = oracle(cores, **(drawn if "uniforms" in inspect.signature(oracle).parameters else {}))
        if step is None:
            return core
        known = {"inputs": cores}
        beside = {key: known[key] for key in inspect.signature(STEP_ORACLES[step]).parameters if key in known}
        return STEP_ORACLES[step](core, **beside)

    return SPACE_ORACLES[space](updates, merged)


def check(space: str, method: str, spec: Spec | None = None) -> None:
    """The merge of three adapters, of which one lacks a module, is the oracles'."""
    given = {
        key: Adapter.from_updates(
            {name: lowrank(*SHAPES[name], rank, seed=10 * t + rank) for name, rank in ranks.items()}, name=key
        )
        for t, (key, ranks) in enumerate(RANKS.items())
    }
    parameters = examples(METHODS[method])
    recipe = Recipe(
        space={space: examples(SPACES[space])}, method=method, parameters=parameters, scale=1.0,
        steps=[] if spec is None else [spec],
    )  # fmt: skip
    result = merge(given, recipe, threads=1).adapter
    step = None if spec is None else STEPS.resolve(spec).entry.name
    for name, shape in SHAPES.items():
        updates = [adapter[name] if name in adapter else LowRank.zeros(*shape) for adapter in given.values()]
        close(result[name].dense(), expected(space, method, step, name, updates), tol=1e-8)


@pytest.mark.parametrize("step", STEP_SPECS, ids=label)
@pytest.mark.parametrize("method", list(METHODS))
@pytest.mark.parametrize("space", list(SPACES))
def test_every_method_is_its_oracle(space: str, method: str, step: Spec | None) -> None:
    check(space, method, step)


def test_every_space_and_step_has_an_oracle() -> None:
    assert SPACE_ORACLES.keys() == set(SPACES)
    assert STEP_ORACLES.keys() == set(STEPS)


def test_a_method_without_an_oracle_or_unlike_it_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(METHODS, "entries", dict(METHODS.entries))
    METHODS.register("twice", unitary=True, linear=True, source="none")(
        lambda: lambda cores, site: METHODS["sum"].make()(cores, site) * 2.0
    )
    with pytest.raises(AssertionError, match="write the method's oracle there"):
        check("core", "twice")
    monkeypatch.setattr(oracles, "twice", oracles.sum_, raising=False)
    with pytest.raises(AssertionError, match="differ by"):
        check("core", "twice")
    monkeypatch.setattr(oracles, "twice", lambda xs: 2 * torch.stack(list(xs)).sum(0))
    check("knots", "twice")
