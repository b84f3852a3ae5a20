"""Files beside adapters' own that are carried over as they are: trained weights, a tokenizer, a chat template.

Weights go by the policy of whole tensors (:mod:`coremerge.extras`): carried where one adapter has them or all copies
are equal, else refused unless it is said which to take. A tokenizer or a template that differs is left out, and said:
nothing of the merge depends on it. Pickles are copied, never opened.
"""

from __future__ import annotations

import filecmp
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from coremerge.errors import MismatchError

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
        files: name → what it is copied from; several: their average. Empty: nothing is written.
    """

    name: str
    holders: tuple[str, ...]
    decision: str
    files: Mapping[str, tuple[Path, ...]]


def plan_files(adapters: Mapping[str, Adapter], policy: str | None) -> dict[str, Carried]:
    """Decide on every file beside the adapters' own; ``policy`` is that of :func:`~coremerge.extras.plan_extras`.

    Raises:
        MismatchError: weights that differ, and no policy was given that says which to take.
    """
    held = {key: adapter.info.beside for key, adapter in adapters.items() if adapter.info.beside}
    weights = sorted({name for files in held.values() for name in files if kind_of(name) == "weights"})
    found = {name: _weights(name, held, policy) for name in weights}
    for kind in ("tokenizer", "chat template"):
        found |= {one.name: one for one in _together(kind, held, policy)}
    return found


Held = Mapping[str, Mapping[str, tuple[Path, ...]]]
"""Adapter → file name → the file."""


def _weights(name: str, held: Held, policy: str | None) -> Carried:
    copies = {key: files[name] for key, files in held.items() if name in files}
    holders = tuple(copies)
    if _agree(copies):
        return Carried(name, holders, _carried_from(holders), {name: copies[holders[0]]})
    if policy == "drop":
        return Carried(name, holders, "dropped, as asked", {})
    if policy == "average" and name.endswith(".safetensors"):
        return Carried(
            name, holders, "averaged, as asked", {name: tuple(path for one in copies.values() for path in one)}
        )
    if policy in copies:
        return Carried(name, holders, f"taken from {policy}, as asked", {name: copies[policy]})
    asked = "; a pickle is not averaged" if policy == "average" else f"; {policy!r} does not have it" if policy else ""
    average = ", --extras average" if name.endswith(".safetensors") else ""
    raise MismatchError(
        f"weights beside the adapters that differ between {', '.join(holders)}{asked}", key=name,
        remedy=f"Say which to take (--extras {holders[0]}){average}, or --extras drop",
    )  # fmt: skip


def _together(kind: Kind, held: Held, policy: str | None) -> Iterator[Carried]:
    """Files that only make sense together; those that several adapters have must be equal."""
    own = {key: {name: path for name, path in files.items() if kind_of(name) == kind} for key, files in held.items()}
    holders = tuple(key for key, files in own.items() if files)
    names = sorted({name for files in own.values() for name in files})
    copies = {name: {key: own[key][name] for key in holders if name in own[key]} for name in names}
    apart = [name for name in names if not _agree(copies[name])]
    if not names:
        return
    if not apart:
        files = {name: next(iter(copies[name].values())) for name in names}
        yield Carried(kind, holders, _carried_from(holders), files)
    elif policy in holders:
        yield Carried(kind, holders, f"taken from {policy}, as asked", own[policy])
    else:
        differ = f"not carried over: it differs between {', '.join(holders)} ({', '.join(apart)})"
        yield Carried(kind, holders, f"{differ}; --extras {holders[0]} takes that one", {})


def _carried_from(holders: tuple[str, ...]) -> str:
    return f"carried over from {holders[0]}" if len(holders) == 1 else "carried over: equal in all that have it"


def _agree(copies: Mapping[str, tuple[Path, ...]]) -> bool:
    first, *others = copies.values()
    return all(one == first or (len(one) == len(first) == 1 and filecmp.cmp(one[0], first[0], False)) for one in others)
