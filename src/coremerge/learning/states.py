"""What a pass through a model leaves for the next one: trees of tensors, in memory or on disk."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from coremerge.errors import OutputError

Leaf = TypeVar("Leaf")


class States:
    """Trees of tensors by key.

    Args:
        folder: where they are written, a file each; None: they are kept in memory.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self._kept: dict[Hashable, tuple[Any, Any]] = {}
        self._files = 0

    def __setitem__(self, key: Hashable, tree: Any) -> None:
        """Keep ``tree``.

        Raises:
            OutputError: the folder's disk is full, ...
        """
        tensors: list[Tensor] = []
        shape = _taken_apart(tree, tensors)
        if self.folder is None:
            self._kept[key] = shape, [tensor.detach() for tensor in tensors]
            return
        path = self._kept[key][1][0] if key in self._kept else self.folder / f"{self._files}.safetensors"
        self._files += key not in self._kept
        try:
            save_file({str(i): tensor.detach().cpu().contiguous().clone() for i, tensor in enumerate(tensors)}, path)
        except (SafetensorError, OSError) as error:
            remedy = "Free some space, or name another folder: --spill"
            raise OutputError(f"hidden states do not go there: {error}", file=self.folder, remedy=remedy) from None
        self._kept[key] = shape, (path, [tensor.device for tensor in tensors])

    def __getitem__(self, key: Hashable) -> Any:
        shape, held = self._kept[key]
        if self.folder is None:
            return _put_together(shape, held)
        path, devices = held
        read = load_file(path)
        # a copy: files do not lie in memory as torch lays its own tensors out, which products of matrices can tell
        return _put_together(shape, [read[str(i)].to(device, copy=True) for i, device in enumerate(devices)])

    def __contains__(self, key: Hashable) -> bool:
        return key in self._kept

    def clear(self) -> None:
        """Forget all."""
        for key in list(self._kept):
            self.drop(key)

    def drop(self, key: Hashable) -> None:
        """Forget what is kept under ``key``, if anything."""
        _, held = self._kept.pop(key, (None, None))
        if self.folder is not None and held is not None:
            held[0].unlink()


def mapped(tree: Any, kind: type[Leaf], change: Callable[[Leaf], Any]) -> Any:
    """``tree`` of tuples, lists and mappings with its leaves of a ``kind`` changed."""
    if isinstance(tree, kind):
        return change(tree)
    if isinstance(tree, (tuple, list)):
        parts = [mapped(part, kind, change) for part in tree]
        return type(tree)(*parts) if hasattr(tree, "_fields") else type(tree)(parts)
    if isinstance(tree, Mapping):
        return type(tree)({key: mapped(part, kind, change) for key, part in tree.items()})  # type: ignore[call-arg]
    return tree


class _Place(int):
    pass


def _taken_apart(tree: Any, tensors: list[Tensor]) -> Any:
    """``tree`` with places in ``tensors`` for its tensors."""

    def place(tensor: Tensor) -> _Place:
        tensors.append(tensor)
        return _Place(len(tensors) - 1)

    return mapped(tree, Tensor, place)


def _put_together(shape: Any, tensors: list[Tensor]) -> Any:
    return mapped(shape, _Place, lambda place: tensors[place])
