"""What a base model's files call the modules of an adapter, where they call them otherwise.

Files keep the names they were first saved with; transformers renames modules from one version to the next, and loads
those files through a mapping of its own (``transformers.conversion_mapping``). Where it is installed, its mapping is
asked; where it is not, each tower (language model, vision tower, projector) may have a prefix of its own.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import groupby, islice
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from coremerge.adapter import Info
from coremerge.formats.base_weights import BaseModel
from coremerge.formats.safetensors_file import Entry
from coremerge.formats.skeleton import is_model

_DEPTHS = re.compile(r"num_(hidden_)?layers|n_layers?|depth|(num_)?(en|de)coder_layers")


@dataclass(frozen=True)
class Piece:
    """Rows of a parameter that lie in a tensor of the files.

    Attributes:
        key: the tensor.
        rows: rows of the parameter (n).
        places: the rows of the tensor that they are (n).
    """

    key: str
    rows: Tensor = field(compare=False)
    places: Tensor = field(compare=False)


@dataclass(frozen=True)
class Names:
    """What the names of parameters mean in the files.

    Attributes:
        keys: parameter → the tensor that holds it.
        pieces: parameter → its rows, where they lie in one tensor with others' or in several.
        scattered: parameters that the files hold in another shape, such as a stack of experts.
        note: how they were matched, in plain words; empty where the names are the same.
        guessed: whether nobody vouches for it.
    """

    keys: Mapping[str, str]
    pieces: Mapping[str, tuple[Piece, ...]] = field(default_factory=dict)
    scattered: frozenset[str] = frozenset()
    note: str = ""
    guessed: bool = False


def readings(base: BaseModel, info: Info, wanted: Collection[str]) -> Iterator[Names]:
    """Other names for the tensors of ``base``, the surest first; ``wanted`` are the parameters to be found."""
    yield from _by_transformers(base, info, wanted)
    yield _by_towers(base, wanted)


def hint(base: BaseModel) -> str:
    """What would help to match names, if anything."""
    if _has_mapping() or "model_type" not in base.config:
        return ""
    return ", or install transformers 5, which knows how the names in its files and its modules differ"


def _has_mapping() -> bool:
    return bool(find_spec("transformers") and find_spec("transformers.conversion_mapping"))


def _by_transformers(base: BaseModel, info: Info, wanted: Collection[str]) -> Iterator[Names]:
    """The names as each class that the files or the adapter speak of would load them."""
    entries = {key: entry for shard in base.shards.values() for key, entry in shard.entries.items()}
    if "model_type" not in base.config or _deepest(base.config) > len(entries) or not _has_mapping():
        return
    for kind, config in _classes(base.config, info):
        try:
            names = _Loader(kind, config, entries)(wanted)
        except Exception:  # another's code, on a config that may say anything: it has nothing to tell
            continue
        yield names


def _deepest(said: Mapping[str, Any]) -> int:
    """The most layers that a config speaks of; more of them than tensors would be built for nothing."""
    inner = (_deepest(value) for value in said.values() if isinstance(value, dict))
    own = (value for key, value in said.items() if _DEPTHS.fullmatch(key) and isinstance(value, int))
    return max((*inner, *own), default=0)


def _by_towers(base: BaseModel, wanted: Collection[str]) -> Names:
    """One prefix for all of a tower, where the files have one that holds all of it and speaks of no other tower."""
    there: dict[str, set[str]] = {}
    for key in (key for shard in base.shards.values() for key in shard.entries):
        head, tail = _cut(key)
        there.setdefault(tail, set()).add(head)
    keys: dict[str, str] = {}
    notes = []
    cut = sorted((*_cut(name), name) for name in wanted)
    for head, group in groupby(cut, key=itemgetter(0)):
        tower = [(tail, name) for _, tail, name in group if tail in there]
        heads = set.intersection(*(there[tail] for tail, _ in tower)) if tower else set()
        new = head if head in heads else _likest(head, heads)
        if new is not None:
            keys |= {name: new + tail for tail, name in tower}
            notes += [f"{head or 'no prefix'} is {new or 'no prefix'} there"] if new != head else []
    return Names(keys, note=f"names matched to the files' tower by tower: {', '.join(notes)}", guessed=True)


def _cut(name: str) -> tuple[str, str]:
    """The tower's prefix, and the rest: from the list of layers on, or the last two steps where there is none."""
    steps = name.split(".")
    at = next((i - 1 for i, step in enumerate(steps) if step.isdigit() and i), len(steps) - 2)
    return ".".join([*steps[: max(at, 0)], ""]) if at > 0 else "", ".".join(steps[max(at, 0) :])


def _likest(head: str, heads: Collection[str]) -> str | None:
    """The one of ``heads`` that shares most words with ``head``; None for a tie, or where each speaks of another."""
    shared = {new: len(_words(new) & _words(head)) for new in heads}
    best = [new for new in heads if shared[new] == max(shared.values())]
    alien = len(best) == 1 and not shared[best[0]] and _words(best[0]) and _words(head)
    return best[0] if len(best) == 1 and not alien else None


def _words(head: str) -> set[str]:
    return set(re.split(r"[._]", head)) - {"", "model"}


