"""The modules of a fit that are done, in a file: to go on from where it stopped."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from coremerge.adapter import Adapter
from coremerge.errors import ConfigError, SourceError
from coremerge.formats.atomic import write_file
from coremerge.learning.backbone import Batch

FORMAT = "coremerge.fit.1"


class Kept:
    """Module name → its core (p, q) and what is said of it.

    Args:
        path: of the file; None: nothing is kept.
        mark: of all that the cores depend on: see :func:`mark_of`.

    Raises:
        SourceError: the file is there, and is no such file.
        ConfigError: it belongs to other adapters, inputs or settings.
    """

    def __init__(self, path: Path | None, mark: str) -> None:
        self.path, self.mark = path, mark
        self.cores: dict[str, Tensor] = {}
        self.said: dict[str, Any] = {}
        if path is not None and path.exists():
            self._read(path)

    def _read(self, path: Path) -> None:
        try:
            with safe_open(path, framework="pt") as file:
                about = json.loads((file.metadata() or {}).get("coremerge", "{}"))
                self.cores = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, ValueError) as error:
            raise SourceError(f"cannot be read: {error}", file=path, remedy="Remove it to begin anew") from None
        if about.get("format") != FORMAT:
            raise SourceError("holds no part of a fit", file=path, remedy="Name another file")
        if about.get("mark") != self.mark:
            raise ConfigError(
                "belongs to other adapters, inputs or settings", key="resume", value=str(path),
                remedy="Remove it to begin anew, or give what it was begun with",
            )  # fmt: skip
        self.said = about["modules"]

    def put(self, name: str, core: Tensor, said: Mapping[str, Any]) -> None:
        """One more module."""
        self.cores[name], self.said[name] = core, dict(said)

    def write(self) -> None:
        """The file with all modules so far."""
        if self.path is None:
            return
        about = json.dumps({"format": FORMAT, "mark": self.mark, "modules": self.said})
        tensors = {name: core.contiguous() for name, core in self.cores.items()}
        write_file(self.path, save(tensors, {"coremerge": about}), overwrite=True)


def mark_of(
    model: nn.Module,
    adapters: Mapping[str, Adapter],
    batches: Mapping[str, Sequence[Batch]],
    settings: Mapping[str, Any],
) -> str:
    """A hash of inputs and settings, and of what tells models and adapters apart: shapes, and their first numbers."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    parameters = [(name, p) for name, p in model.named_parameters() if p.device.type != "meta"]
    digest.update(repr([(name, p.shape, p.dtype) for name, p in parameters]).encode())
    for _, parameter in parameters[:1]:
        digest.update(_bytes(parameter.reshape(-1)[:4096]))
    for name, adapter in adapters.items():
        modules = [(key, m.shape, m.rank, m.scale) for key, m in adapter.modules.items()]
        digest.update(repr((name, modules)).encode())
        for key in list(adapter)[:1]:
            update = adapter[key]
            digest.update(_bytes(update.left))
            digest.update(_bytes(update.right))
    for task, listed in batches.items():
        for batch in listed:
            for key, value in sorted(batch.items()):
                digest.update(repr((task, key, getattr(value, "shape", value))).encode())
                digest.update(_bytes(value) if isinstance(value, Tensor) else b"")
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
