"""Which target modules are measured: all, those of the last quarter of the blocks, or those that match a pattern."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from coremerge.errors import ConfigError
from coremerge.learning.forward import MergedModel

LAST_QUARTER = "last-quarter"
ALL = "all"


def choose_modules(merged: MergedModel, which: str) -> list[str]:
    """Names of target modules.

    Args:
        merged: the model.
        which: ``"all"``, ``"last-quarter"`` (of the blocks, counted in the model; of each stack, if it has several), or
            a shell pattern of full names, such as ``"*.v_proj"``; several are separated by commas.

    Raises:
        ConfigError: none is left.
    """
    chosen = _chosen(merged, which)
    if not chosen:
        raise _nothing(merged, which)
    return chosen


def _chosen(merged: MergedModel, which: str) -> list[str]:
    names = list(merged.targets)
    if which == ALL:
        return names
    if which == LAST_QUARTER:
        return [name for name in names if _in_last_quarter(merged.model, merged.targets[name].path)]
    patterns = [pattern.strip() for pattern in which.split(",")]
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]


def _nothing(merged: MergedModel, which: str) -> ConfigError:
    first, *others = merged.targets
    return ConfigError(
        "measures none of the adapted modules", key="modules", value=which,
        remedy=f"Give all, last-quarter or a pattern; the adapters have {first} and {len(others)} more",
    )  # fmt: skip


def measured_of(merged: MergedModel, which: str) -> dict[str, list[str]]:
    """Adapter → those of its modules that :func:`choose_modules` names.

    An adapter that has nothing in the last quarter of the model's blocks is measured in the last quarter of its own.
    """
    chosen, found = set(_chosen(merged, which)), {}
    for adapter in merged.adapters:
        own = [name for name, target in merged.targets.items() if adapter in target.adapters]
        found[adapter] = [name for name in own if name in chosen]
        if not found[adapter] and which == LAST_QUARTER:
            found[adapter] = _last_quarter_of(merged, own)
    if not any(found.values()):
        raise _nothing(merged, which)
    return found


def _last_quarter_of(merged: MergedModel, names: Sequence[str]) -> list[str]:
    """Of the blocks that these modules are in, counted in each stack."""
    places = {name: place[:2] for name in names if (place := block_of(merged.model, merged.targets[name].path))}
    stacks: dict[str, list[int]] = {}
    for stack, block in sorted(set(places.values())):
        stacks.setdefault(stack, []).append(block)
    return [n for n, (stack, block) in places.items() if _is_late(stacks[stack].index(block), len(stacks[stack]))]


def _in_last_quarter(model: nn.Module, path: str) -> bool:
    place = block_of(model, path)
    return place is not None and _is_late(*place[1:])


def _is_late(at: int, count: int) -> bool:
    """Whether a block is in the last quarter of so many: the last one is."""
    return at >= min(0.75 * count, count - 1)


def block_of(model: nn.Module, path: str) -> tuple[str, int, int] | None:
    """The stack that ``path`` is in, its place there, and the stack's length; None for a module outside of any.

    A stack is the outermost list of modules on the way, or else the outermost sequence of layers.
    """
    found: dict[type[nn.Module], tuple[str, int, int]] = {}
    for match in re.finditer(r"\.(\d+)(?=\.|$)", path):
        stack = path[: match.start()]
        module = model.get_submodule(stack)
        for kind in (nn.ModuleList, nn.Sequential):
            if isinstance(module, kind):
                found.setdefault(kind, (stack, int(match.group(1)), len(module)))
    return found.get(nn.ModuleList, found.get(nn.Sequential))