def _classes(said: Mapping[str, Any], info: Info) -> Iterator[tuple[Any, Any]]:
    """Classes of transformers that load such a model, each with its config."""
    import transformers as library
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

    try:
        config = CONFIG_MAPPING[said["model_type"]].from_dict(dict(said))
    except Exception:  # as above
        return
    listed = said.get("architectures")
    names = [(info.auto_mapping or {}).get("base_model_class"), *(listed if isinstance(listed, list) else ())]
    kinds = [getattr(library, name, None) for name in names if isinstance(name, str)]
    if info.task_type == "CAUSAL_LM":
        kinds.append(MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None))
    kinds.append(MODEL_MAPPING.get(type(config), None))
    towers = [config, config.get_text_config(), *(getattr(config, name, None) for name in config.sub_configs)]
    for kind in dict.fromkeys(kinds):
        if kind is not None and is_model(kind, library):
            owned = (own for own in towers if isinstance(own, kind.config_class or ()))
            yield from ((kind, own) for own in islice(owned, 1))


class _Loader:
    """How transformers loads a model's files, name by name: see ``convert_and_load_state_dict_in_model`` there."""

    def __init__(self, kind: Any, config: Any, entries: Mapping[str, Entry]) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        with torch.device("meta"):  # names and shapes, no memory
            self.model = kind(config)
        self.parameters: dict[str, Tensor] = self.model.state_dict()
        self.entries = entries
        steps = get_model_conversion_mapping(self.model)
        self.renamings = [step for step in steps if isinstance(step, WeightRenaming)]
        self.converters = [step for step in steps if isinstance(step, WeightConverter)]
        self.by_pattern = {pattern: step for step in self.converters for pattern in step.source_patterns}

    def __call__(self, wanted: Collection[str]) -> Names:
        from transformers.core_model_loading import dot_natural_key

        keys: dict[str, str] = {}
        converted: dict[str, list[tuple[str, str]]] = {}
        for key in sorted(self.entries, key=dot_natural_key):
            name, pattern = self._rename(key)
            if pattern is None:
                keys.setdefault(name, key)
            else:
                keys.setdefault(self._rename(key, convert=False)[0], key)
                converted.setdefault(name, []).append((key, pattern))
        for name in wanted:
            if name not in keys and name not in self.parameters:  # as modules were called before
                old = [self._rename(name)[0], self._rename(name, convert=False)[0]]
                keys.update((name, keys[new]) for new in old[::-1] if new in keys)
        pieces, scattered = self._pieces(converted, wanted)
        example = next((f": {name} is {keys[name]}" for name in wanted if keys.get(name, name) != name), "")
        note = f"names matched as transformers does where it loads {type(self.model).__name__}{example}"
        return Names(keys, pieces, frozenset(scattered), note)

    def _rename(self, key: str, convert: bool = True) -> tuple[str, str | None]:
        from transformers.core_model_loading import rename_source_key

        prefix = self.model.base_model_prefix
        converters = self.converters if convert else []
        name, pattern = rename_source_key(key, self.renamings, converters, prefix, self.parameters)
        if name not in self.parameters and key in self.parameters:
            name, pattern = rename_source_key(key, [], [], prefix, self.parameters)
        return name, pattern

    def _pieces(
        self, converted: Mapping[str, list[tuple[str, str]]], wanted: Collection[str]
    ) -> tuple[dict[str, tuple[Piece, ...]], set[str]]:
        """Where the rows of each wanted parameter lie that transformers makes out of others, or whole tensors."""
        pieces: dict[str, tuple[Piece, ...]] = {}
        scattered: set[str] = set()
        for name, sources in converted.items():
            step = self.by_pattern[sources[0][1]]
            made = {name.replace(step.target_patterns[0], target) for target in step.target_patterns}
            if made.isdisjoint(wanted):
                continue
            try:
                found = self._convert(step, name, sources)
            except Exception:  # it does more than to move rows
                found = {}
            pieces |= found
            scattered |= made - found.keys()
        return pieces, scattered

    def _convert(self, step: Any, name: str, sources: list[tuple[str, str]]) -> dict[str, tuple[Piece, ...]]:
        """Its conversion, of row numbers instead of rows."""
        step, starts, start = deepcopy(step), {}, 0
        for key, pattern in sources:
            shape = self.entries[key].shape
            rows = torch.arange(start, start + shape[0]).reshape(-1, *(1 for _ in shape[1:]))
            step.add_tensor(name, key, pattern, rows)
            starts[key] = start
            start += shape[0]
        found = {}
        for made, value in step.convert(name, model=self.model, config=self.model.config).items():
            rows, parameter = value[0] if isinstance(value, list) else value, self.parameters[made]
            if rows.shape == (parameter.shape[0], *(1 for _ in parameter.shape[1:])):
                found[made] = tuple(self._split(rows.flatten(), starts))
        return found

    def _split(self, rows: Tensor, starts: Mapping[str, int]) -> Iterator[Piece]:
        for key, start in starts.items():
            here = ((rows >= start) & (rows < start + self.entries[key].shape[0])).nonzero().flatten()
            if len(here):
                yield Piece(key, here, rows[here] - start)
