"""One adapter's files, opened, with its keys sorted by what they are."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from coremerge.adapter import Info, Lazy
from coremerge.errors import TensorError, UnsupportedError
from coremerge.extras import OUTPUTS, end_of
from coremerge.formats.config import Config
from coremerge.formats.names import PREFIX, Names
from coremerge.formats.nested import settle
from coremerge.formats.patterns import ends_of
from coremerge.formats.safetensors_file import EIGHT_BITS, Tensors, read_whole
from coremerge.formats.source import Location
from coremerge.hashing import Stamp

_EMBEDDINGS = ("embed_tokens", "lm_head")  # what PEFT saves whole when the vocabulary was resized
_HEADS = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}
_TOKENS = ".token_adapter.trainable_tokens_delta"
_SAVED_COPY = re.compile(r"\.modules_to_save\.[^.]+(?=\.)")


@dataclass(frozen=True)
class Options:
    """What a person may say of a base model that an adapter's files do not tell: see :func:`coremerge.formats.load`."""

    base: str | Path | None = None
    vera_width: int | None = None
    cache_dir: str | Path | None = None
    token: str | bool | None = None


@dataclass(frozen=True)
class Checkpoint:
    """What every dialect reads from; names in the config are those of the base model: see :class:`Names`."""

    location: Location
    config: Config
    tensors: Tensors
    stamps: Mapping[Path, Stamp]
    options: Options = Options()
    names: Names = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", Names(self.tensors.entries, self.config.raw))
        object.__setattr__(self, "config", replace(self.config, raw=self.names.settings()))


