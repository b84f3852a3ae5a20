"""merge(): the pipeline of one module, over all modules, and what there is to say of it.

updates ─ steps before ─▶ space.project ─▶ cores ─ method ─▶ core ─ steps after ─▶ cut to rank ─▶ lift

It knows no file, no config and no progress bar. A module's merge is a pure function of its updates and the recipe.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from coremerge.adapter import Adapter, Lazy
from coremerge.copies import as_one, holders, join_copies
from coremerge.equal import counting, equalized
from coremerge.errors import TensorError
from coremerge.executors import local
from coremerge.linalg import NOISE, RTOL, LinAlgError, RaggedRankError, column_norms, top
from coremerge.lowrank import LowRank, Matrix, ThinSVD, dense, thin_svd, total
from coremerge.methods import Site
from coremerge.outcome import ModuleReport, Report, check_base, report_of, scale_of
from coremerge.plan import Plan, make_plan
from coremerge.recipe import Parts, Recipe
from coremerge.rounding import stored_rounding
from coremerge.sizes import SHORT, beyond_short, check_finite, check_scales, check_sizes, sizes_of
from coremerge.spaces import Combination, Coordinates, Lift

if TYPE_CHECKING:
    from coremerge.held import Held
    from coremerge.steps import After, Beside

S = TypeVar("S")

Group = tuple[str, ...]
"""Modules of one shape and the same ranks, which are merged together."""

Updates = Sequence[LowRank]
"""Of each adapter, of the modules of a group."""

Progress = Callable[[int, int], None]
"""Called with the modules done and their number."""

SHORT_ERROR = 1e-5
"""A lift in float32 is at most this far, relative to its factors' norms, from one in float64."""


@dataclass(frozen=True)
class MergeResult:
    """A merged adapter and its report.

    Attributes:
        adapter: its factors are lifted from the inputs when they are asked for: ``adapter.save`` streams them;
            ``adapter.load()`` makes it independent of the inputs' files.
        report: see :class:`Report`.
        plan: what was settled beforehand.
    """

    adapter: Adapter
    report: Report
    plan: Plan


@dataclass(frozen=True)
class Solved:
    """One module's merged update, as a combination of its inputs: these need not be kept, and are read again.

    Attributes:
        combination: of the inputs' factors.
        amplification: how much larger than in the inputs a relative rounding error of the lift can be in the result.
        report: see :class:`ModuleReport`.
    """

    combination: Combination
    amplification: float
    report: ModuleReport


def merge(
    adapters: Mapping[str, Adapter] | Sequence[Adapter],
    recipe: Recipe | None = None,
    *,
    threads: int | None = None,
    device: str = "cpu",
    batch: int | None = None,
    base_norms: Mapping[str, float] | None = None,
    progress: Progress | None = None,
) -> MergeResult:
    """Merge ``adapters`` into one, module by module.

    Args:
        adapters: a mapping of names, or a sequence (named after each one's label).
        recipe: what to do; the defaults of :class:`~coremerge.recipe.Recipe` when None.
        threads: modules that are worked on side by side; all processors when None.
        device: where the linear algebra runs, in float64: ``"cpu"``, ``"cuda"``, ...
        batch: modules of one shape that go through together; by default 1 to 4 on the CPU, 32 elsewhere.
        base_norms: for ``scale="base"``, module → squared Frobenius norm of the base's weight: see
            :func:`coremerge.formats.base_norms.squared_norms`.
        progress: called as modules are done.

    Raises:
        InputError: see :func:`coremerge.plan.make_plan`; also factors that are missing or not finite.

    Example:
        >>> def one(value): return Adapter.from_updates({"layer": LowRank(value * torch.ones(3, 1), torch.ones(1, 2))})
        >>> result = merge([one(1.0), one(2.0)], Recipe(method="sum", steps=[], scale=1.0))
        >>> round(result.adapter["layer"].dense()[0, 0].item(), 6)
        3.0
    """
    plan = replace(make_plan(adapters, recipe or Recipe()), base_norms=base_norms or {})
    return execute(plan, threads=threads, device=device, batch=batch, progress=progress)


