"""Which split a text may be used in, and how many rows each split takes."""

from __future__ import annotations

import functools
import hashlib
import random
from collections.abc import Iterable
from typing import NamedTuple

SIZES = {"train": 6000, "unlabelled": 64, "validation": 100, "test": 300}
SHARES = {"train": 0.76, "unlabelled": 0.04, "validation": 0.06, "test": 0.14}

Fields = dict[str, str]
"""A row as it is written: what the prompt's template names, and ``answer`` or ``label``."""
Splits = dict[str, list[Fields]]


class Example(NamedTuple):
    key: str
    """The text that decides the row's split: the same word, gloss or sentence lies in one split for every task."""
    fields: Fields


@functools.cache
def split_of(text: str) -> str:
    """The split that everything about this text belongs to, from a hash of the text alone."""
    place = int.from_bytes(hashlib.sha256(text.lower().encode()).digest()[:8], "big") / 2**64
    for split, share in SHARES.items():
        place -= share
        if place < 0:
            return split
    return "test"


def take(rng: random.Random, examples: Iterable[Example], *, balanced: bool = False) -> Splits:
    """As many rows a split as SIZES says, no prompt twice; ``balanced``: labels equally often."""
    found = {_prompt(example.fields): example for example in examples}
    rows = rng.sample(list(found.values()), len(found))
    return {split: _some(rows, split, size, balanced) for split, size in SIZES.items()}


def _prompt(fields: Fields) -> tuple[str, ...]:
    return tuple(value for key, value in fields.items() if key not in ("answer", "label"))


def _some(rows: list[Example], split: str, size: int, balanced: bool) -> list[Fields]:
    mine = [row.fields for row in rows if split_of(row.key) == split]
    if not balanced:
        return mine[:size]
    labels = sorted({fields["label"] for fields in mine})
    groups = [[fields for fields in mine if fields["label"] == label] for label in labels]
    turns = (group[i] for i in range(max(map(len, groups))) for group in groups if i < len(group))
    return [fields for _, fields in zip(range(size), turns, strict=False)]
