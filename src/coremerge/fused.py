"""Fused layers beside their parts: one trainer adapts ``qkv_proj``, another ``q_proj``, ``k_proj`` and ``v_proj``.

A fused weight holds the rows of its parts one below the other, where a model's code cuts it at their sizes; the parts'
updates are then exactly one update of it: their A one below the other, their B on the diagonal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import reduce

import torch
from torch import Tensor

from coremerge.adapter import Adapter, Lazy, Module
from coremerge.errors import MismatchError
from coremerge.lowrank import LowRank

CONCATENATED = {
    "qkv_proj": (("q_proj", "k_proj", "v_proj"), ("k_proj", "v_proj")),
    "gate_up_proj": (("gate_proj", "up_proj"), ("gate_proj", "up_proj")),
    "in_proj_qkv": (("in_proj_q", "in_proj_k", "in_proj_v"), ("in_proj_q", "in_proj_k")),
}
"""Fused layer → its parts in their order, and the two of one size (Phi-3 and 4, GLM-4, Qwen3.5 in transformers)."""

_FORMS = ("{}_proj", "{}", "to_{}", "w{}", "W{}", "{}_lin", "{}_linear", "in_proj_{}", "linear_{}", "attn_{}")
_KEYS_AND_VALUES = frozenset(
    (*(form.format(letter) for form in _FORMS for letter in "kv"), "key", "value", "key_proj", "value_proj")
)
_ATTENTION = _KEYS_AND_VALUES | {*(form.format("q") for form in _FORMS), "query", "query_proj"}
_QKV = (
    "qkv_proj", "qkv", "Wqkv", "wqkv", "W_pack", "c_attn", "query_key_value", "to_qkv", "qkv_lin", "qkv_linear",
    "in_proj_qkv", "linear_qkv", "attn_qkv", "fused_qkv", "att_proj",
)  # fmt: skip
_ADDED = frozenset(f"add_{letter}_proj" for letter in "qkv")
_GATED = frozenset(("gate_proj", "up_proj", "w1", "w3"))
PARTS: dict[str, frozenset[str]] = {
    **dict.fromkeys(_QKV, _ATTENTION),
    **dict.fromkeys(("kv_proj", "kv", "to_kv", "wkv", "Wkv", "linear_kv"), _KEYS_AND_VALUES),
    **dict.fromkeys(("add_qkv_proj", "to_added_qkv"), _ADDED),
    "in_proj_qkvz": frozenset(("in_proj_qkv", "in_proj_q", "in_proj_k", "in_proj_v", "in_proj_z")),
    "in_proj_ba": frozenset(("in_proj_b", "in_proj_a")),
    **dict.fromkeys(("gate_up_proj", "gate_and_up_proj", "fused_gate_up_proj", "w13"), _GATED),
}
"""Fused layer → what its parts may be called beside it."""


@dataclass(frozen=True)
class Fused:
    """A fused layer of some adapters and what others have of its parts.

    Attributes:
        name: of the fused layer.
        module: what is known of it.
        holder: an adapter that has it.
        parts: name of a part → what is known of it, and an adapter that has it.
    """

    name: str
    module: Module
    holder: str
    parts: Mapping[str, tuple[Module, str]]

    def rows(self) -> dict[str, int] | None:
        """Name of each part → its number of rows, in their order; None unless that is certain."""
        parent, _, last = self.name.rpartition(".")
        form = CONCATENATED.get(last)
        named = {_last(part): module for part, (module, _) in self.parts.items()}
        inner = {module.shape[1] for module in (*named.values(), self.module)}
        kinds = {module.kind for module in (*named.values(), self.module)}
        mixed = last == "qkv_proj" and parent.rpartition(".")[2] == "attn"  # CodeGen mixes the rows of the parts
        if mixed or form is None or named.keys() - set(form[0]) or len(inner) > 1 or kinds != {"linear"}:
            return None
        sizes = _sizes({part: module.shape[0] for part, module in named.items()}, *form, self.module.shape[0])
        return sizes and {f"{parent}.{part}" if parent else part: size for part, size in sizes.items()}


def _sizes(
    known: Mapping[str, int], order: tuple[str, ...], pair: tuple[str, str], total: int
) -> dict[str, int] | None:
    found = dict(known)
    for one, other in (pair, pair[::-1]):
        if one in found:
            found.setdefault(other, found[one])
    missing = [part for part in order if part not in found]
    rest = total - sum(found.values())
    if missing and rest % len(missing) == 0:  # one part, or the two of one size
        found |= dict.fromkeys(missing, rest // len(missing))
    whole = sum(found.values()) == total and found.keys() == set(order) and min(found.values()) > 0
    return {part: found[part] for part in order} if whole and found[pair[0]] == found[pair[1]] else None


def find(adapters: Mapping[str, Adapter]) -> Iterator[Fused]:
    """Every fused layer of which other adapters have parts; none of a kind that one adapter has side by side."""
    holders: dict[str, tuple[Module, str]] = {}
    for key, adapter in adapters.items():
        for name, module in adapter.modules.items():
            holders.setdefault(name, (module, key))
    for name, (module, key) in holders.items():
        parent, _, last = name.rpartition(".")
        beside = (f"{parent}.{part}" if parent else part for part in sorted(PARTS.get(last, ())))
        parts = {part: holders[part] for part in beside if part in holders}
        if parts and not any(name in adapter and parts.keys() & adapter.keys() for adapter in adapters.values()):
            yield Fused(name, module, key, parts)


def joined(adapters: Mapping[str, Adapter]) -> dict[str, Adapter]:
    """``adapters`` with parts as rows of the fused layers that others have, where the order of the rows is known."""
    rows = {fused.name: sizes for fused in find(adapters) if (sizes := fused.rows()) and _fits(adapters, sizes)}
    if not rows:
        return dict(adapters)
    return {key: _joined(adapter, rows) for key, adapter in adapters.items()}


def _fits(adapters: Mapping[str, Adapter], sizes: Mapping[str, int]) -> bool:
    """Whether all adapters have the parts in these sizes."""
    held = [(part, each.modules[part]) for each in adapters.values() for part in sizes if part in each.modules]
    return len({module.shape[1] for _, module in held}) == 1 and all(
        module.shape[0] == sizes[part] and module.kind == "linear" for part, module in held
    )


def refuse(adapters: Mapping[str, Adapter]) -> None:
    """Refuse fused layers beside parts of them that could not be joined.

    Raises:
        MismatchError: naming the layer, its parts and the adapters.
    """
    for fused in find(adapters):
        part, (_, other) = next(iter(fused.parts.items()))
        raise MismatchError(
            f"{fused.name} ({fused.holder}) and {part} ({other}) are one weight, fused and in parts, and how its rows"
            " are ordered is not known from the files",
            file=adapters[other].info.source or other, key=part,
            remedy="Merge adapters of one form only; or each form into its own base (--into). If the base has both"
            " layers, --allow-disjoint merges them side by side",
        )  # fmt: skip


def _joined(adapter: Adapter, rows: Mapping[str, Mapping[str, int]]) -> Adapter:
    own = {fused: parts for fused, parts in rows.items() if parts.keys() & adapter.modules.keys()}
    if not own:
        return adapter
    taken = {part for parts in own.values() for part in parts}
    modules = {name: module for name, module in adapter.modules.items() if name not in taken}
    modules |= {fused: _module(adapter, parts) for fused, parts in own.items()}
    biased = {fused for fused, parts in own.items() if parts.keys() & adapter.biases.keys()}
    biases = dict.fromkeys([name for name in adapter.biases if name not in taken]) | dict.fromkeys(sorted(biased))

    def read(name: str, dtype: torch.dtype | None) -> LowRank:
        return (
            _block(adapter, own[name], lambda part: adapter.read(part, dtype))
            if name in own
            else adapter.read(name, dtype)
        )

    def bias(name: str) -> Tensor:
        if name not in own:
            return adapter.biases[name]
        return torch.cat([
            adapter.biases[part] if part in adapter.biases else torch.zeros(size, dtype=torch.float64)
            for part, size in own[name].items()
        ])  # fmt: skip

    return Adapter(
        modules,
        lambda name: read(name, torch.float64),
        read=read,
        name=adapter.name,
        biases=Lazy(tuple(biases), bias),
        extras=adapter.extras,
        info=replace(adapter.info, moved=True, notes=(*adapter.info.notes, _told(own))),
    )


def _told(own: Mapping[str, Mapping[str, int]]) -> str:
    forms = {_last(fused): ", ".join(map(_last, parts)) for fused, parts in own.items()}
    became = "; ".join(f"{parts} became rows of {fused}" for fused, parts in forms.items())
    return f"{became}, exactly: other adapters have them fused"


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _module(adapter: Adapter, parts: Mapping[str, int]) -> Module:
    held = [adapter.modules[part] for part in parts if part in adapter.modules]
    dtypes = {torch.bfloat16 if module.dtype.itemsize == 1 else module.dtype for module in held}
    shape = sum(parts.values()), held[0].shape[1]
    return Module(shape, sum(module.rank for module in held), dtype=reduce(torch.promote_types, dtypes))


def _block(adapter: Adapter, parts: Mapping[str, int], read: Callable[[str], LowRank]) -> LowRank:
    """B on the diagonal, A one below the other; a part that the adapter lacks has rows of zeros."""
    held = {part: read(part) for part in parts if part in adapter.modules}
    dtype = reduce(torch.promote_types, (update.dtype for update in held.values()))
    left = torch.zeros(sum(parts.values()), sum(update.rank for update in held.values()), dtype=dtype)
    row = column = 0
    for part, size in parts.items():
        if part in held:
            left[row : row + size, column : column + held[part].rank] = held[part].left
            column += held[part].rank
        row += size
    return LowRank(left, torch.cat([update.right.to(dtype) for update in held.values()]))