def execute(
    plan: Plan,
    *,
    threads: int | None = None,
    device: str = "cpu",
    batch: int | None = None,
    held: Held | None = None,
    solver: Callable[[Sequence[Group]], Iterator[Mapping[str, Solved]]] | None = None,
    progress: Progress | None = None,
) -> MergeResult:
    """Carry out ``plan``: see :func:`merge`.

    Modules that are ``held`` are not merged again, and those that are merged are held there. ``solver`` merges groups
    of modules somewhere else: see :func:`solve`.
    """
    from coremerge.held import Held
    from coremerge.surveying import surveyed

    start = time.perf_counter()
    plan = equalized(plan, threads)
    check_base(plan)
    check_scales(plan)
    plan = surveyed(plan, threads=threads, device=device, batch=batch)
    parts = plan.recipe.parts()
    held = Held() if held is None else held
    groups = [g for g in groups_of(plan, device, batch) if not held.keys() >= set(g)]

    def here(names: Group) -> dict[str, Solved]:
        return solve(names, plan, parts, device)

    for group in solver(groups) if solver else local.run(here, groups, threads):
        held.add(group)
        if progress:
            progress(len(held), len(plan.modules))
    reports = {name: held.reports[name] for name in plan.modules}
    scale = scale_of(plan, reports)
    report = report_of(plan, reports, scale, time.perf_counter() - start)
    return MergeResult(lifted(plan, parts, held, reports, scale=scale, device=device), report, plan)


def groups_of(plan: Plan, device: str = "cpu", batch: int | None = None) -> list[Group]:
    """The modules as they are merged together."""
    return list(plan.groups(batch or (None if device == "cpu" else 32)))


def read_updates(
    names: Sequence[str], plan: Plan, parts: Parts, device: str = "cpu", dtype: torch.dtype | None = None
) -> list[LowRank]:
    """Each adapter's update of the modules, after the steps before the method; batched where there are several names.

    An adapter that lacks the module has the update zero, of rank 0. ``dtype``: see
    :meth:`~coremerge.adapter.Adapter.read`.
    """
    zeros = LowRank.zeros(*plan.modules[names[0]].module.shape)
    dtype = torch.float64 if parts.before else dtype
    updates = []
    for adapter in plan.adapters.values():
        held = [_known(adapter, name, dtype, parts.linear) if name in adapter else zeros for name in names]
        held = [update.to(torch.device(device)) for update in held]
        for step in parts.before:  # one by one: the lift must see the very same factors, and batched SVDs may differ
            held = [step(update) for update in held]
        updates.append(held[0] if len(held) == 1 else _stacked(held))
    return updates


def _known(adapter: Adapter, name: str, dtype: torch.dtype | None, exact: bool) -> LowRank:
    """An adapter's update with the precision of its numbers; ``exact``: these do not matter, all directions count."""
    update = adapter.read(name, dtype)
    if exact:
        return update.rounded(None)
    if update.rounding is not None:
        return update
    return update.rounded(stored_rounding(update.left, update.right, adapter.modules[name].dtype))


def _stacked(updates: Sequence[LowRank]) -> LowRank:
    if len({u.left.shape for u in updates}) > 1:  # a step before left more of one module's than of another's
        raise RaggedRankError
    dtypes = {u.dtype for u in updates}
    updates = [u.to(torch.float64) for u in updates] if len(dtypes) > 1 else updates
    roundings = [u.rounding for u in updates if u.rounding is not None]
    return LowRank(
        torch.stack([u.left for u in updates]),
        torch.stack([u.right for u in updates]),
        torch.stack(roundings) if roundings else None,
    )


