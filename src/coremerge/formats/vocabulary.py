"""A vocabulary of another size than the base's: tables that an adapter brings whole, and what must fit them.

Added tokens, padding to a multiple of 64, or a table that was cut to the tokenizer's length.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from coremerge.adapter import Info
from coremerge.errors import MismatchError
from coremerge.formats.ends import Ends, stored
from coremerge.formats.safetensors_file import Entry
from coremerge.formats.skeleton import skeleton

_KEYS = ("vocab_size", "n_words", "n_vocab")

Shapes = Mapping[str, tuple[int, ...]]


def other_vocabulary(source: object, key: str, base: int, adapter: int, what: str) -> MismatchError:
    """The refusal of a vocabulary that does not fit."""
    return MismatchError(
        f"the base's vocabulary has {base} tokens and the adapter's {adapter}, and {what}",
        file=source, key=key,
        remedy=f"Give the base with the adapter's own vocabulary: resize it to {adapter} tokens, load the adapter on it"
        " with PEFT, and save what unload() returns",
    )  # fmt: skip


def with_vocabulary(config: Mapping[str, Any], old: int, new: int) -> dict[str, Any]:
    """What changes in ``config.json`` where the tables have ``new`` rows in place of ``old``."""
    parts = {key: {**part, **with_vocabulary(part, old, new)} for key, part in config.items() if isinstance(part, dict)}
    changed = {key: part for key, part in parts.items() if part != config[key]}
    return changed | {key: new for key in _KEYS if config.get(key) == old and not isinstance(config[key], bool)}


@dataclass(frozen=True)
class Vocabulary:
    """What a base must become to take tables of another vocabulary.

    Attributes:
        source: the base, for messages.
        entries: its tensors, and those that are written beside them.
        config: its ``config.json``.
        ends: its input and output.
        info: of the adapter.
    """

    source: object
    entries: Mapping[str, Entry]
    config: Mapping[str, Any]
    ends: Ends
    info: Info

    def fitted(self, brought: Shapes) -> tuple[dict[str, tuple[int, ...]], dict[str, Any]]:
        """Tensor name → the shape it is padded or cut to, and the changes of the config, so that ``brought`` fits.

        Numbers of single tokens become zeros, as in transformers' own ``resize_token_embeddings``.

        Args:
            brought: the names of tables of another vocabulary, and their shapes.

        Raises:
            MismatchError: they do not agree, or something of the old size would stay.
        """
        first, shape = next(iter(brought.items()))
        old, new = self.entries[first].shape[0], shape[0]
        changes = with_vocabulary(self.config, old, new) or {"vocab_size": new}
        needed = dict(self._needed(changes, old, new))
        padded: dict[str, tuple[int, ...]] = {}
        for key, wanted in (needed | {key: (new, *other[1:]) for key, other in brought.items()}).items():
            found = brought.get(key, self.entries[key].shape)
            if key in brought and key not in needed:
                raise other_vocabulary(self.source, key, old, new, "the model has no such table there")
            if found != wanted and (key in brought or max(found[:-1], default=1) > 1):
                raise other_vocabulary(self.source, key, old, new, f"the adapter brings no {key} of that size")
            if found != wanted:
                padded[key] = wanted
        return padded, changes

    def _needed(self, changes: Mapping[str, Any], old: int, new: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Each tensor whose shape depends on the vocabulary, and what it must be."""
        was, becomes = (skeleton(told, self.info, self.entries) for told in (self.config, {**self.config, **changes}))
        if not was or not becomes:
            yield from self._needed_by_name(old, new)
            return
        for name, shape in becomes.shapes.items():
            key = stored(name, self.entries, was.shapes)
            if key and shape != was.shapes.get(name):
                yield key, shape

    def _needed_by_name(self, old: int, new: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        for key, entry in self.entries.items():
            table = key in (self.ends.input, *self.ends.outputs, *(one for group in self.ends.groups for one in group))
            if table and len(entry.shape) > 1:
                yield key, (new, *entry.shape[1:])
            elif entry.shape[-1:] == (old,) and (table or key.endswith(("final_logits_bias", "lm_head.bias"))):
                yield key, (*entry.shape[:-1], new)
