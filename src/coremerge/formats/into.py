"""Add an adapter's updates to its base model's own weights: W + Δ, shard by shard, block by block.

The result has the base's files, names and dtypes; tensors that the adapter does not touch are copied byte for byte, and
files of nothing but such tensors may be hard links to the base's own. Neither the model nor a whole update is ever in
memory: each thread reads a weight, changes it in float64 and rounds it once, some rows at a time.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from coremerge.adapter import Adapter
from coremerge.errors import UnsupportedError
from coremerge.executors import local
from coremerge.formats.atomic import Resumable, atomic_directory, standing, tensor_file, write_files
from coremerge.formats.base_weights import BLOCK, INDEX_NAME, BaseModel, Shard, dump_index, open_base, reading
from coremerge.formats.beside import write_carried
from coremerge.formats.linking import Links, link_files, one_disk
from coremerge.formats.placing import Edit, Placement
from coremerge.formats.safetensors_file import FACTOR_DTYPES
from coremerge.formats.safetensors_layout import NAMES, Layout, Slot, TensorFile, all_finite, output_dtype, raw, writing
from coremerge.formats.writer import Saved, cast

ENTRIES = 1 << 22
"""Entries of a weight that are in work at a time: 32 MB in float64."""


@dataclass(frozen=True)
class IntoPlan:
    """What :func:`save_into` will do, settled from headers alone.

    Attributes:
        base: the base model.
        adapter: what is added to it.
        dtype: of all floating-point tensors, or None: each keeps its own.
        placement: what goes where.
        layouts: file name → its layout.
        config: what changes in ``config.json``.
    """

    base: BaseModel
    adapter: Adapter
    dtype: torch.dtype | None
    placement: Placement
    layouts: Mapping[str, Layout]
    config: Mapping[str, object]

    @property
    def notes(self) -> tuple[str, ...]:
        """What was settled, in plain words."""
        left = [f"{name}: not carried over, as the base's weights are called so" for name in self._taken]
        return (*self.placement.notes, *left)

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(layout.data_bytes for layout in self.layouts.values())

    @cached_property
    def untouched(self) -> tuple[str, ...]:
        """The files of which every tensor stays as it is."""
        return tuple(name for name in self.layouts if self._is_untouched(name))

    def _is_untouched(self, name: str) -> bool:
        slots, entries = self.layouts[name].slots, self.base.shards[name].entries
        return slots.keys() == entries.keys() and not any(
            key in self.placement.edits or (slot.dtype, slot.shape) != (entries[key].dtype, entries[key].shape)
            for key, slot in slots.items()
        )

    def written(self, *, link: bool = False) -> int:
        """Bytes of the tensors that are written, where files that stay as they are may be links."""
        return self.size - (sum(self.layouts[name].data_bytes for name in self.untouched) if link else 0)

    def write(
        self,
        path: str | Path,
        *,
        link: bool = False,
        overwrite: bool = False,
        threads: int | None = 1,
        files: Mapping[str, str | bytes] | None = None,
        inputs: Iterable[Path] = (),
        resume: Resumable | None = None,
        shards: Callable[[Path, Sequence[str]], Iterator[str]] | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Saved:
        """Carry it out: see :func:`save_into`."""
        texts = {**self._texts(), **(files or {})}
        sources = [self.base.folder / "config.json", *self.adapter.info.files, *inputs]
        needed = self.written(link=link and self._links_work(standing(path)))
        with atomic_directory(path, overwrite=overwrite, inputs=sources, needed=needed, resume=resume) as folder:
            for other in self.base.others:
                if other.as_posix() not in texts:
                    _copy(self.base.folder / other, folder / other)
            write_files(folder, texts)
            write_carried(folder, self.adapter.info.beside, self.adapter.info.stamps, without=self._taken)
            links = self._links(folder, resume) if link else Links()
            layouts = {name: layout for name, layout in self.layouts.items() if name not in links.made}
            if shards:
                missing = [name for name in layouts if resume is None or name not in resume.files]
                for at, name in enumerate(shards(folder, missing), 1):
                    if resume:
                        resume.finish(name)
                    if progress:
                        progress(at, len(missing))
            else:
                self._write_here(folder, layouts, threads, resume, progress)
        out = Path(path).expanduser()
        changed = {
            layout.slots[key].dtype
            for layout in self.layouts.values()
            for key, edit in self.placement.edits.items()
            if edit.modules and key in layout.slots
        }
        dtype = FACTOR_DTYPES[changed.pop()] if len(changed) == 1 else torch.float32
        return Saved(out, tuple(out / name for name in self.layouts), self.size, 0, dtype, (*self.notes, *links.notes))

    def _write_here(
        self,
        folder: Path,
        layouts: Mapping[str, Layout],
        threads: int | None,
        resume: Resumable | None,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        count, done = sum(len(layout.slots) for layout in layouts.values()), 0
        for name, layout in layouts.items():
            with tensor_file(folder, name, layout, resume) as file:
                if file is None:
                    done += len(layout.slots)
                    continue
                with closing(self._write_shard(file, name, threads)) as written:
                    for _ in written:
                        done += 1
                        if progress:
                            progress(done, count)

    def _links_work(self, folder: Path) -> bool:
        return all(one_disk(self.base.folder / name, folder) for name in self.untouched)

    def _links(self, folder: Path, resume: Resumable | None) -> Links:
        stamps = {self.base.folder / name: self.base.shards[name].file.stamp for name in self.untouched}
        return link_files(stamps, folder, resume)

    @property
    def _taken(self) -> list[str]:
        """Files beside the adapter whose names the base's own weights have."""
        return sorted(self.adapter.info.beside.keys() & {*self.layouts, INDEX_NAME})

    def _texts(self) -> dict[str, str]:
        texts = {}
        if self.config:
            texts["config.json"] = json.dumps({**self.base.config, **self.config}, indent=2) + "\n"
        if self.base.index is not None:
            home = {key: name for name, layout in self.layouts.items() for key in sorted(layout.slots)}
            texts[INDEX_NAME] = dump_index(self.base.index, home, self.size)
        return texts

    def modules_in(self, shard: str) -> list[str]:
        """The adapter's modules whose weights are in that file."""
        edits = (self.placement.edits.get(key) for key in self.layouts[shard].slots)
        return sorted({name for edit in edits if edit for name in (*edit.modules, edit.bias) if name})

    def write_shard(self, folder: Path, name: str) -> None:
        """One of the files, into ``folder``."""
        with (
            TensorFile(folder / name, self.layouts[name]) as file,
            closing(self._write_shard(file, name, 1)) as written,
        ):
            for _ in written:
                pass

    def _write_shard(self, file: TensorFile, name: str, threads: int | None) -> Generator[None, None, None]:
        with self.base.shards[name] as shard:
            yield from local.run(lambda key: self._write_tensor(shard, file, key), list(file.layout.slots), threads)

    def _write_tensor(self, shard: Shard, file: TensorFile, key: str) -> None:
        slot, edit = file.layout.slots[key], self.placement.edits.get(key)
        origin = self.placement.copied.get(key, key)
        extra = self.placement.added.get(key) or (edit and edit.replace)
        if extra:
            whole = self.adapter.extras[extra]
            file.write_bytes(key, raw(cast(whole.to(FACTOR_DTYPES.get(slot.dtype, whole.dtype)), whole, key)))
        elif slot.shape != shard.entries[origin].shape:
            file.write_bytes(key, raw(_resized(shard, key, slot)))
        elif edit is None and shard.entries[origin].dtype == slot.dtype:
            for offset, block in shard.blocks(origin):
                file.write_bytes(key, block, offset)
        else:
            self._change(shard, file, key, edit or Edit())
        file.done(key)

    def _change(self, shard: Shard, file: TensorFile, key: str, edit: Edit) -> None:
        origin = self.placement.copied.get(key, key)
        entry, target = shard.entries[origin], FACTOR_DTYPES[file.layout.slots[key].dtype]
        source = FACTOR_DTYPES[entry.dtype]
        length = entry.shape[0] if entry.shape else 1
        width = math.prod(entry.shape[1:])
        update = edit.total(self.adapter, length)
        rows = dict(zip(edit.rows[1], self.adapter.extras[edit.rows[0]], strict=True)) if edit.rows else {}
        step = max(1, ENTRIES // max(1, width))
        for start in range(0, length if width else 0, step):
            stop = min(length, start + step)
            data = shard.read(origin, start * width * source.itemsize, (stop - start) * width * source.itemsize)
            block = torch.frombuffer(data, dtype=source).reshape(stop - start, width).to(torch.float64)
            for row in range(start, stop) if rows else ():
                if row in rows:
                    block[row - start] = rows[row].flatten()
            if update is not None:
                block.addmm_(update.left[start:stop], update.right)
            if edit.bias:
                block += self.adapter.biases[edit.bias][start:stop, None]
            rounded = block.to(target)
            if edit != Edit() or all_finite(block):
                rounded = cast(rounded, block, key)
            file.write_bytes(key, raw(rounded), start * width * target.itemsize)


def _resized(shard: Shard, key: str, slot: Slot) -> Tensor:
    """A tensor of one number a token, cut or with zeros for further tokens."""
    entry = shard.entries[key]
    values = torch.frombuffer(shard.read(key, 0, entry.end - entry.start), dtype=FACTOR_DTYPES[entry.dtype])
    result = torch.zeros(math.prod(slot.shape), dtype=FACTOR_DTYPES[slot.dtype])
    kept = min(len(values), len(result))
    result[:kept] = values[:kept]
    return result.view(slot.shape)


def _copy(source: Path, target: Path) -> None:
    with reading(source):
        data = source.open("rb")
    with data, writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("wb") as file:
            shutil.copyfileobj(data, file, BLOCK)


def save_into(
    base: str | Path,
    adapter: Adapter,
    path: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    link: bool = False,
    overwrite: bool = False,
    threads: int | None = 1,
    files: Mapping[str, str | bytes] | None = None,
    inputs: Iterable[Path] = (),
    resume: Resumable | None = None,
    shards: Callable[[Path, Sequence[str]], Iterator[str]] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Saved:
    """Write the base model with ``adapter`` merged into it, complete or not at all.

    Args:
        base: the base model's folder or hub id; safetensors only.
        adapter: its modules are asked for one by one.
        path: a directory; made, with its parents.
        dtype: of all floating-point tensors; each keeps its own when None.
        link: files of weights that stay as they are become hard links to the base's, where the file system does that.
            Small files, which people edit, are copies all the same.
        overwrite: replace a model that is there already.
        threads: tensors in work side by side; all processors when None.
        files: further small files to put beside it, in place of the base's: name → content.
        inputs: further files that ``adapter`` is read from: never overwritten.
        resume: see :func:`~coremerge.formats.atomic.atomic_directory`.
        shards: writes the files of those names into the folder, in place of this process, and yields each when it is
            whole.
        progress: called with the tensors done and their number; with ``shards``, the files.

    Raises:
        SourceError: the base cannot be read.
        MismatchError: a module has no weight in the base, or one of another shape.
        UnsupportedError: a weight that changes is quantised (with ``dtype``: any weight is), or all are pickles.
        TensorError: a sum that is not finite in its dtype.
        OutputError: it cannot be written there.
    """
    plan = plan_into(base, adapter, dtype=dtype)
    how: dict[str, Any] = {"threads": threads, "files": files, "inputs": inputs, "resume": resume, "progress": progress}
    return plan.write(path, link=link, overwrite=overwrite, shards=shards, **how)


def plan_into(
    base: str | Path,
    adapter: Adapter,
    *,
    dtype: torch.dtype | str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
) -> IntoPlan:
    """Find the place of everything ``adapter`` has in ``base``, from headers alone: see :func:`save_into`."""
    kept = None if dtype is None else output_dtype(dtype)
    if adapter.info.layer_replication:
        raise UnsupportedError(
            "the adapter belongs to a stack of repeated layers, and the base has each of them once",
            key="layer_replication", value=adapter.info.layer_replication, remedy="Write an adapter instead of a model",
        )  # fmt: skip
    opened = open_base(base, cache_dir=cache_dir, token=token)
    placement = Placement(opened, adapter)
    if kept is not None and opened.config.get("quantization_config"):
        raise UnsupportedError(
            "the base is quantised in part, and its scales must keep their dtype",
            file=opened.source, key="quantization_config", remedy="Leave out the dtype: each tensor then keeps its own",
        )  # fmt: skip
    return IntoPlan(opened, adapter, kept, placement, _layouts(placement, kept), _config(placement, kept))


def _layouts(placement: Placement, dtype: torch.dtype | None) -> dict[str, Layout]:
    """Each file as it was, with ``dtype`` where it is given; what is added goes into the last one."""
    layouts = {}
    shards = placement.base.shards
    last = list(shards)[-1]
    for name, shard in shards.items():
        sized = {}
        copies = {key: shard.entries[source] for key, source in placement.copied.items() if source in shard.entries}
        for key, entry in (*shard.entries.items(), *copies.items()):
            shape = placement.shapes.get(key, entry.shape)
            if dtype is not None and entry.dtype in FACTOR_DTYPES:
                sized[key] = NAMES[dtype], shape, math.prod(shape) * dtype.itemsize
            elif shape != entry.shape:
                sized[key] = entry.dtype, shape, math.prod(shape) * FACTOR_DTYPES[entry.dtype].itemsize
            else:
                sized[key] = entry.dtype, shape, entry.end - entry.start
        for key, extra in placement.added.items() if name == last else ():
            tensor = placement.adapter.extras[extra]
            kept = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
            sized[key] = NAMES[kept], tuple(tensor.shape), tensor.numel() * kept.itemsize
        layouts[name] = Layout.packed(sized, shard.file.metadata)
    return layouts


def _config(placement: Placement, dtype: torch.dtype | None) -> dict[str, object]:
    """What must change in ``config.json``."""
    base = placement.base
    changes: dict[str, object] = {}
    if dtype is not None:
        spelled = str(dtype).removeprefix("torch.")
        changes |= {key: spelled for key in ("torch_dtype", "dtype") if key in base.config}
    return changes | placement.config