def solve(
    names: Group, plan: Plan, parts: Parts, device: str = "cpu", dtype: torch.dtype | None = None
) -> dict[str, Solved]:
    """The merged cores of modules of one shape; one by one where their numerical ranks differ.

    ``dtype``: what the factors are read in; None: in float32 where it holds them.

    Raises:
        TensorError: factors that are not finite, or of a size that cannot be computed with.
    """

    def work(names: Group, updates: Updates, coordinates: Coordinates, alone: Parts | None) -> dict[str, Solved]:
        acting = alone or parts
        merged = _merged(names, coordinates, plan, acting)
        kept = _kept_energies(coordinates, _directions(coordinates, plan, alone=alone is not None))
        if acting.lifted:
            core = merged.lowrank()
            known = core.rounding if acting.after else None  # errors go along with what steps have made of directions
            whole = thin_svd(coordinates.lift(core, updates).rounded(known))
            coordinates = Coordinates(tuple(update.to(torch.float64) for update in updates), Lift())
            merged = _after(whole, acting.lifted, _counted(names, coordinates, plan), site_of(names, plan))
        found = solved_of(names, coordinates, merged, plan, kept=kept, alone=alone is not None)
        return dict(zip(names, found, strict=True))

    return together(work, names, plan, parts, join=_all, device=device, dtype=dtype)


def _all(found: Sequence[dict[str, Solved]]) -> dict[str, Solved]:
    return {name: one for some in found for name, one in some.items()}


def together(
    work: Callable[[Group, Updates, Coordinates, Parts | None], S],
    names: Group,
    plan: Plan,
    parts: Parts,
    *,
    join: Callable[[Sequence[S]], S],
    device: str = "cpu",
    dtype: torch.dtype | None = None,
) -> S:
    """What ``work`` makes of modules of one shape, or ``join`` of what it makes of each, where their ranks differ.

    ``work`` is given their names, the updates, these in the recipe's space, without weights, and what acts in place of
    ``parts`` where there is one update to merge. Errors are those of :func:`solve`.
    """

    def again(names: Group, dtype: torch.dtype | None = torch.float64) -> S:
        return together(work, names, plan, parts, join=join, device=device, dtype=dtype)

    try:
        updates = read_updates(names, plan, parts, device, dtype)
        weights = _weights(names, plan)
        count = holders(updates, weights)
        # nothing acts on one update: all of it is kept
        plain = parts.alone is not None and not (parts.alone.after or parts.alone.lifted)
        if plain and count == 1:
            updates = [update.rounded(None) for update in updates]
        coordinates = parts.space(updates)
        sizes = sizes_of(coordinates.cores)
        if dtype is None and beyond_short(updates, sizes):
            return again(names)
        check_sizes(names, sizes, plan)
        coordinates, distinct = join_copies(coordinates, weights)
        alone = parts.alone if count == 1 or distinct == 1 else None
        if plain and count > 1 and distinct == 1:
            coordinates = as_one(parts.space([update.rounded(None) for update in updates]), updates, weights)
        return work(names, updates, coordinates, alone)
    except RaggedRankError:
        return join([again((name,), dtype) for name in names])
    except LinAlgError:
        check_finite(names, plan)
        if dtype is None or len(names) > 1:
            return join([again((name,)) for name in names])
        raise TensorError(
            "its values are too large to be computed with", key=names[0], remedy="Check lora_alpha and the weights"
        ) from None


def _directions(coordinates: Coordinates, plan: Plan, *, alone: bool) -> int | None:
    """How many directions the method keeps of each core; None: all of them, in every module."""
    resolved = plan.resolved
    if resolved.method.keeps is None or coordinates.rows is not None:
        return None
    kept = resolved.alone.method.keeps if alone and resolved.alone else resolved.method.keeps
    return max(core.rank for core in coordinates.cores) if kept is None else kept


def _merged(names: Sequence[str], coordinates: Coordinates, plan: Plan, parts: Parts) -> ThinSVD:
    """Weights, method and the steps after it; in isometric coordinates, cut at the numerical rank."""
    rows = coordinates.rows
    cores, site = _counted(names, coordinates, plan), site_of(names, plan)
    merged = parts.method(seen(names, coordinates, plan), site)
    if rows is not None:
        merged = _scale_rows(merged, rows)
    return _after(replace(thin_svd(merged), noise=None), parts.after, cores, site)


