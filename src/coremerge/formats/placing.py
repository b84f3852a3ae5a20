"""Where an adapter's updates, biases and whole tensors belong in the base model's own files."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain

import torch
from torch import Tensor

from coremerge.adapter import Adapter, Module
from coremerge.errors import MismatchError, UnsupportedError
from coremerge.extras import TOKEN_ROWS, token_ids
from coremerge.formats.base_weights import BaseModel
from coremerge.formats.checkpoint import shorten
from coremerge.formats.naming import Names, hint, readings
from coremerge.formats.safetensors_file import FACTOR_DTYPES
from coremerge.formats.safetensors_layout import NAMES
from coremerge.lowrank import LowRank

_INPUT_TABLES = ("embed_tokens", "wte", "word_embeddings", "embed_in", "shared")
_OUTPUT_TABLES = ("lm_head.weight", "embed_out.weight", "output.weight")
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
    parts: tuple[tuple[str, Tensor, Tensor], ...] = ()
    bias: str | None = None

    @property
    def modules(self) -> tuple[str, ...]:
        """The modules whose updates are added."""
        return tuple(name for name in (self.update, *(name for name, _, _ in self.parts)) if name)

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
        notes: what was settled, in plain words.

    Raises:
        MismatchError: something has no place, or one of another shape.
        UnsupportedError: a weight is quantised.
    """

    base: BaseModel
    adapter: Adapter
    edits: dict[str, Edit] = field(default_factory=dict)
    added: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.entries = {key: entry for shard in self.base.shards.values() for key, entry in shard.entries.items()}
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
        self._note_rest()

    def _find_names(self) -> tuple[Names, Rename]:
        """The base's names as they stand, or as another reading of them that finds a place for more.

        Other readings are tried only where something has no place, for they cost time: transformers is loaded.
        """
        best, refused = None, None
        plain = Names({key: key for key in self.entries})
        for names in chain([plain], readings(self.base, self.adapter.info, self._wanted)):
            if best and names.guessed:
                break
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
        return self.names.keys.get(self.rename(parameter))

    def _find_rename(self, names: Names) -> Rename:
        """The one change of prefix under which every module has a weight."""
        tails: dict[str, list[str]] = {}
        for key in names.keys:
            parts = key.split(".")
            for cut in range(1, min(4, len(parts) - 1)):
                tails.setdefault(".".join(parts[cut:]), []).append(".".join(parts[:cut]) + ".")
        common: set[Rename] | None = None
        for name in self.adapter.modules:
            found = set(self._renames(name, names, tails))
            common = found if common is None else common & found
            if not found or not common:
                raise self._missing(name, names)
        assert common is not None, "an adapter has modules"
        if Rename() in common:
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
        tied = " (it shares the input embedding's, so it cannot change alone)" if module.endswith("lm_head") else ""
        return MismatchError(
            f"the base model has no weight for module {module}{tied}",
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
        transposed = _transposed(module, shape, self.adapter.info.fan_in_fan_out)
        if transposed is None:
            raise self._unlike(key, module)
        if self.edits.get(key, Edit()).modules:
            raise self._twice(key)
        self._edit(key, update=name, transposed=transposed, times=self._times(name, known))

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
        return MismatchError(
            f"the base's weight is {list(self.entries[key].shape)}, and the update is {_described(module)}",
            file=self.base.source,
            key=key,
            remedy="Give the base model that the adapter was trained on",
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
        if entry.shape != tuple(tensor.shape) or not alike:
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
        if key is None or shape[1:] != tuple(tensor.shape[1:]) or not all(0 <= i < shape[0] for i in ids):
            raise MismatchError(
                f"rows for tokens up to {max(ids, default=0)}, each {list(tensor.shape[1:])}, and the base's table is"
                f" {list(shape) if key else 'missing'}",
                file=self.base.source,
                key=key or plain,
                remedy="Give the base model with the vocabulary that the adapter was trained on",
            )
        self._edit(key, rows=(name, ids))
        for output in filter(_is_output, self.entries) if self.ties and _is_input(key) else ():
            if self.entries[output].shape == shape:  # PEFT trains the rows of both ends
                self._edit(output, rows=(name, ids))

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
        tables = [key for key in self._changed if _is_input(key)]
        if tables and self.ties and not self.unties:
            self.notes.append(
                f"{tables[0]} is also the output layer of this base (tied weights): its change acts on both ends, as"
                " in PEFT's own merge_and_unload; the adapter alone acts on the input"
            )
        if self.unties:
            self.notes.append("tie_word_embeddings was switched off: input and output layer are no longer the same")
        if self.base.left:
            self.notes.append(f"left out, for they hold the base's weights: {shorten(map(str, self.base.left))}")

    @property
    def ties(self) -> bool:
        """Whether the base's output layer is its input embedding: its config says so, or nothing, and it has none."""
        inner = self.base.config.get("text_config")
        said = {**self.base.config, **(inner if isinstance(inner, dict) else {})}.get("tie_word_embeddings")
        return bool(said) if said is not None else not any(map(_is_output, self.entries))

    @property
    def unties(self) -> bool:
        """Whether they are no longer one: both are in the files, and the adapter brings or changes one of them.

        Some bases hold the output layer although it is tied; which of the two counts then depends on the reader.
        """
        if not self.ties or not any(map(_is_output, (*self.entries, *self.added))):
            return False
        return any(_is_output(key) or _is_input(key) for key in (*self.added, *self._changed))

    @property
    def _changed(self) -> list[str]:
        """The tensors of which more than some rows change."""
        return [key for key, edit in self.edits.items() if edit.replace or edit.modules]


def _is_input(key: str) -> bool:
    return key.removesuffix(".weight").endswith(_INPUT_TABLES)


def _is_output(key: str) -> bool:
    return key.endswith(_OUTPUT_TABLES)


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


def _transposed(module: Module, shape: tuple[int, ...], fan_in_fan_out: bool) -> bool | None:
    """Whether a weight of ``shape`` holds the update's transpose; None where it cannot be this module's."""
    out, inner = module.shape
    turned = len(shape) == 2 and shape == (inner, out)
    if module.kind == "embedding":
        return True if turned else None
    if turned and fan_in_fan_out:
        return True
    fits = shape[:1] == (out,) and math.prod(shape[1:]) == inner and shape[2:] == module.kernel
    return False if fits else None


def _described(module: Module) -> str:
    out, inner = module.shape
    if module.kind == "embedding":
        return f"an embedding's, {[inner, out]}"
    return f"a {module.kind} layer's, {[out, inner // math.prod(module.kernel), *module.kernel]}"
