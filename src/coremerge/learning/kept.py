"""The modules of a fit that are done, in a file: to go on from where it stopped."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from coremerge import __version__
from coremerge.adapter import Adapter
from coremerge.formats.journal import Journal
from coremerge.learning.backbone import Batch

SAMPLE = 256
"""Numbers of a parameter by which models are told apart: training changes them all."""


BEYOND = "beyond "
"""Before the name of a module whose rows they are: no module's name has a blank in it."""


class Kept:
    """Module name → its core (p, q + e), the e rows that it reads beyond its adapters' own, and what is said of it.

    Args:
        path: of a journal, see :class:`~coremerge.formats.journal.Journal` and its errors; None: nothing is kept.
        mark: of all that the cores depend on: see :func:`mark_of`.
    """

    def __init__(self, path: Path | None, mark: str) -> None:
        self._journal = None if path is None else Journal(path, mark)
        self._new: list[str] = []
        self.cores: dict[str, Tensor] = {}
        self.beyond: dict[str, Tensor] = {}
        self.said: dict[str, Any] = {}
        if self._journal:
            with ExitStack() as undo:
                undo.callback(self._journal.close)
                for part in self._journal.parts:
                    self.said |= part.facts
                    for name, tensor in self._journal.tensors(part).items():
                        if name in part.facts:
                            self.cores[name] = tensor
                        else:
                            self.beyond[name.removeprefix(BEYOND)] = tensor
                undo.pop_all()

    def put(self, name: str, core: Tensor, said: Mapping[str, Any], beyond: Tensor | None = None) -> None:
        """One more module."""
        self.cores[name], self.said[name] = core, dict(said)
        if beyond is not None and len(beyond):
            self.beyond[name] = beyond
        self._new.append(name)

    def write(self) -> None:
        """Keep the modules that came since the last time."""
        if self._journal and self._new:
            said, cores = ({name: held[name] for name in self._new} for held in (self.said, self.cores))
            beyond = {f"{BEYOND}{name}": self.beyond[name] for name in self._new if name in self.beyond}
            self._journal.add(said, cores | beyond)
        for name in self._new:
            self.beyond.pop(name, None)
        self._new = []

    def close(self) -> None:
        """Let go of the file."""
        if self._journal:
            self._journal.close()


def mark_of_model(model: nn.Module) -> str:
    """What tells models apart: a hash of their parameters' names and shapes, and of some numbers of each."""
    digest = hashlib.sha256()
    parameters = [(name, p) for name, p in model.named_parameters() if p.device.type != "meta"]
    digest.update(repr([(name, p.shape, p.dtype) for name, p in parameters]).encode())
    for _, parameter in parameters:
        digest.update(_bytes(parameter.reshape(-1)[:SAMPLE]))
    return digest.hexdigest()


def mark_of(
    model: str,
    adapters: Mapping[str, Adapter],
    batches: Mapping[str, Sequence[Batch]],
    settings: Mapping[str, Any],
) -> str:
    """A hash of the model's mark (:func:`mark_of_model`), inputs, adapters and settings."""
    versions = [__version__, torch.__version__]
    digest = hashlib.sha256(json.dumps([versions, model, settings], sort_keys=True, default=str).encode())
    for name, adapter in adapters.items():
        modules = [(key, m.shape, m.rank, m.scale) for key, m in adapter.modules.items()]
        digest.update(repr((name, modules)).encode())
        for key in adapter:
            update = adapter.read(key)
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