def _after(merged: ThinSVD, steps: Sequence[After | Beside], cores: Sequence[LowRank], site: Site) -> ThinSVD:
    """``merged`` from the weighted ``cores`` after ``steps``, cut at the numerical rank.

    They alone ask which of its directions are more than errors: where nothing is said of these, they are the inputs'.
    """
    if steps and merged.noise is None:
        merged = replace(merged, noise=total(cores).noise_along(merged.left, merged.right))
    for step in steps:
        merged = thin_svd(step(merged, cores, site))
    return merged.cut(NOISE)


def seen(names: Sequence[str], coordinates: Coordinates, plan: Plan) -> list[LowRank]:
    """The cores as a method is given them."""
    cores, rows = _counted(names, coordinates, plan), coordinates.rows
    return cores if rows is None else [_over_rows(core, rows) for core in cores]


def site_of(names: Sequence[str], plan: Plan) -> Site:
    """Where the modules of those names are merged."""
    return Site(plan.recipe.seed, tuple(names), tuple(plan.adapters), plan.last_layer, plan.known)


def _over_rows(core: LowRank, rows: Tensor) -> LowRank:
    """``core`` (..., p, q) with its rows divided by ``rows`` (..., p), and their errors, which are alike in all."""
    left = core.left / rows.unsqueeze(-1)
    if core.rounding is None:
        return LowRank(left, core.right)
    grown = column_norms(core.left) * rows.square().reciprocal().mean(-1, keepdim=True).sqrt()
    return LowRank(left, core.right, core.rounding * (grown / column_norms(left)).nan_to_num(0, 0, 0))


def _weights(names: Sequence[str], plan: Plan) -> list[list[float]]:
    """Adapter by adapter, of each module."""
    return [[plan.weights[key].get(name, 1.0) for name in names] for key in plan.adapters]


def _counted(names: Sequence[str], coordinates: Coordinates, plan: Plan) -> list[LowRank]:
    """The cores times their weights."""
    return [_weighted(core, own) for core, own in zip(coordinates.cores, _weights(names, plan), strict=True)]


def _weighted(core: LowRank, weights: Sequence[float]) -> LowRank:
    if all(w == 1 for w in weights):
        return core
    if len(weights) == 1:
        return core * weights[0]
    return core * core.left.new_tensor(weights)[:, None, None]


def _scale_rows(matrix: Matrix, rows: Tensor) -> Matrix:
    if isinstance(matrix, Tensor):
        return rows.unsqueeze(-1) * matrix
    factors = matrix.lowrank() if isinstance(matrix, ThinSVD) else matrix
    return LowRank(rows.unsqueeze(-1) * factors.left, factors.right)