@dataclass
class Keys:
    """The keys of a checkpoint by role; names are the base model's.

    Attributes:
        parts: module → part of the update (``lora_A``, ``lora_B.bias``, ...) → stored key.
        shared: part that belongs to no module (``vera_A``) → stored key.
        extras: parameter name → stored key.
        saved: the names of ``modules_to_save`` that the extras belong to.
        token_indices: module → trained token ids.
        notes: what was normalised or left unread.
    """

    parts: dict[str, dict[str, str]] = field(default_factory=dict)
    shared: dict[str, str] = field(default_factory=dict)
    extras: dict[str, str] = field(default_factory=dict)
    saved: list[str] = field(default_factory=list)
    token_indices: dict[str, tuple[int, ...]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def sort_keys(checkpoint: Checkpoint, parts: Iterable[str], shared: Iterable[str] = ()) -> Keys:
    """Give each stored key its role; a key that nothing reads is an error.

    Args:
        checkpoint: the opened files.
        parts: the names of this dialect's per-module tensors, without ``.weight`` (``lora_A``, ``lora_B.bias``).
        shared: the names of tensors that belong to the whole adapter.

    Raises:
        TensorError: a stray key, two keys for one tensor, or several adapters in one file.
        UnsupportedError: trained biases of the base model; LoRA on expert parameters.
    """
    keys = _Sorter(checkpoint, parts, shared).run()
    settle(checkpoint, keys)
    stored = {checkpoint.tensors.entries[key].dtype for parts in keys.parts.values() for key in parts.values()}
    if short := sorted(stored & EIGHT_BITS.keys()):
        keys.notes.append(f"stored in 8 bits ({', '.join(short)}): read exactly; what is made of it is bfloat16")
    return keys


class _Sorter:
    def __init__(self, checkpoint: Checkpoint, parts: Iterable[str], shared: Iterable[str]) -> None:
        self.parts = frozenset(parts)
        alternatives = "|".join(re.escape(part) for part in self.parts if "." not in part)
        self.part = re.compile(rf"(.+)\.({alternatives})(?:\.([^.]+?))??(\.weight|\.bias)?")
        self.shared = re.compile(
            rf"(?:(?:.+\.)?base_model\.)?({'|'.join(map(re.escape, shared)) or '(?!)'})(?:\.[^.]+)?"
        )
        self.config, self.file, self.names = checkpoint.config, checkpoint.tensors, checkpoint.names
        self.keys = Keys()
        self.adapters: dict[str, str] = {}
        self.stray: list[str] = []
        self.biases: list[str] = []
        self.bases: list[str] = []
        self.originals: list[str] = []

    def run(self) -> Keys:
        bare = 0
        for key in self.file.entries:
            name = self.names(key)
            found_part = self.part.fullmatch(name)
            found_shared = self.shared.fullmatch(name)
            bare += PREFIX not in key and not found_shared
            if found_shared:
                self._put(self.keys.shared, found_shared[1], key)
            elif found_part:
                self._add_part(key, found_part)
            else:
                self._add_rest(key, name)
        self._check()
        self.keys.notes += self.names.notes
        if bare:
            self.keys.notes.append(f"{bare} keys without the prefix {PREFIX}")
        if self.adapters:
            self.keys.notes.append(f"keys with the adapter name {next(iter(self.adapters))!r} left in")
        if self.bases:
            self.keys.notes.append(f"whole base weights left unread: {shorten(self.bases)}")
        odd = [name for name in self.keys.parts if "._" in f".{name}"]
        if odd:
            self.keys.notes.append(f"{shorten(odd)}: a step with an underscore in front, as wrappers have; it is kept")
        if self.originals:
            self.keys.notes.append(f"copies of the base's own modules left unread: {shorten(self.originals)}")
        return self.keys

    def _add_part(self, key: str, match: re.Match[str]) -> None:
        module, part, adapter, leaf = match.groups()
        part += ".bias" if leaf == ".bias" else ""
        if part not in self.parts:
            self.stray.append(key)
            return
        if adapter:
            self.adapters.setdefault(adapter, key)
        self._put(self.keys.parts.setdefault(module, {}), part, key)

    def _add_rest(self, key: str, name: str) -> None:
        copied = _SAVED_COPY.search(name)
        plain = _SAVED_COPY.sub("", name)
        owner = self._owner(plain)
        if _TOKENS in name:
            self._add_tokens(key, name)
        elif ".original_module." in name:
            self.originals.append(key)
        elif ".base_layer." in name:
            (self.bases if not name.endswith(".bias") else self.biases).append(key)
        elif copied or owner:
            self._put(self.keys.extras, plain, key)
            saved = owner or plain.rpartition(".")[0]
            if saved not in self.keys.saved:
                self.keys.saved.append(saved)
            if owner and owner == end_of(plain) and owner not in self.config.names("modules_to_save"):
                self.keys.notes.append(f"{plain} is saved whole (PEFT does so for a resized vocabulary)")
        elif name.endswith(".bias"):
            self.biases.append(key)
        else:
            self.stray.append(key)

    def _owner(self, name: str) -> str | None:
        """The entry of ``modules_to_save`` (or of what PEFT saves unasked) that parameter ``name`` belongs to."""
        listed = (*self.config.names("modules_to_save"), *_HEADS.get(self.config.optional_text("task_type") or "", ()))
        steps = name.split(".")[:-1]
        paths = [".".join(steps[: n + 1]) for n in range(len(steps))]
        for target in (*listed, *_EMBEDDINGS):
            if target and any(path == target or path.endswith("." + target) for path in paths):
                return target
        # PEFT's own rule is a bare endswith, so "head" also names "lm_head"
        loose = next((target for target in listed if target and any(p.endswith(target) for p in paths)), None)
        return loose or end_of(name)

    def _add_tokens(self, key: str, name: str) -> None:
        module = name[: name.index(_TOKENS)]
        if end_of(f"{module}.weight") in OUTPUTS and self._is_tied_copy(key):
            return
        self._put(self.keys.extras, module + _TOKENS, key)
        self.keys.token_indices[module] = self._token_ids(module, key)

    def _is_tied_copy(self, key: str) -> bool:
        """Whether these are the rows of an input once more: PEFT lists only that one's ids, and keeps both the same."""
        given = self.config.raw.get("trainable_token_indices")
        listed = [f".{target}{_TOKENS}" for target in given] if isinstance(given, dict) else []
        of = [other for other in self.file.entries for end in listed if end in f".{other}" and other != key]
        return len(listed) == 1 and any(torch.equal(self.file.read(other), self.file.read(key)) for other in of)

    def _token_ids(self, module: str, key: str) -> tuple[int, ...]:
        given = self.config.raw.get("trainable_token_indices")
        ids = given
        if isinstance(given, dict):
            ids = next((v for k, v in given.items() if module == k or module.endswith("." + k)), None)
        rows = self.file.entries[key].shape[:1]
        whole = isinstance(ids, list) and all(isinstance(i, int) and not isinstance(i, bool) for i in ids)
        if not whole or (len(ids),) != rows:  # type: ignore[arg-type]
            raise self.config.wrong(
                "trainable_token_indices",
                f"must list the {rows[0] if rows else 0} token ids whose rows are in {key}",
                "Save the adapter again with PEFT",
            )
        return tuple(ids)  # type: ignore[arg-type]

    def _put(self, into: dict[str, str], name: str, key: str) -> None:
        if name in into:
            raise TensorError(
                f"two tensors for one place: {into[name]} and {key}",
                file=self.file.path,
                key=key,
                remedy="Keep one of them; a file with several adapters must be split first",
            )
        into[name] = key

    def _check(self) -> None:
        if len(self.adapters) > 1:
            raise TensorError(
                f"several adapters in one file: {', '.join(self.adapters)}",
                file=self.file.path,
                key=list(self.adapters.values())[1],
                remedy="Save each adapter on its own",
            )
        embedded = {key.rpartition(".")[0] for key in self.bases}  # PEFT saves a targeted lm_head's bias with it
        declared = self.config.text("bias", "none") != "none"
        biases = [key for key in self.biases if declared or key.rpartition(".")[0] not in embedded]
        if biases:
            raise UnsupportedError(
                f"trained biases of the base model ({shorten(biases)}) cannot be merged without that model",
                file=self.file.path if not declared else self.config.path,
                key="bias" if declared else biases[0],
                **({"value": self.config.raw["bias"]} if declared else {}),
                remedy='Train with bias="none", or merge this adapter into its base first',
            )
        if self.stray:
            flat = any(key.endswith("flat_param") for key in self.stray)
            raise TensorError(
                f"nothing reads {shorten(self.stray)}: {len(self.stray)} of {len(self.file.entries)} tensors",
                file=self.file.path,
                key=self.stray[0],
                remedy="These are FSDP's flattened shards: gather the full state, then save again"
                if flat
                else "If it is a module trained whole, list it in the config's modules_to_save",
            )


def shorten(names: Iterable[str], most: int = 3) -> str:
    """The first few names, and how many more there are."""
    listed = list(names)
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + more


def no_modules(checkpoint: Checkpoint) -> TensorError:
    """The error for a file without a single module of its dialect."""
    return TensorError(
        f"no {checkpoint.config.type} module among its {len(checkpoint.tensors.entries)} tensors",
        file=checkpoint.tensors.path,
        remedy="Check that training found its target_modules, and that the config belongs to this file",
    )


def info(checkpoint: Checkpoint, keys: Keys, notes: Iterable[str] = (), warnings: Iterable[str] = ()) -> Info:
    """What the files say of themselves."""
    config, location = checkpoint.config, checkpoint.location
    return Info(
        source=location.source,
        type=config.type,
        base_model=config.optional_text("base_model_name_or_path"),
        revision=location.revision,
        base_revision=config.optional_text("revision"),
        task_type=config.optional_text("task_type"),
        fan_in_fan_out=config.flag("fan_in_fan_out"),
        layer_replication=config.layer_replication,
        auto_mapping=config.table("auto_mapping") or None,
        modules_to_save=tuple(keys.saved),
        token_indices=dict(keys.token_indices),
        targets=() if checkpoint.names.moved else _targets(config, keys.parts),
        files=location.files,
        stamps=checkpoint.stamps,
        beside=location.beside,
        notes=(*keys.notes, *notes, *location.notes),
        warnings=(*location.warnings, *_lacking(config, keys), *warnings),
    )


def _lacking(config: Config, keys: Keys) -> list[str]:
    """Trained modules that the config lists and the file lacks; of PEFT's two names for a head one is enough."""
    listed = config.names("modules_to_save")
    heads = set(_HEADS.get(config.optional_text("task_type") or "", ()))
    found = heads & set(keys.saved)
    lost = [name for name in listed if name not in keys.saved and not (found and name in heads)]
    if not lost:
        return []
    what = "tensors" if len(lost) > 1 else "tensor"
    return [f"modules_to_save lists {shorten(lost)}, and the file has no such {what}: what was trained there is lost"]


def _targets(config: Config, modules: Iterable[str]) -> tuple[str, ...]:
    """Ends of names such that PEFT adapted all of the base's modules of such names: nothing narrowed them down."""
    said = config.raw.get("target_modules")
    if config.given("exclude_modules") or config.raw.get("layers_to_transform") not in (None, []):
        return ()
    if isinstance(said, str):
        return ends_of(said, modules)
    return tuple(name for name in said if isinstance(name, str) and name) if isinstance(said, list) else ()


def extras(checkpoint: Checkpoint, keys: Keys) -> Mapping[str, Tensor]:
    """The whole tensors the adapter carries, read when asked for."""
    return Lazy(tuple(keys.extras), lambda name: read_whole(checkpoint.tensors, keys.extras[name]))


def with_note(described: Info, note: str) -> Info:
    """``described`` with one more note."""
    return replace(described, notes=(*described.notes, note))
