"""Merge low-rank adapters in Core Space: any LoRA-like adapters in, one adapter out.

The public surface::

    load(path) -> Adapter              read an adapter from a folder, a file or a hub id
    merge(adapters, recipe) -> MergeResult
    Recipe(...)                        what to do, validated
    Adapter, LowRank                   an adapter and one module's update

Everything is imported when first used, so that ``import coremerge`` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from coremerge.adapter import Adapter as Adapter
    from coremerge.errors import CoremergeError as CoremergeError
    from coremerge.formats import load as load
    from coremerge.lowrank import LowRank as LowRank
    from coremerge.merging import MergeResult as MergeResult
    from coremerge.merging import merge as merge
    from coremerge.recipe import Recipe as Recipe

__version__ = "0.1.0"

_HOME = {
    "Adapter": "adapter",
    "CoremergeError": "errors",
    "LowRank": "lowrank",
    "MergeResult": "merging",
    "Recipe": "recipe",
    "load": "formats",
    "merge": "merging",
}

__all__ = ["Adapter", "CoremergeError", "LowRank", "MergeResult", "Recipe", "__version__", "load", "merge"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'coremerge' has no attribute {name!r}")
    return getattr(import_module(f"coremerge.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
