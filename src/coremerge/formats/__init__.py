"""Reading adapters of every dialect, and writing what others load.

:func:`load` finds an adapter's files, lets the dialect named by its config read them, and returns an
:class:`~coremerge.adapter.Adapter`. A dialect is a module with ``TYPES`` (PEFT's names for it) and ``read``.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

from coremerge.adapter import Adapter
from coremerge.errors import ConfigError, TensorError
from coremerge.formats import adalora, peft, vera
from coremerge.formats.checkpoint import Checkpoint, Options
from coremerge.formats.config import changes_base, read_config, refuse_changed_base, unknown_type
from coremerge.formats.foreign import refuse_foreign
from coremerge.formats.safetensors_file import Tensors
from coremerge.formats.sharded import ShardedFile, open_one
from coremerge.formats.source import Location, locate
from coremerge.hashing import check_download, file_sha256, stamps

DIALECTS = (peft, adalora, vera)
"""The readers, asked in turn."""


def load(
    source: str | Path,
    *,
    name: str | None = None,
    base: str | Path | None = None,
    vera_width: int | None = None,
    initial: str | Path | Adapter | None = None,
    allow_pickle: bool = False,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
) -> Adapter:
    """Read an adapter from a folder, a file or a hub id; its factors are read when they are asked for.

    Args:
        source: a folder, an ``adapter_model.safetensors``, or ``org/name[@revision][:subfolder]`` on the hub.
            A local path that exists wins.
        name: a label; the last part of ``source`` if not given.
        base: the base model's folder, ``config.json`` or hub id, for a VeRA adapter whose input widths are not in
            its file.
        vera_width: the widest input among the base model's adapted layers, in place of ``base``.
        initial: the adapter before training, for PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA; it is subtracted.
        allow_pickle: read a legacy ``.bin`` where there is no safetensors file (``weights_only=True``).
        revision: of a hub id that names none.
        cache_dir: the hub's cache, if not its usual place.
        token: the hub's token, if not its usual one.

    Raises:
        SourceError: nothing usable is there.
        ConfigError: the config is wrong, or contradicts the file.
        UnsupportedError: the update cannot be written as an exact low-rank product.
        TensorError: tensors that are missing, stray, misshapen, damaged or not finite.
    """
    location = locate(source, allow_pickle=allow_pickle, revision=revision, cache_dir=cache_dir, token=token)
    options = Options(base, vera_width, cache_dir, token)
    checkpoint = _open(location, options)
    if initial is None:
        refuse_changed_base(checkpoint.config)
    elif not changes_base(checkpoint.config):
        raise checkpoint.config.wrong(
            "init_lora_weights",
            "an initial adapter was given, but this one is relative to its original base",
            "Leave the initial adapter out",
        )
    adapter = _read(checkpoint)
    if initial is not None:
        if not isinstance(initial, Adapter):
            start = _open(locate(initial, allow_pickle=allow_pickle, cache_dir=cache_dir, token=token), options)
            initial = _read(start)
        adapter = peft.relative_to(adapter, initial)
    return adapter.renamed(name) if name else adapter


def detect(checkpoint: Checkpoint) -> ModuleType:
    """The dialect that reads this checkpoint.

    Raises:
        UnsupportedError: no reader takes its ``peft_type``; says why.
    """
    for dialect in DIALECTS:
        if checkpoint.config.type in dialect.TYPES:
            return dialect
    raise unknown_type(checkpoint.config, tuple(kind for dialect in DIALECTS for kind in dialect.TYPES))


def _open(location: Location, options: Options) -> Checkpoint:
    before = stamps((*location.files, *location.beside.values()))
    try:
        config = read_config(location.config)
    except ConfigError:
        refuse_foreign(_tensors(location))
        raise
    tensors = _tensors(location)
    refuse_foreign(tensors)
    return Checkpoint(location, config, tensors, before, options)


def _tensors(location: Location) -> Tensors:
    first, *others = location.weights
    try:
        return ShardedFile(location.weights, location.index) if others or location.index else open_one(first)
    except TensorError:
        for file in location.weights:
            check_download(file, file_sha256(file))
        raise


def _read(checkpoint: Checkpoint) -> Adapter:
    adapter: Adapter = detect(checkpoint).read(checkpoint)
    return adapter
