"""What a merge will do, settled and validated before any work."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from dataclasses import field as dataclass_field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from coremerge.adapter import Adapter, Info, Module
from coremerge.carried import Carried, plan_files
from coremerge.errors import ConfigError, InputError, MismatchError
from coremerge.executors.local import default_threads
from coremerge.extras import Extra, end_of, plan_extras
from coremerge.fused import refuse
from coremerge.layered import by_module, is_layered, last_layer
from coremerge.naming import agreed, suspected, unsettled
from coremerge.recipe import Recipe, Resolved
from coremerge.text import size
from coremerge.weighting import Table, fold_components, in_order, weight_table
from coremerge.zeros import planned_zeros

if TYPE_CHECKING:
    from coremerge.equal import Equal

IMPORT_BYTES = 300_000_000
"""What a process holds once torch is imported."""

ENTRY_BYTES = 4_000
"""Of each module of each adapter: its names, shapes and places in files, and what is said of it."""

BATCH_BYTES = 24 << 20
"""Stacked factors, as float64, that one CPU thread works on at once; a single module may have more."""

EXTRA_COPIES = 4
"""Of whole tensors, in their own dtype, that may be in memory at once: they are averaged in float64."""

CORE_BYTES = 16 << 20
"""Merged cores that stay in memory until they are written; the others wait on the disk."""

PIECES = 64 << 20
"""Freed memory that the C library keeps in pieces too small for what comes next."""

MAPPED = 32 << 20
"""What is as large as this goes back to the system when it is freed; what is smaller stays with the thread."""

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values vLLM's ``max_lora_rank`` takes."""


@dataclass(frozen=True)
class PlannedModule:
    """One module of the result.

    Attributes:
        module: its shape and kind; ``rank`` is the most that the merged update can have.
        ranks: adapter name → its rank here; adapters that lack the module are absent.
    """

    module: Module
    ranks: Mapping[str, int]


