"""Where an adapter's updates, biases and whole tensors belong in the base model's own files."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from coremerge.adapter import Adapter, Module
from coremerge.errors import MismatchError, UnsupportedError
from coremerge.extras import TOKEN_ROWS, end_of, token_ids
from coremerge.formats.base_weights import BaseModel
from coremerge.formats.checkpoint import shorten
from coremerge.formats.conv1d import Layouts
from coremerge.formats.ends import find_ends, untied
from coremerge.formats.naming import Names, hint, readings
from coremerge.formats.safetensors_file import FACTOR_DTYPES
from coremerge.formats.safetensors_layout import NAMES
from coremerge.formats.vocabulary import Vocabulary, other_vocabulary
from coremerge.lowrank import LowRank

_NESTED = ".base_layer."
"""PEFT's word between a layer of attention and a layer inside of it."""
_PACKED = ("qweight", "weight_packed", "qzeros", "W_q", "weight_q")


@dataclass(frozen=True)
class Edit:
    """What becomes of one tensor of the base, in this order.

    Attributes:
        replace: the extra that takes its place.
        rows: the extra whose rows take the place of some of its rows, and their numbers.
        update: the module whose update is added.
        transposed: whether the base stores it as (in, out).
        times: how often it is added.
        parts: modules of whose updates some rows are added to some of its rows: module, its rows, their places.
        bias: the module whose trained bias is added.
    """

    replace: str | None = None
    rows: tuple[str, tuple[int, ...]] | None = None
    update: str | None = None
    transposed: bool = False
    times: int = 1
    parts: tuple[tuple[str, Tensor, Tensor], ...] = field(default=(), compare=False)
    bias: str | None = None

    @property
    def modules(self) -> tuple[str, ...]:
        """The modules whose updates are added."""
        return tuple(name for name in (self.update, *(name for name, _, _ in self.parts)) if name)

    def differs(self, other: Edit) -> bool:
        """Whether two tensors that were one become different."""
        return self != other or self.modules != other.modules

    def total(self, adapter: Adapter, length: int) -> LowRank | None:
        """The sum of what is added to the tensor of ``length`` rows, in float64; None where nothing is."""
        if self.update:
            update = adapter[self.update] * self.times
            return update.mT if self.transposed else update
        total: LowRank | None = None
        for name, rows, places in self.parts:
            update = adapter[name]
            left = torch.zeros(length, update.rank, dtype=update.dtype).index_copy_(0, places, update.left[rows])
            part = LowRank(left, update.right)
            total = part if total is None else total + part
        return total


@dataclass(frozen=True)
class Rename:
    """How the adapter's names differ from the base's: one of them has a prefix that the other lacks."""

    strip: str = ""
    add: str = ""

    def __call__(self, name: str) -> str:
        return self.add + name.removeprefix(self.strip)

    def __str__(self) -> str:
        return f"without its prefix {self.strip!r}" if self.strip else f"with the prefix {self.add!r} before it"


