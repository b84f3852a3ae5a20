"""Emoji renders with names: pictures of npm's ``@lobehub/fluent-emoji-3d``, names of Unicode's ``emoji-test.txt``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image
from scenes import SIDE

MOST_FLAGS = 60
"""Of the flags, whose names no picture tells unless it was learnt by heart, so many at most."""

LINE = re.compile(r"([0-9A-F ]+?)\s*; fully-qualified\s*# \S+ E[\d.]+ (.+)")
SKIN_TONES = range(0x1F3FB, 0x1F400)
KINDS = {  # the first prefix of "group/subgroup" that fits
    "Smileys & Emotion/heart": "sign",
    "Smileys & Emotion/emotion": "sign",
    "Smileys & Emotion": "face",
    "People & Body/hand": "hand",
    "People & Body/person": "person",
    "Animals & Nature/animal": "animal",
    "Animals & Nature/plant": "plant",
    "Food & Drink": "food",
    "Travel & Places/place": "place",
    "Travel & Places/transport": "vehicle",
    "Travel & Places/time": "clock",
    "Travel & Places/sky": "weather",
    "Activities": "game",
    "Objects": "object",
    "Symbols": "sign",
    "Flags": "flag",
}


@dataclass(frozen=True)
class Emoji:
    """One emoji.

    Attributes:
        name: its CLDR short name.
        kind: one of the values of :data:`KINDS`.
        file: its render, a WebP of 256 px with an alpha channel.
    """

    name: str
    kind: str
    file: Path


def read_emoji(assets: Path, names: Path) -> list[Emoji]:
    """All emoji that have a render, a name and a kind, in Unicode's order; without skin tones and families.

    Args:
        assets: the package's folder of renders.
        names: Unicode's ``emoji-test.txt``.
    """
    found, group = [], ""
    for line in names.read_text(encoding="utf-8").splitlines():
        if line.startswith("# group: "):
            group = line.removeprefix("# group: ")
        elif line.startswith("# subgroup: "):
            group = group.partition("/")[0] + "/" + line.removeprefix("# subgroup: ")
        elif match := LINE.match(line):
            codes = [int(code, 16) for code in match[1].split()]
            kind = next((KINDS[prefix] for prefix in KINDS if group.startswith(prefix)), None)
            file = assets / ("-".join(f"{code:04x}" for code in codes) + ".webp")
            if kind and file.is_file() and not any(code in SKIN_TONES for code in codes):
                found.append(Emoji(match[2].lower().replace("“", "").replace("”", ""), kind, file))
    return found


def without_most_flags(emoji: list[Emoji], rng: Generator) -> list[Emoji]:
    """With :data:`MOST_FLAGS` of kind flag, drawn at random."""
    flags = [i for i, one in enumerate(emoji) if one.kind == "flag"]
    out = set(flags) - set(rng.permutation(flags)[:MOST_FLAGS].tolist())
    return [one for i, one in enumerate(emoji) if i not in out]


def paint(emoji: Emoji, rng: Generator) -> NDArray[np.uint8]:
    """The emoji on a light ground, at a random place and size: bytes of (84, 84, 3)."""
    ground = Image.new("RGB", (SIDE, SIDE), tuple(int(v) for v in rng.integers(150, 256, 3)))
    size = int(rng.integers(62, 81))
    with Image.open(emoji.file) as opened:
        cut_out = opened.convert("RGBA").resize((size, size), Image.Resampling.LANCZOS)
    x, y = (int(v) for v in rng.integers(0, SIDE - size + 1, 2))
    ground.paste(cut_out, (x, y), cut_out)
    return np.asarray(ground).copy()