@dataclass(frozen=True)
class Plan:
    """Everything that is known before the first factor is read.

    Attributes:
        adapters: name → adapter, the names made unique.
        recipe: what to do.
        modules: module name → :class:`PlannedModule`.
        weights: adapter name → module name → weight.
        extras: what becomes of saved modules and token rows.
        info: of the result.
        dtype: of the result.
        warnings: what the person should know, in plain words.
        files: what becomes of files beside the adapters' own.
        equal: what brings each adapter to one size, once it is known: see :mod:`coremerge.equal`; in the weights, too.
        settled: parameter of the method → what it was set to from the adapters, and why.
        sized: the adapters by whose sizes norms are made equal: without weights of rank components in their factors.
        base_norms: module → squared Frobenius norm of the base's weight, where the scale goes by it.
        known: what the method has to know of all modules, once it is known: see :mod:`coremerge.surveying`.
    """

    adapters: Mapping[str, Adapter]
    recipe: Recipe
    modules: Mapping[str, PlannedModule]
    weights: Table
    extras: Mapping[str, Extra]
    info: Info
    dtype: torch.dtype
    warnings: tuple[str, ...]
    files: Mapping[str, Carried] = dataclass_field(default_factory=dict)
    equal: Mapping[str, Equal] = dataclass_field(default_factory=dict)
    settled: Mapping[str, str] = dataclass_field(default_factory=dict)
    base_norms: Mapping[str, float] = dataclass_field(default_factory=dict)
    sized: Mapping[str, Adapter] = dataclass_field(default_factory=dict)
    known: Any = None

    @property
    def rank(self) -> int:
        """The most that the result's uniform rank can be."""
        return max((p.module.rank for p in self.modules.values()), default=0)

    @property
    def decisions(self) -> tuple[str, ...]:
        """What becomes of whole tensors and of files beside, in plain words."""
        tensors = (f"{name}: {extra.decision}" for name, extra in self.extras.items())
        return (*tensors, *(f"{name}: {one.decision}" for name, one in self.files.items() if not one.lost))

    @property
    def output_bytes(self) -> int:
        """Size of the factors at :attr:`rank`."""
        return sum(self.rank * sum(p.module.shape) for p in self.modules.values()) * self.dtype.itemsize

    def groups(self, batch: int | None = None) -> Iterator[tuple[str, ...]]:
        """Module names, ``batch`` at a time where shapes and ranks coincide; None: as many as suit a CPU."""
        alike: dict[Any, list[str]] = {}
        for name, planned in self.modules.items():
            alike.setdefault((planned.module.shape, tuple(planned.ranks.items())), []).append(name)
        for names in alike.values():
            size = 1 if self.is_layered else batch or self.cpu_batch(self.modules[names[0]])
            yield from (tuple(names[i : i + size]) for i in range(0, len(names), size))

    def peak_bytes(self, threads: int | None = None, batch: int | None = None, *, written: int = 0) -> int:
        """An upper estimate of the memory the merge needs; each thread needs ``written`` more to write."""
        return self._peak(self._works(batch), threads or default_threads(), written)

    def threads_within(
        self, most: int, threads: int | None = None, batch: int | None = None, *, written: int = 0
    ) -> int:
        """How many threads, at most ``threads``, the merge can have in ``most`` bytes of memory; no byte of it changes.

        Raises:
            ConfigError: it does not fit with one.
        """
        works = self._works(batch)
        count = threads or default_threads()
        while count > 1 and self._peak(works, count, written) > most:
            count -= 1
        if (least := self._peak(works, count, written)) > most:
            raise ConfigError(
                f"too little: with one thread it needs up to {size(least)}",
                key="max_memory", value=size(most), remedy="Give more, or a lower --batch or --rank",
            )  # fmt: skip
        return count

    def _works(self, batch: int | None) -> list[int]:
        """Bytes that each group of modules needs while it is merged, the largest first."""
        return sorted((len(names) * self._work(self.modules[names[0]]) for names in self.groups(batch)), reverse=True)

    def _peak(self, works: Sequence[int], threads: int, written: int) -> int:
        """Bytes of the process with the largest of ``works`` in as many threads."""
        kept = sum(self._kept(p) for p in self.modules.values())
        entries = ENTRY_BYTES * sum(len(adapter.modules) for adapter in self.adapters.values())
        fixed = IMPORT_BYTES + entries + min(kept, CORE_BYTES) + self._extra_bytes()
        lifts = max((self._lift(p) for p in self.modules.values()), default=0) if threads > 1 else 0
        fixed += self._tallies(threads)
        return fixed + sum(works[:threads]) + threads * written + min(threads, len(self.modules)) * lifts

    def _tallies(self, threads: int) -> int:
        """Bytes of what a pass over all modules takes down of them: of all, and of those that wait to be added."""
        from coremerge.methods.largest import MOST

        if self.resolved.method.survey is None:
            return 0
        sizes = [
            math.prod(self.resolved.core_shape(sum(p.ranks.values()), p.module.shape)) for p in self.modules.values()
        ]
        whole, one = (min(MOST, n) for n in (sum(sizes), max(sizes, default=0)))
        return 16 * len(self.adapters) * (whole + (2 * threads + 8) * one) + 64 * whole

    def _lift(self, planned: PlannedModule) -> int:
        """Bytes of factors that are lifted, scaled and converted by threads of their own, beside what others freed."""
        sides = [8 * planned.module.rank * side for side in planned.module.shape]
        return 3 * sum(sides) if max(sides) < MAPPED else 0

    def _extra_bytes(self) -> int:
        """Of whole tensors: what the adapters' files hold beside their factors, as several copies in float64."""
        if not self.extras:
            return 0
        files = sum(file.stat().st_size for a in self.adapters.values() for file in a.info.files if file.exists())
        factors = sum(m.parameters * m.dtype.itemsize for a in self.adapters.values() for m in a.modules.values())
        return EXTRA_COPIES * max(0, files - factors)

    def cpu_batch(self, planned: PlannedModule) -> int:
        """How many modules like ``planned`` go together on a CPU: few long calls, as threads wait at each."""
        factors = 8 * sum(planned.ranks.values()) * sum(planned.module.shape)
        return 1 if self.is_dense else max(1, min(4, BATCH_BYTES // max(1, factors)))

    def _work(self, planned: PlannedModule) -> int:
        total, (m, n) = sum(planned.ranks.values()), planned.module.shape
        factors = 4 * total * (m + n) + 20 * total * total  # of the second term, decompositions take most
        p, q = self.resolved.core_shape(total, (m, n))
        return 8 * (factors + self._entries(len(self.adapters), min(p, m), min(q, n)))

    def _entries(self, count: int, p: int, q: int) -> int:
        """Numbers of which there are p × q: what the method holds for each of its inputs, beside an SVD of one.

        Measured: an SVD takes its input, a copy of it, both sides and up to 5 k × k, k = min(p, q), for itself; what
        element-wise methods do with one core at a time takes less. What is freed of matrices below 32 MB stays with the
        process, in pieces: up to four more of them, or :data:`PIECES`.
        """
        if not self.resolved.dense:
            return 0
        k = min(p, q)
        decomposed = 2 * p * q + k * (p + q) + 5 * k * k
        return int(self.resolved.copies * count * p * q) + decomposed + min(4 * p * q, PIECES // 8)

    def _kept(self, planned: PlannedModule) -> int:
        total, (m, n) = sum(planned.ranks.values()), planned.module.shape
        rows, columns = self.resolved.core_shape(total, (m, n))
        return 8 * (planned.module.rank * (rows + columns) + 2 * total * total)

    @cached_property
    def resolved(self) -> Resolved:
        """The recipe's operators."""
        return self.recipe.resolve()

    @cached_property
    def is_layered(self) -> bool:
        """Whether a parameter of the method differs between modules, so that these go one by one."""
        given = self.recipe.parameters.values()
        return any(isinstance(value, tuple) and any(map(is_layered, value)) for value in given)

    @cached_property
    def last_layer(self) -> int:
        """The highest number of a layer: where gradients end."""
        return last_layer(module for adapter in self.adapters.values() for module in adapter)

    @property
    def is_dense(self) -> bool:
        """Whether the recipe works on all m × n entries of updates."""
        return self.resolved.is_full and self.resolved.dense

    def spanning(self) -> Plan:
        """The same with ranks of all that the adapters span: for a result that is not the recipe's, such as a fit."""
        most = self.recipe.rank if isinstance(self.recipe.rank, int) else math.inf
        ranks = {name: min(*p.module.shape, sum(p.ranks.values()), most) for name, p in self.modules.items()}
        modules = {
            name: replace(p, module=replace(p.module, rank=int(ranks[name]))) for name, p in self.modules.items()
        }
        return replace(self, modules=modules)

    def to_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return {
            "adapters": [
                {
                    "name": name,
                    "source": a.info.source,
                    "type": a.info.type,
                    "modules": len(a),
                    "ranks": sorted({m.rank for m in a.modules.values()}),
                    "scales": sorted({m.scale for m in a.modules.values()}),
                    "notes": list(a.info.notes),
                }
                for name, a in self.adapters.items()
            ],
            "modules": {
                name: {"shape": p.module.shape, "kind": p.module.kind, "ranks": dict(p.ranks), "rank": p.module.rank}
                for name, p in self.modules.items()
            },
            "extras": {name: {"from": e.holders, "decision": e.decision} for name, e in self.extras.items()},
            "files": {name: {"from": c.holders, "decision": c.decision} for name, c in self.files.items()},
            "rank": self.rank,
            "dtype": str(self.dtype).removeprefix("torch."),
            "settled": dict(self.settled),
            "output_bytes": self.output_bytes,
            "peak_bytes": self.peak_bytes(),
            "warnings": list(self.warnings),
        }


def make_plan(adapters: Mapping[str, Adapter] | Sequence[Adapter], recipe: Recipe) -> Plan:
    """Check that ``adapters`` fit together under ``recipe`` and lay out the result.

    Raises:
        InputError: there is nothing to merge.
        MismatchError: shapes, layer types, layouts or whole tensors clash, or no module is shared.
        ConfigError: weights or extras that name nothing.
    """
    named = agreed(name_adapters(adapters))
    recipe.check_count(len(named))
    weights = recipe.weights if isinstance(adapters, Mapping) else in_order(recipe.weights, named)
    weights = by_module(weights, named)
    sized = named
    weights, named = fold_components(weights, named)
    resolved = recipe.resolve()
    modules = {name: _planned(name, named, recipe, resolved) for name in _module_names(named)}
    _check_shared(named, modules, recipe)
    holders = {name: tuple(p.ranks) for name, p in modules.items()}
    table = weight_table(weights, holders, named, recipe.normalize)
    recipe, settled = recipe.settled({name: named[name] for name in named if any(table[name].values())} or named)
    extras, files = plan_extras(named, recipe.extras), plan_files(named, recipe.extras)
    dtype = getattr(torch, recipe.dtype) if recipe.dtype else _common_dtype(named.values())
    plan = Plan(
        named,
        recipe,
        modules,
        table,
        extras,
        _merged_info(named.values(), extras, files),
        dtype,
        (),
        files,
        settled=settled,
        sized=sized,
    )
    return replace(plan, warnings=tuple(_warnings(plan)))


def name_adapters(adapters: Mapping[str, Adapter] | Sequence[Adapter]) -> dict[str, Adapter]:
    """Names for adapters: a mapping's own; else each one's label.

    Where labels coincide, the folder or owner above is put before them (``math/checkpoint-100``), or a number after.

    Raises:
        InputError: there are none.
    """
    if not adapters:
        raise InputError("no adapters given", remedy="Name at least one")
    if isinstance(adapters, Mapping):
        return dict(adapters)
    short, long = (Counter(map(name, adapters)) for name in (_label, _longer_label))
    named: dict[str, Adapter] = {}
    for adapter in adapters:
        name = label = _longer_label(adapter) if short[_label(adapter)] > long[_longer_label(adapter)] else adapter.name
        count = 1
        while name in named:
            count += 1
            name = f"{label}-{count}"
        named[name] = adapter
    return named


def _label(adapter: Adapter) -> str:
    return adapter.name


def _longer_label(adapter: Adapter) -> str:
    """With the name of the folder, or on the hub of the owner, that it is in."""
    source = adapter.info.source
    parts = (source if "://" in source else re.split("[@:]", source)[0]).split("/")
    above = parts[parts.index(adapter.name) - 1] if adapter.name in parts[1:] else ""
    return f"{above}/{adapter.name}" if above else adapter.name


def _module_names(adapters: Mapping[str, Adapter]) -> list[str]:
    return sorted({module for adapter in adapters.values() for module in adapter})


def _planned(name: str, adapters: Mapping[str, Adapter], recipe: Recipe, resolved: Resolved) -> PlannedModule:
    having = {key: adapter.modules[name] for key, adapter in adapters.items() if name in adapter.modules}
    (first_key, first), *others = having.items()
    for key, module in others:
        for what in ("shape", "kind", "kernel"):
            if getattr(module, what) != getattr(first, what):
                raise MismatchError(
                    f"module {name}: {what} {getattr(first, what)} in {first_key}, {getattr(module, what)} in {key}",
                    file=adapters[key].info.source or key,
                    remedy=_remedy(name, first, module),
                )
    resolved = resolved.alone if resolved.alone and len(having) == 1 else resolved
    rank = resolved.rank([module.rank for module in having.values()], first.shape)
    if isinstance(recipe.rank, int):
        rank = min(rank, recipe.rank)
    return PlannedModule(replace(first, rank=rank, scale=1.0), {key: module.rank for key, module in having.items()})


def _remedy(name: str, first: Module, other: Module) -> str:
    """For two modules that differ: the base, only how many tokens it has, or one of them is a part of a B."""
    at = 1 if first.kind == "embedding" else 0
    if end_of(f"{name}.weight") and first.kind == other.kind and first.shape[1 - at] == other.shape[1 - at]:
        return "Their vocabularies differ: adapters must have been trained with one tokenizer, on tables of one size"
    (few, inner), (many, others) = sorted((first.shape, other.shape))
    shard = few < many and inner == others and many % few == 0
    hint = f"; or the one of {few} rows was saved in shards (ZeRO-3 or FSDP): gather them first" if shard else ""
    return f"Adapters must have been trained on the same base model{hint}"


def _check_shared(adapters: Mapping[str, Adapter], modules: Mapping[str, PlannedModule], recipe: Recipe) -> None:
    for key, adapter in adapters.items():
        if not adapter.modules:
            raise MismatchError("has no adapted module", file=adapter.info.source or key)
    if len(adapters) > 1 and not recipe.allow_disjoint and all(len(p.ranks) == 1 for p in modules.values()):
        examples = "; ".join(f"{key}: {next(iter(adapter))}" for key, adapter in adapters.items())
        options = unsettled(adapters)
        raise MismatchError(
            f"the adapters have no module in common ({examples})",
            remedy=f"If that is one part of the base under two names: {options}. If it has both: --allow-disjoint"
            if options
            else "They seem to be for different base models; --allow-disjoint merges them all the same",
        )
    if not recipe.allow_disjoint:
        refuse(adapters)
    values = {key: adapter.info.layer_replication for key, adapter in adapters.items()}
    if len(set(values.values())) > 1:
        raise MismatchError(
            f"layer_replication differs: {values}",
            remedy="Adapters must have been trained on the same layout of the base",
        )


def _common_dtype(adapters: Iterable[Adapter]) -> torch.dtype:
    dtypes = {adapter.dtype for adapter in adapters}
    return dtypes.pop() if len(dtypes) == 1 else torch.float32


def _merged_info(adapters: Iterable[Adapter], extras: Mapping[str, Extra], files: Mapping[str, Carried]) -> Info:
    infos = [adapter.info for adapter in adapters]
    first = next((info for info in infos if not info.moved), infos[0])  # the names of the result are its base's

    def agreed(field: str) -> Any:
        values = [getattr(info, field) for info in infos]
        return values[0] if all(value == values[0] for value in values) else None

    kept = {name for name, extra in extras.items() if extra.load is not None}
    saved = {name for info in infos for name in info.modules_to_save if _carried(name, kept)}
    tokens = {key: ids for info in infos for key, ids in info.token_indices.items()}
    for extra in extras.values():
        tokens |= {key: extra.tokens for key in tokens if extra.tokens and _is_rows_of(extra.name, key)}
    dropped = {key for key in tokens if not any(_is_rows_of(name, key) for name in kept)}
    return Info(
        type="LORA",
        base_model=first.base_model or next((i.base_model for i in infos if i.base_model), None),
        base_revision=agreed("base_revision"),
        task_type=agreed("task_type"),
        fan_in_fan_out=any(info.fan_in_fan_out for info in infos),
        layer_replication=first.layer_replication,
        auto_mapping=agreed("auto_mapping"),
        modules_to_save=tuple(sorted(saved)),
        token_indices={key: ids for key, ids in tokens.items() if key not in dropped},
        # PEFT adapts nothing in a module that is trained whole: without that one, its targets would find more
        targets=tuple(
            sorted({end for info in infos if saved.issuperset(info.modules_to_save) for end in info.targets})
        ),
        stamps={file: stamp for info in infos for file, stamp in info.stamps.items() if file not in info.files},
        beside={name: file for one in files.values() for name, file in one.files.items()},
    )


def _carried(module: str, extras: Iterable[str]) -> bool:
    return any(f".{module}." in f".{extra}" for extra in extras)


def _is_rows_of(extra: str, module: str) -> bool:
    return f".{module}.token_adapter." in f".{extra}"


def _basis_without_effect(recipe: Recipe, resolved: Resolved) -> Iterable[str]:
    used = Recipe.model_fields["basis"].default if resolved.basis is None else resolved.basis
    if "basis" in recipe.model_fields_set and recipe.basis != used:
        none = f"the {resolved.space.entry.name} space has no basis to choose"
        yield f"basis {recipe.basis} has no effect: {none if resolved.basis is None else f'the space says {used}'}"


def _warnings(plan: Plan) -> Iterable[str]:
    yield from _basis_without_effect(plan.recipe, plan.resolved)
    bases = sorted({a.info.base_model for a in plan.adapters.values() if a.info.base_model})
    if len(bases) > 1:
        yield f"the adapters name different base models ({', '.join(bases)}); shapes agree, names are only hints"
    for key, adapter in plan.adapters.items():
        missing = len(plan.modules) - len(adapter)
        if missing:
            yield f"{key} lacks {missing} of {len(plan.modules)} modules: it contributes nothing there"
    yield from planned_zeros(plan)
    if len({adapter.info.fan_in_fan_out for adapter in plan.adapters.values()}) > 1:
        yield "fan_in_fan_out is true in some adapters only, and changes nothing in the files: written true"
    yield from suspected(plan.adapters)
    if any(adapter.biases for adapter in plan.adapters.values()):
        yield "lora_bias: biases are merged as weighted sums; vLLM refuses adapters with lora_bias"
    yield from (f"{key}: {warning}" for key, adapter in plan.adapters.items() for warning in adapter.info.warnings)
    yield from plan.decisions
    yield from (f"{name}: {one.decision}" for name, one in plan.files.items() if one.lost)
    if plan.rank > VLLM_RANKS[-1]:
        yield f"rank {plan.rank} is above {VLLM_RANKS[-1]}, the most that vLLM serves; --rank makes it smaller"
    if math.prod(m := max((p.module.shape for p in plan.modules.values()), key=math.prod)) > 1 << 24 and plan.is_dense:
        yield f"this recipe works on all entries of updates as large as {m[0]} × {m[1]}: slow; core space is not"