@dataclass
class Placement:
    """The place of every update, bias and extra of an adapter in its base model.

    Attributes:
        base: the base model.
        adapter: what is added to it.
        edits: tensor name → :class:`Edit`.
        added: name of a tensor that the base lacks → the extra it comes from.
        copied: name of a tensor that the base lacks → the base's that it is, before its own edit.
        shapes: tensor name → its shape, where that is another than in the base.
        config: what changes in ``config.json``.
        notes: what was settled, in plain words.

    Raises:
        MismatchError: something has no place, or one of another shape.
        UnsupportedError: a weight is quantised.
    """

    base: BaseModel
    adapter: Adapter
    edits: dict[str, Edit] = field(default_factory=dict)
    added: dict[str, str] = field(default_factory=dict)
    copied: dict[str, str] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.entries = {key: entry for shard in self.base.shards.values() for key, entry in shard.entries.items()}
        self.ends = find_ends(self.entries, self.base.config, self.adapter)
        self.entries |= {key: self.entries[source] for key, source in self.ends.copies.items()}
        self.layouts = Layouts(self.entries, self.base.config, self.adapter.info.fan_in_fan_out)
        self.names, self.rename = self._find_names()
        if self.names.note:
            self.notes.append(self.names.note)
        if self.rename != Rename():
            self.notes.append(f"the adapter's module names match the base's {self.rename}")
        for name, module in self.adapter.modules.items():
            self._place_update(name, module)
        for name in self.adapter.biases:
            self._place_bias(name)
        for name in self.adapter.extras:
            self._place_extra(name)
        self._untie()
        self._fit_vocabulary()
        self._note_rest()

    def _find_names(self) -> tuple[Names, Rename]:
        """The base's names as they stand, or as another reading of them that finds a place for more.

        Other readings are tried only where something has no place, for they cost time: transformers is loaded.
        """
        best, refused = None, None
        plain, copies = Names({key: key for key in self.entries}), {key: key for key in self.ends.copies}
        for reading in chain([plain], readings(self.base, self.adapter.info, self._wanted)):
            if best and reading.guessed:
                break
            names = replace(reading, keys={**copies, **reading.keys, **self.ends.alias})
            try:
                found = names, self._find_rename(names)
            except (MismatchError, UnsupportedError) as error:
                if not names.guessed and not isinstance(refused, UnsupportedError):
                    refused = error  # of the last: it knows most
                continue
            if best is None or len(self._added(*found)) < len(self._added(*best)):
                best = found
            if not self._added(*best):
                break
        if best is None:
            assert refused is not None, "no reading was found"
            raise refused
        return best

    @property
    def _wanted(self) -> list[str]:
        """Every parameter of the base that the adapter may speak of."""
        weights = [name for module in self.adapter.modules for name in (*_parameters(module), module)]
        biases = [_bias(name) for module in self.adapter.biases for name in _parameters(module)]
        return [*weights, *biases, *map(_plain, self.adapter.extras)]

    def _added(self, names: Names, rename: Rename) -> list[str]:
        """The extras that the base lacks."""
        lacking = [name for name in self.adapter.extras if _find_extra(names, rename, name) is None]
        return [name for name in lacking if _plain(name) not in names.pieces and _plain(name) not in names.scattered]

    def _find(self, parameter: str) -> str | None:
        """The tensor that holds ``parameter``; None where there is none, or it lies in pieces."""
        plain = parameter in self.ends.copies or parameter in self.ends.alias
        return self.names.keys.get(parameter if plain else self.rename(parameter))

    def _find_rename(self, names: Names) -> Rename:
        """The one change of prefix under which every module has a weight."""
        tails: dict[str, list[str]] = {}
        for key in names.keys:
            parts = key.split(".")
            for cut in range(1, min(4, len(parts) - 1)):
                tails.setdefault(".".join(parts[cut:]), []).append(".".join(parts[:cut]) + ".")
        common: set[Rename] | None = None
        for name in self.adapter.modules:
            if not {*self.ends.copies, *self.ends.alias}.isdisjoint(_parameters(name)):
                continue  # it is in no file by its name, which tells nothing of the others
            found = set(self._renames(name, names, tails))
            common = found if common is None else common & found
            if not found or not common:
                raise self._missing(name, names)
        if common is None or Rename() in common:
            return Rename()
        if len(common) > 1:
            raise MismatchError(
                f"the adapter's modules match the base in {len(common)} ways:"
                f" {shorten(sorted(str(rename) for rename in common))}",
                file=self.base.source,
                key=next(iter(self.adapter)),
                remedy="Give the base model that the adapter was trained on",
            )
        return common.pop()

    def _renames(self, module: str, names: Names, tails: Mapping[str, list[str]]) -> Iterator[Rename]:
        for parameter in _parameters(module):
            if parameter in names.keys or parameter in names.pieces:
                yield Rename()
            yield from (Rename(add=prefix) for prefix in tails.get(parameter, ()))
            parts = parameter.split(".")
            for cut in range(1, min(4, len(parts) - 1)):
                if ".".join(parts[cut:]) in names.keys:
                    yield Rename(strip=".".join(parts[:cut]) + ".")

    def _missing(self, module: str, names: Names) -> MismatchError | UnsupportedError:
        stem = module.split(".", 1)[-1]
        packed = [name for name in names.keys if name.endswith(_PACKED) and name.rpartition(".")[0].endswith(stem)]
        if packed:
            return self._quantised(names.keys[packed[0]])
        if not names.scattered.isdisjoint((module, *_parameters(module))):
            return UnsupportedError(
                f"transformers makes the weight of {module} out of tensors of another shape, so its update has no place"
                " in the files",
                file=self.base.source, key=f"{module}.weight",
                remedy="Save the base again with save_pretrained(..., save_original_format=False), and merge into that",
            )  # fmt: skip
        return MismatchError(
            f"the base model has no weight for module {module}",
            file=self.base.source,
            key=f"{module}.weight",
            remedy="Give the base model that the adapter was trained on"
            f" (its tensors: {shorten(sorted(self.entries))}){hint(self.base)}",
        )

    def _quantised(self, key: str) -> UnsupportedError:
        entry = self.entries[key]
        return UnsupportedError(
            f"a quantised weight ({entry.dtype}) cannot take an update",
            file=self.base.source, key=key,
            remedy="Write an adapter, not a model: it goes with this base as it is."
            " Or give the base it was quantised from",
        )  # fmt: skip

    def _place_update(self, name: str, module: Module) -> None:
        known, key = next(((p, key) for p in _parameters(name) if (key := self._find(p))), ("", ""))
        if not key:
            self._place_parts(name, module)
            return
        if self.entries[key].dtype not in FACTOR_DTYPES:
            raise self._quantised(key)
        shape = self.entries[key].shape
        turned = module.kind == "embedding" or (len(shape) == 2 and self.layouts.is_turned(key, module.shape))
        if not _fits(module, shape, turned):
            at = 1 if module.kind == "embedding" else 0
            if self._is_end(key) and len(shape) == 2 and module.shape[1 - at] == shape[1]:
                what = f"{key} takes an update, which needs the base's own rows for all of them"
                raise other_vocabulary(self.base.source, key, shape[0], module.shape[at], what)
            raise self._unlike(key, module)
        if self.edits.get(key, Edit()).modules:
            raise self._twice(key)
        self._edit(key, update=name, transposed=turned, times=self._times(name, known))

    def _place_parts(self, name: str, module: Module) -> None:
        pieces = next(self.names.pieces[p] for p in _parameters(name) if p in self.names.pieces)
        out, inner = module.shape
        for piece in pieces:
            entry, edit = self.entries[piece.key], self.edits.get(piece.key, Edit())
            if entry.dtype not in FACTOR_DTYPES:
                raise self._quantised(piece.key)
            alike = math.prod(entry.shape[1:]) == inner and sum(len(p.rows) for p in pieces) == out
            if module.kind == "embedding" or not alike:
                raise self._unlike(piece.key, module)
            taken = torch.cat([piece.places, *(places for _, _, places in edit.parts)]).tolist()
            if edit.update or len(set(taken)) < len(taken):
                raise self._twice(piece.key)
            self._edit(piece.key, parts=(*edit.parts, (name, piece.rows, piece.places)))

    def _times(self, name: str, parameter: str) -> int:
        """How often PEFT adds the update: an attention layer's out_proj gets it twice, in forward and in merge."""
        if parameter == f"{name}.weight" or _NESTED not in name:
            return 1
        layer = name.rpartition(_NESTED)[0]
        if not self._find(f"{layer}.in_proj_weight"):
            raise UnsupportedError(
                f"{layer} is no attention layer of torch in the base, so what PEFT's base_layer stands for there is"
                " not known",
                file=self.base.source, key=name, remedy="Write an adapter, not a model",
            )  # fmt: skip
        note = (
            "the update of an attention layer's out_proj is added twice, as PEFT does (as of 0.21), in forward and in"
            " its own merge alike"
        )
        if note not in self.notes:
            self.notes.append(note)
        return 2

    def _twice(self, key: str) -> MismatchError:
        return MismatchError(
            "two modules of the adapter are this one weight of the base", file=self.base.source, key=key,
            remedy="Give the base model that the adapter was trained on",
        )  # fmt: skip

    def _unlike(self, key: str, module: Module) -> MismatchError:
        shape, rows = self.entries[key].shape, module.shape[0]
        part = shape[1:] == module.shape[1:] and 0 < rows < shape[0] and shape[0] % rows == 0
        return MismatchError(
            f"the base's weight is {list(shape)}, and the update is {_described(module)}",
            file=self.base.source,
            key=key,
            remedy="Give the base model that the adapter was trained on"
            + ("; or the adapter was saved in shards (ZeRO-3 or FSDP): gather them first" if part else ""),
        )

    def _place_bias(self, name: str) -> None:
        known = [_bias(p) for p in _parameters(name) if self._find(p)]
        if known and known[0].endswith(".in_proj_bias"):
            self.notes.append(f"the bias trained for {name} is left out: PEFT does not add it (as of 0.21)")
            return
        key = self._find(known[0]) if known else None
        if key is None or self.entries[key].shape != self.adapter.modules[name].shape[:1]:
            raise MismatchError(
                f"the adapter trains a bias for {name}, and the base has none of that size there",
                file=self.base.source, key=key or _bias(f"{name}.weight"), remedy="Write an adapter, not a model",
            )  # fmt: skip
        if self.entries[key].dtype not in FACTOR_DTYPES:
            raise self._quantised(key)
        self._edit(key, bias=name)

    def _place_extra(self, name: str) -> None:
        rows, plain = name.endswith(TOKEN_ROWS), _plain(name)
        key = _find_extra(self.names, self.rename, name)
        tensor = self.adapter.extras[name]
        if key is None and (plain in self.names.pieces or plain in self.names.scattered):
            raise UnsupportedError(
                "trained whole, and the base's files hold it in parts or together with others",
                file=self.base.source, key=plain, remedy="Drop it (--extras drop), or write an adapter, not a model",
            )  # fmt: skip
        if rows:
            self._place_rows(name, plain, key, tensor)
        elif key is None:
            self.added[self.rename(plain) if self.rename.add else plain] = name
        else:
            self._place_whole(name, key, tensor)

    def _place_whole(self, name: str, key: str, tensor: Tensor) -> None:
        entry, dtype = self.entries[key], NAMES.get(tensor.dtype, "")
        alike = dtype == entry.dtype or {dtype, entry.dtype} <= FACTOR_DTYPES.keys()
        shape = tuple(tensor.shape)
        resized = alike and self._is_end(key) and shape[1:] == entry.shape[1:] and shape[0] != entry.shape[0]
        if resized:
            self.shapes[key] = shape
        elif entry.shape != shape or not alike:
            raise MismatchError(
                f"the base's tensor is {entry.dtype} {list(entry.shape)}, and the adapter's {dtype}"
                f" {list(tensor.shape)}",
                file=self.base.source, key=key, remedy="Drop it (--extras drop), or write an adapter, not a model",
            )  # fmt: skip
        if key in self.edits:
            raise MismatchError(
                "trained whole by one adapter and adapted by another",
                file=self.base.source, key=key, remedy="Drop the whole one: --extras drop",
            )  # fmt: skip
        self._edit(key, replace=name)

    def _place_rows(self, name: str, plain: str, key: str | None, tensor: Tensor) -> None:
        ids = token_ids(self.adapter, name)
        shape = self.entries[key].shape if key else ()
        if key and self._is_end(key) and shape[1:] == tuple(tensor.shape[1:]) and max(ids, default=0) >= shape[0]:
            what = "some of its new tokens' rows are read from the adapter, but not the whole table"
            sizes = [len(self.adapter.extras[one]) for one in self.adapter.extras if end_of(one)]
            raise other_vocabulary(self.base.source, key, shape[0], max(max(ids) + 1, *sizes, 0), what)
        if key is None or shape[1:] != tuple(tensor.shape[1:]) or not all(0 <= i < shape[0] for i in ids):
            raise MismatchError(
                f"rows for tokens up to {max(ids, default=0)}, each {list(tensor.shape[1:])}, and the base's table is"
                f" {list(shape) if key else 'missing'}",
                file=self.base.source,
                key=key or plain,
                remedy="Give the base model with the vocabulary that the adapter was trained on",
            )
        self._edit(key, rows=(name, ids))
        for other in self.ends.tied_to(key) if key == self.ends.input else ():
            self._edit(other, rows=(name, ids))  # PEFT trains the rows of both ends

    def _edit(self, key: str, **changes: object) -> None:
        self.edits[key] = replace(self.edits.get(key, Edit()), **changes)  # type: ignore[arg-type]

    def _note_rest(self) -> None:
        replaced = [key for key, edit in self.edits.items() if edit.replace]
        if replaced:
            self.notes.append(f"taken whole from the adapter: {shorten(replaced)}")
        if self.added:
            self.notes.append(
                f"added, for the base has no such tensor: {shorten(self.added)}; load the model with the class of that"
                " task, and see to its settings in config.json (num_labels, ...)"
            )
        if self.copied:
            self.notes.append(f"no longer tied, and written on its own: {shorten(self.copied)}")
        if self.unties:
            self.notes.append("tie_word_embeddings was switched off: input and output layer are no longer the same")
        if self.base.left:
            self.notes.append(f"left out, for they hold the base's weights: {shorten(map(str, self.base.left))}")

    def _untie(self) -> None:
        """Give tensors that were one, and become different, each its own place."""
        apart = [group for group in self.ends.groups if self._differs(group)]
        brought = self.ends.tied and not self.ends.outputs.isdisjoint(self.added)
        self.unties = self.ends.flagged and (bool(apart) or brought)
        self.config |= untied(self.base.config) if self.unties else {}
        parted = {key for group in apart for key in group}
        for key, source in self.ends.copies.items():
            if self.unties or (key in parted and self._becomes(key).differs(self._becomes(source))):
                self.copied[key] = source
            else:
                self.edits.pop(key, None)

    def _becomes(self, key: str) -> Edit:
        return self.edits.get(key, Edit())

    def _differs(self, group: tuple[str, ...]) -> bool:
        """Whether its tensors become different; if both ends are replaced by one table, so is all that is tied."""
        changes = {self._becomes(key) for key in group}
        tables = [self.adapter.extras[edit.replace] for edit in changes if edit.replace and edit == Edit(edit.replace)]
        ends = [key for key in group if key in (self.ends.input, *self.ends.outputs) and key in self.edits]
        same = len(ends) > 1 and len(tables) == len(changes - {Edit()})
        if not same or not all(torch.equal(tables[0], table) for table in tables):
            return any(self._becomes(key).differs(self._becomes(group[0])) for key in group)
        for key in group:
            self._edit(key, replace=self.edits[ends[0]].replace)
            self.shapes |= {key: self.shapes[ends[0]]} if ends[0] in self.shapes else {}
        return False

    def _is_end(self, key: str) -> bool:
        """Whether ``key`` has a row or an entry for each token."""
        tables = {self.ends.input, *self.ends.outputs, *(one for group in self.ends.groups for one in group)}
        return key in tables or f"{key.removesuffix('bias')}weight" in tables

    def _fit_vocabulary(self) -> None:
        if not self.shapes:
            return
        entries = {
            key: entry for key, entry in self.entries.items() if key in self.copied or key not in self.ends.copies
        }
        brought = {key: shape for key, shape in self.shapes.items() if key in entries}
        config = {**self.base.config, **self.config}
        vocabulary = Vocabulary(self.base.source, entries, config, self.ends, self.adapter.info)
        padded, changes = vocabulary.fitted(brought)
        self.shapes = brought | padded
        self.config |= changes
        rows = next(iter(brought.values()))[0]
        told = f"; with zeros for the further tokens: {shorten(padded)}" if padded else ""
        self.notes.append(
            f"the vocabulary has {rows} tokens now, as the adapter's; its tokenizer belongs to it, not the base's{told}"
        )


