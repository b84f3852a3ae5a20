"""Hundreds of module names as a few patterns."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True)
class Group(Generic[K]):
    """Modules whose names differ in numbers only and that are alike in what matters.

    Attributes:
        pattern: such as ``model.layers.[0-31].self_attn.q_proj``.
        names: theirs.
        alike: what they have in common.
    """

    pattern: str
    names: tuple[str, ...]
    alike: K


def group(modules: Mapping[str, K]) -> list[Group[K]]:
    """Group module names by their pattern and by what is known of each.

    Example:
        >>> [(g.pattern, g.alike) for g in group({"layers.0.q": 8, "layers.1.q": 8, "layers.2.q": 4, "head": 8})]
        [('layers.[0-1].q', 8), ('layers.2.q', 4), ('head', 8)]
    """
    found: dict[tuple[str, K], list[str]] = {}
    for name in sorted(modules, key=_natural):
        found.setdefault((re.sub(r"(?<![^.])\d+(?![^.])", "#", name), modules[name]), []).append(name)
    ordered = sorted(found.items(), key=lambda item: _natural(item[1][0]), reverse=False)
    return [
        Group(_pattern(names), tuple(names), alike) for (_, alike), names in sorted(ordered, key=_first_number_last)
    ]


def listed(modules: Mapping[str, str], most: int = 12) -> str:
    """Module names in a sentence, each with what is said of it: at most so many patterns.

    Example:
        >>> listed({"layers.0.q": "", "layers.1.q": "", "head": " (math)"})
        'layers.[0-1].q, head (math)'
        >>> listed({"layers.0.q": "", "layers.1.q": "", "head": " (math)"}, most=1)
        'layers.[0-1].q and 1 more'
    """
    groups = group(modules)
    rest = sum(len(found.names) for found in groups[most:])
    return ", ".join(f"{found.pattern}{found.alike}" for found in groups[:most]) + (f" and {rest} more" if rest else "")


def _first_number_last(item: tuple[tuple[str, object], list[str]]) -> bool:
    """Modules outside the numbered layers come last."""
    return "#" not in item[0][0]


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _pattern(names: list[str]) -> str:
    columns = zip(*(name.split(".") for name in names), strict=True)
    return ".".join(parts[0] if len(set(parts)) == 1 else f"[{spans(map(int, parts))}]" for parts in columns)


def spans(numbers: Iterable[int]) -> str:
    """Whole numbers as ranges.

    Example:
        >>> spans([0, 1, 2, 5, 7, 8])
        '0-2,5,7-8'
    """
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
