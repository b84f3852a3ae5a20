"""Files beside adapters' own that are carried over as they are: trained weights, a tokenizer, a chat template.

Carried where one adapter has it or all copies are equal, byte for byte; else left out with a warning, unless the
policy of whole tensors (:mod:`coremerge.extras`) says which to take. Unlike those it is no part of what PEFT loads
(each task of one merged encoder may keep a head of its own), so a difference is no reason to refuse. Files are not
averaged: they are copied as they are, pickles unopened.
"""

from __future__ import annotations

import filecmp
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from coremerge.adapter import Adapter

Kind = Literal["weights", "tokenizer", "chat template"]

TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "vocab.txt", "merges.txt", "*.tiktoken", "tokenizer.model*", "spiece.model", "sentencepiece*.model", "source.spm",
    "target.spm", "tekken.json",
)  # fmt: skip
TEMPLATE = ("chat_template.jinja", "chat_template.json")
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
_STATE = (
    "*optim*", "*scheduler*", "rng_state*", "random_states*", "training_args*", "args.bin", "*scaler*", "sampler*",
    "dl_state*", "zero_pp_rank_*", "mp_rank_*", "custom_checkpoint_*",
)  # fmt: skip


def is_state(name: str) -> bool:
    """Whether a file is training's own: it is of no use to a merge."""
    return any(fnmatch(name, pattern) for pattern in _STATE)


def kind_of(name: str) -> Kind | None:
    """What a file beside an adapter is, by its name; None: nothing that is carried over.

    Example:
        >>> [kind_of(name) for name in ("value_head.bin", "tokenizer.json", "optimizer.pt", "README.md")]
        ['weights', 'tokenizer', None, None]
    """
    if any(fnmatch(name, pattern) for pattern in TOKENIZER):
        return "tokenizer"
    if name in TEMPLATE:
        return "chat template"
    return "weights" if name.endswith(WEIGHTS) and not is_state(name) else None


@dataclass(frozen=True)
class Carried:
    """What becomes of a file, or of the files of a tokenizer.

    Attributes:
        name: the file's, or what they are together.
        holders: the adapters that have it.
        decision: in plain words.
        files: name → what it is copied from; empty: nothing is written.
        lost: whether something that was trained is left out, though nobody asked for that.
    """

    name: str
    holders: tuple[str, ...]
    decision: str
    files: Mapping[str, Path]
    lost: bool = False


def plan_files(adapters: Mapping[str, Adapter], policy: str | None) -> dict[str, Carried]:
    """Decide on every file beside the adapters' own; ``policy`` is that of :func:`~coremerge.extras.plan_extras`."""
    held = {key: adapter.info.beside for key, adapter in adapters.items()}
    found: dict[str, dict[str, None]] = {}
    for name in sorted({name for files in held.values() for name in files}):
        kind = kind_of(name) or "weights"
        found.setdefault(name if kind == "weights" else kind, {})[name] = None
    return {label: _decide(label, names, held, policy) for label, names in found.items()}


def _decide(label: str, names: Collection[str], held: Mapping[str, Mapping[str, Path]], policy: str | None) -> Carried:
    """``names`` are files that only make sense together: those that several adapters have must be equal."""
    own = {key: {name: files[name] for name in names if name in files} for key, files in held.items()}
    own = {key: files for key, files in own.items() if files}
    holders, joined = tuple(own), {name: file for files in reversed(own.values()) for name, file in files.items()}
    apart = [name for name in names if not _equal([files[name] for files in own.values() if name in files])]
    if not apart:
        which = f" from {holders[0]}" if len(holders) == 1 else ": equal in all that have it"
        return Carried(label, holders, f"carried over{which}", joined)
    if policy == "drop":
        return Carried(label, holders, "dropped, as asked", {})
    if policy in own:
        return Carried(label, holders, f"taken from {policy}, as asked", own[policy])
    which = "" if apart == [label] else f" ({', '.join(apart)})"
    what = f"left out, as it differs between {', '.join(holders)}{which}; --extras {holders[0]} takes that one"
    return Carried(label, holders, what, {}, lost=label in names)


def _equal(files: Sequence[Path]) -> bool:
    return all(filecmp.cmp(files[0], file, shallow=False) for file in files[1:])