def solved_of(
    names: Sequence[str],
    coordinates: Coordinates,
    merged: ThinSVD,
    plan: Plan,
    *,
    kept: Tensor | None = None,
    alone: bool = False,
) -> Iterator[Solved]:
    """One :class:`Solved` per module, on the CPU, cut to the recipe's rank.

    ``kept``: (..., T), see :func:`_kept_energies`. ``alone``: there was one update to merge, which was taken as it is.
    """
    wanted = plan.recipe.rank if isinstance(plan.recipe.rank, int) else merged.values.shape[-1]
    cut = merged.truncate(wanted)
    result = cut.lowrank()
    combination = coordinates.lift.fold(result)
    amplification = _amplification(coordinates, combination, result)
    inputs = coordinates.whole or coordinates.cores
    spectral = torch.stack([top(core.svd.values) for core in inputs], -1)
    energies = torch.stack([core.svd.values.square().sum(-1) for core in inputs], -1)
    frobenius = energies.sqrt()
    factors, shares = _of_equal(plan)
    beside = _beside(names, coordinates, merged, plan) if plan.base_norms else None
    for i, name in enumerate(names):

        def pick(x: Tensor, i: int = i) -> Tensor:
            return (x if len(names) == 1 else x[i]).cpu()

        values = pick(merged.values)
        counts = torch.tensor([weights[0] != 0 for weights in _weights((name,), plan)])
        there = _there(pick(spectral).where(counts, 0.0))
        norms, sizes = ((factors * pick(x))[there] for x in (spectral, frobenius))
        says = shares[there] * (counting(norms) if plan.equal else 1.0)
        energy, rest = float(values.square().sum()), float(values[wanted:].square().sum())
        if not math.isfinite(energy):
            raise TensorError(
                "the merged update is too large to be computed with", key=name,
                remedy="Check the weights and the method's parameters",
            )  # fmt: skip
        planned = plan.modules[name]
        report = ModuleReport(
            shape=planned.module.shape,
            ranks=planned.ranks,
            merged_rank=len(values),
            rank=cut.values.shape[-1],
            energy=energy,
            lost=rest / energy if energy else 0.0,
            input_norm=_mean(norms, says),
            input_frobenius=_mean(sizes, says),
            norm=float(values.max()) if len(values) else 0.0,
            input_energy={} if kept is None else _by_adapter(pick(energies), name, plan),
            input_kept={} if kept is None else _by_adapter(pick(kept), name, plan),
            zero=tuple(key for key, each in _by_adapter(pick(energies), name, plan).items() if not each),
            alone=alone,
            squares={} if beside is None else _by_adapter(pick(beside[0]), name, plan),
            along={} if beside is None else _by_adapter(pick(beside[1]), name, plan),
        )
        yield Solved(combination.map(pick), float(pick(amplification)), report)


def _kept_energies(coordinates: Coordinates, directions: int | None) -> Tensor | None:
    """(..., T): of the inputs, what the space has of them, of which the method keeps so many; None: all of them."""
    if directions is None and coordinates.whole is None:
        return None
    squares = [core.svd.values.square() for core in coordinates.cores]
    return torch.stack([x.sum(-1) if directions is None else _largest(x, directions) for x in squares], -1)


def _beside(names: Sequence[str], coordinates: Coordinates, merged: ThinSVD, plan: Plan) -> tuple[Tensor, Tensor]:
    """(..., T) each: of the weighted inputs the squared norm, and the inner product with what they became."""
    weighted = _counted(names, coordinates, plan)
    inputs = (
        weighted if coordinates.whole is None else _counted(names, replace(coordinates, cores=coordinates.whole), plan)
    )
    whole = merged.lowrank()
    pairs = [(one.inner(one), core.inner(whole)) for one, core in zip(inputs, weighted, strict=True)]
    squares, along = (torch.stack(list(column), -1) for column in zip(*pairs, strict=True))
    return squares, along


def _of_equal(plan: Plan) -> tuple[Tensor, Tensor]:
    """Each adapter's factor and share: see :class:`coremerge.equal.Equal`."""
    equal = [plan.equal.get(key) for key in plan.adapters]
    pairs = [(1.0, 1.0) if one is None else (one.factor, one.share) for one in equal]
    factors, shares = torch.tensor(pairs, dtype=torch.float64).unbind(-1)
    return factors, shares


def _mean(values: Tensor, shares: Tensor) -> float:
    """Of ``values``, in which those of smaller ``shares`` count less; 0 where there are none."""
    return float((shares * values).sum() / shares.sum()) if len(values) and shares.sum() > 0 else 0.0


def _largest(squares: Tensor, count: int) -> Tensor:
    """The sum of the ``count`` largest of them (..., k) → (...)."""
    return squares.topk(min(count, squares.shape[-1])).values.sum(-1)


def _by_adapter(values: Tensor, name: str, plan: Plan) -> dict[str, float]:
    """Of those that have the module."""
    ranks = plan.modules[name].ranks
    return {key: value for key, value in zip(plan.adapters, values.tolist(), strict=True) if key in ranks}