def _parameters(module: str) -> list[str]:
    """What the weight of ``module`` may be called."""
    names = [f"{module}.weight", f"{module}.in_proj_weight"]
    return [*names, f"{module.replace(_NESTED, '.')}.weight"] if _NESTED in module else names


def _bias(weight: str) -> str:
    """What the bias beside ``weight`` is called."""
    return weight.removesuffix("weight") + "bias"


def _plain(extra: str) -> str:
    """The parameter that an extra takes the place of, in whole or in rows."""
    return extra.removesuffix(TOKEN_ROWS) + ".weight" if extra.endswith(TOKEN_ROWS) else extra


def _find_extra(names: Names, rename: Rename, extra: str) -> str | None:
    """The tensor that an extra takes the place of; None where there is none."""
    plain = _plain(extra)
    return next((names.keys[name] for name in (plain, rename(plain)) if name in names.keys), None)


def _fits(module: Module, shape: tuple[int, ...], turned: bool) -> bool:
    """Whether a weight of ``shape`` can be this module's; ``turned``: it holds the update's transpose."""
    out, inner = module.shape
    if turned:
        return shape == (inner, out)
    return shape[:1] == (out,) and math.prod(shape[1:]) == inner and shape[2:] == module.kernel


def _described(module: Module) -> str:
    out, inner = module.shape
    if module.kind == "embedding":
        return f"an embedding's, {[inner, out]}"
    return f"a {module.kind} layer's, {[out, inner // math.prod(module.kernel), *module.kernel]}"
