"""How large the base's own weights are where an adapter changes them."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from coremerge.adapter import Adapter
from coremerge.executors import local
from coremerge.formats.base_weights import BLOCK, Shard, open_base
from coremerge.formats.placing import Edit, Placement
from coremerge.formats.safetensors_file import FACTOR_DTYPES

Progress = Callable[[int, int], None]


def squared_norms(base: str | Path, adapter: Adapter, **how: Any) -> dict[str, float]:
    """:func:`norms_at` of an adapter and its base model's folder, hub id or URL.

    Raises:
        SourceError: the base cannot be read.
        MismatchError: a module has no weight in the base, or one of another shape.
        UnsupportedError: such a weight is quantised, or all are pickles.
    """
    return norms_at(Placement(open_base(base), adapter), **how)


def norms_at(placement: Placement, *, threads: int | None = None, progress: Progress | None = None) -> dict[str, float]:
    """Module → ‖W‖_F² of the weight, or of the rows of a fused one, that the adapter has an update for.

    Only these weights are read, each once; the adapter's factors are not.

    Raises:
        SourceError: the base cannot be read.
    """
    edits = {key: edit for key, edit in placement.edits.items() if edit.modules}
    found: dict[str, float] = dict.fromkeys(placement.adapter.modules, 0.0)
    done = 0
    for shard in placement.base.shards.values():
        held = {key: placement.copied.get(key, key) for key in edits}
        here = {key: source for key, source in held.items() if source in shard.entries}
        with shard:
            norms = local.run(partial(_rows, shard), here.values(), threads)
            for key, rows in zip(here, norms, strict=True):
                _add(found, edits[key], rows)
                done += 1
                if progress:
                    progress(done, len(edits))
    return found


def _add(found: dict[str, float], edit: Edit, rows: Tensor) -> None:
    if edit.update:
        found[edit.update] += float(rows.sum())
    for name, _, places in edit.parts:
        found[name] += float(rows[places].sum())


def _rows(shard: Shard, key: str) -> Tensor:
    """The squared norms (m,), float64, of a tensor's rows."""
    entry = shard.entries[key]
    dtype, count = FACTOR_DTYPES[entry.dtype], entry.shape[0] if entry.shape else 1
    width = math.prod(entry.shape[1:])
    step = max(1, BLOCK // max(1, width * dtype.itemsize))
    found = torch.zeros(count, dtype=torch.float64)
    for first in range(0, count if width else 0, step):
        last = min(count, first + step)
        piece = shard.read(key, first * width * dtype.itemsize, (last - first) * width * dtype.itemsize)
        values = torch.frombuffer(piece, dtype=dtype).reshape(last - first, width)
        found[first:last] = values.double().square().sum(1)
    return found