def _there(norms: Tensor) -> Tensor:
    """Which of these updates count: not those that are zero, or as good as zero next to the largest."""
    return norms > RTOL * norms.max()


def _amplification(coordinates: Coordinates, combination: Combination, result: LowRank) -> Tensor:
    """‖stack‖ ‖combination‖ / ‖result‖ in Frobenius norms (...), of the worse side: see :class:`Solved`.

    Cores have the norms of the stacked factors, as the bases are orthonormal. Infinite where a norm is not ordinary: it
    may not be one for float32.
    """
    stack = total(coordinates.whole or coordinates.cores)
    sides = [
        (combination.of_left, stack.left, combination.left, result.left),
        (combination.of_right, stack.right, combination.right, result.right),
    ]
    norms = [torch.stack([_frobenius(x) for x in side]) for used, *side in sides if used]
    if not norms:
        return torch.zeros(result.left.shape[:-2])
    ratios = [torch.where((x > 2.0**-SHORT) & (x < 2.0**SHORT), x[0] * x[1] / x[2], math.inf) for x in norms]
    return torch.stack(ratios).amax((0, 1))


def _frobenius(x: Tensor) -> Tensor:
    return x.square().sum((-2, -1)).sqrt()


def lifted(
    plan: Plan,
    parts: Parts,
    solved: Mapping[str, Solved],
    reports: Mapping[str, ModuleReport],
    *,
    scale: float = 1.0,
    device: str = "cpu",
) -> Adapter:
    """The merged adapter; a module's inputs are read again when its factors are asked for."""
    ordinary = abs(math.frexp(scale)[1]) <= SHORT / 2

    def read(name: str, dtype: torch.dtype | None = None) -> LowRank:
        one = solved[name]
        short = dtype == torch.float32 and ordinary and _short_lift_will_do(one, plan.dtype)
        kind = torch.float32 if short else torch.float64
        combination = one.combination.scaled(scale).map(lambda x: x.to(torch.device(device), kind))
        exact = None if short else torch.float64
        update = combination(read_updates((name,), plan, parts, device, exact)).to(torch.device("cpu"))
        return update if dtype is None else update.to(dtype)

    modules = {
        name: replace(planned.module, rank=reports[name].rank, dtype=plan.dtype)
        for name, planned in plan.modules.items()
    }
    extras = {name: extra.load for name, extra in plan.extras.items() if extra.load is not None}
    return Adapter(
        modules,
        read,
        read=read,
        name="merged",
        biases=_biases(plan, parts, scale),
        extras=Lazy(tuple(extras), lambda name: extras[name]()),
        info=plan.info,
    )


def _short_lift_will_do(solved: Solved, dtype: torch.dtype) -> bool:
    """Whether float32 keeps the lift's error below :data:`SHORT_ERROR`, and below what rounding to ``dtype`` shows."""
    error = solved.amplification * torch.finfo(torch.float32).eps
    return error <= min(SHORT_ERROR, torch.finfo(dtype).eps / 8)


def _biases(plan: Plan, parts: Parts, scale: float) -> Mapping[str, Tensor]:
    """``lora_bias`` biases, which are linear terms of the output: merged by a linear method itself, else summed.

    Steps after it that are linear, too, act on them.
    """
    names = tuple(name for name in plan.modules if any(name in a.biases for a in plan.adapters.values()))
    linear = plan.resolved.method.entry.linear

    def load(name: str) -> Tensor:
        having = {key: plan.weights[key][name] * a.biases[name].double() for key, a in plan.adapters.items()
                  if name in a.biases}  # fmt: skip
        zeros, one = torch.zeros_like(next(iter(having.values()))), torch.ones(1, 1, dtype=torch.float64)
        columns = [LowRank(having.get(key, zeros)[:, None], one) for key in plan.adapters]
        site = site_of((name,), plan)
        merged = parts.method(columns, site) if linear else total(columns)
        for step in parts.scaling:
            merged = step(merged, columns, site)
        return scale * dense(merged).flatten()

    return Lazy(names, load)
