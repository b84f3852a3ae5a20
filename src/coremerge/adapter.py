"""An adapter: module names → low-rank updates, plus what its files say of themselves."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from copy import copy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from torch import Tensor

from coremerge.hashing import Stamp
from coremerge.lowrank import LowRank

if TYPE_CHECKING:
    from coremerge.formats.writer import Saved

T = TypeVar("T")
Kind = Literal["linear", "conv1d", "conv2d", "conv3d", "embedding"]


@dataclass(frozen=True)
class Module:
    """What is known of one adapted module before its factors are read.

    Attributes:
        shape: (out, in). A convolution's input is flattened to in · kernel; an embedding counts as the linear map
            of one-hot tokens: (dim, vocabulary).
        rank: the stored rank.
        kind: the layer type, which decides the keys and shapes on disk.
        kernel: the kernel of a convolution, else empty.
        scale: what the stored product is multiplied by (already folded into the factors that are handed out).
        dtype: of the stored factors.
    """

    shape: tuple[int, int]
    rank: int
    kind: Kind = "linear"
    kernel: tuple[int, ...] = ()
    scale: float = 1.0
    dtype: torch.dtype = torch.float32

    @property
    def parameters(self) -> int:
        """Number of stored factor entries."""
        return self.rank * sum(self.shape)

    @property
    def exact_dtype(self) -> torch.dtype:
        """float32 where it holds the scaled factors exactly, else float64.

        Two numbers of 11 significant bits, float16's, have a product of at most 22: float32 holds 24.
        """
        mantissa, exponent = math.frexp(self.scale)
        short = (mantissa * 2**11).is_integer() and abs(exponent) <= 16
        return torch.float32 if short and self.dtype.itemsize <= 2 else torch.float64


@dataclass(frozen=True)
class Info:
    """What an adapter's files say of themselves; all of it hints, none of it maths.

    Attributes:
        source: where it came from, as the person gave it.
        type: "LORA", "ADALORA", "VERA", ...; "memory" for one that has no files.
        base_model: name or path of the base model.
        revision: of the adapter on the hub (resolved), if it came from there.
        base_revision: of the base model, if the config names one.
        task_type: PEFT's task type.
        fan_in_fan_out: the base stores its weights transposed (GPT-2's Conv1D).
        layer_replication: PEFT's layer ranges, or None.
        auto_mapping: PEFT's, or None.
        modules_to_save: module names (as PEFT's config lists them) that the extras belong to.
        token_indices: module name → trained token ids, for extras that are token rows.
        targets: ends of module names: the base model has no such modules but the adapter's.
        moved: its modules were given other names than its own base has, to agree with other adapters.
        initial: the source of the adapter before training, which was subtracted, if one was given.
        files: the files that were read.
        stamps: theirs, from before they were read, and of those beside.
        beside: files that go with the adapter and are not read: name → file.
        notes: what was normalised or left unread, in plain words.
        warnings: what it lacks, or what of it is lost, in plain words.
    """

    source: str = ""
    type: str = "memory"
    base_model: str | None = None
    revision: str | None = None
    base_revision: str | None = None
    task_type: str | None = None
    fan_in_fan_out: bool = False
    layer_replication: tuple[tuple[int, int], ...] | None = None
    auto_mapping: Mapping[str, Any] | None = None
    modules_to_save: tuple[str, ...] = ()
    token_indices: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    targets: tuple[str, ...] = ()
    moved: bool = False
    initial: str | None = None
    files: tuple[Path, ...] = ()
    stamps: Mapping[Path, Stamp] = field(default_factory=dict)
    beside: Mapping[str, Path] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


class Lazy(Mapping[str, T]):
    """A mapping whose values are made when they are asked for, each time anew."""

    def __init__(self, keys: Mapping[str, object] | tuple[str, ...], load: Callable[[str], T]) -> None:
        self._keys = dict.fromkeys(keys)
        self._load = load

    def __getitem__(self, key: str) -> T:
        if key not in self._keys:
            raise KeyError(key)
        return self._load(key)

    def __contains__(self, key: object) -> bool:
        return key in self._keys

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


class Adapter(Mapping[str, LowRank]):
    """Module name → :class:`LowRank` in float64 with every scale folded in; factors are read when asked for.

    Module names are those of the base model (no ``base_model.model.``). Never changed once made.

    Attributes:
        name: a short label.
        modules: module name → :class:`Module`, known without reading factors.
        biases: module name → trained bias of the update (out,), scaled, for PEFT's ``lora_bias``.
        extras: whole tensors the adapter carries besides its updates (``modules_to_save``, trained token rows):
            parameter name as in the base model → tensor.
        info: see :class:`Info`.

    Example:
        >>> adapter = Adapter.from_updates({"layer": LowRank(torch.ones(3, 1), torch.ones(1, 2))})
        >>> adapter["layer"].shape, adapter.modules["layer"].rank
        ((3, 2), 1)
    """

    def __init__(
        self,
        modules: Mapping[str, Module],
        load: Callable[[str], LowRank],
        *,
        read: Callable[[str, torch.dtype | None], LowRank] | None = None,
        name: str = "adapter",
        biases: Mapping[str, Tensor] | None = None,
        extras: Mapping[str, Tensor] | None = None,
        info: Info | None = None,
    ) -> None:
        self.name = name
        self.modules = dict(sorted(modules.items()))
        self.biases: Mapping[str, Tensor] = biases if biases is not None else {}
        self.extras: Mapping[str, Tensor] = extras if extras is not None else {}
        self.info = info or Info()
        self._load = load
        self._read = read

    @classmethod
    def from_updates(
        cls,
        updates: Mapping[str, LowRank],
        *,
        name: str = "adapter",
        kinds: Mapping[str, Module] | None = None,
        biases: Mapping[str, Tensor] | None = None,
        extras: Mapping[str, Tensor] | None = None,
        info: Info | None = None,
    ) -> Adapter:
        """An adapter held in memory; ``kinds`` gives the :class:`Module` of layers that are not plain linear."""
        held = dict(updates)
        modules = {
            key: replace(
                (kinds or {}).get(key, Module(u.shape, u.rank)), shape=u.shape, rank=u.rank, dtype=u.dtype, scale=1.0
            )
            for key, u in held.items()
        }
        return cls(modules, lambda key: held[key].to(torch.float64), name=name, biases=biases, extras=extras, info=info)

    def __getitem__(self, module: str) -> LowRank:
        if module not in self.modules:
            raise KeyError(module)
        return self._load(module)

    def read(self, module: str, dtype: torch.dtype | None = None) -> LowRank:
        """The update in ``dtype``; None: in the narrowest of float32 and float64 that it costs no accuracy to have.

        Raises:
            KeyError: there is no such module.
        """
        if module not in self.modules:
            raise KeyError(module)
        if self._read is not None:
            return self._read(module, dtype)
        update = self._load(module)
        return update if dtype is None else update.to(dtype)

    def __contains__(self, module: object) -> bool:
        return module in self.modules

    def __iter__(self) -> Iterator[str]:
        return iter(self.modules)

    def __len__(self) -> int:
        return len(self.modules)

    def __repr__(self) -> str:
        ranks = sorted({m.rank for m in self.modules.values()})
        return f"Adapter({self.name!r}, {len(self)} modules, ranks {ranks})"

    @property
    def dtype(self) -> torch.dtype:
        """The stored dtype (bfloat16 for 8-bit floats, which it holds exactly); float32 where modules differ."""
        dtypes = {torch.bfloat16 if m.dtype.itemsize == 1 else m.dtype for m in self.modules.values()}
        return dtypes.pop() if len(dtypes) == 1 else torch.float32

    def renamed(self, name: str) -> Adapter:
        """The same adapter under another label."""
        other = copy(self)
        other.name = name
        return other

    def load(self) -> Adapter:
        """The same adapter with all factors in memory, independent of its files."""
        held, biases, extras = dict(self), dict(self.biases), dict(self.extras)
        return Adapter(self.modules, held.__getitem__, name=self.name, biases=biases, extras=extras, info=self.info)

    def __reduce__(self) -> tuple[Any, ...]:
        """To another process its factors go with it, as it would read them."""
        held = {name: self.read(name) for name in self.modules}
        others = {"name": self.name, "biases": dict(self.biases), "extras": dict(self.extras), "info": self.info}
        return _sent, (self.modules, held, others)

    def save(
        self,
        path: str | Path,
        *,
        dtype: torch.dtype | str | None = None,
        rank_pattern: bool = False,
        overwrite: bool = False,
    ) -> Saved:
        """Write a PEFT LoRA directory that PEFT and vLLM load: see :func:`coremerge.formats.writer.save`."""
        from coremerge.formats.writer import save

        return save(self, path, dtype=dtype, rank_pattern=rank_pattern, overwrite=overwrite)


def _sent(modules: Mapping[str, Module], held: Mapping[str, LowRank], others: Mapping[str, Any]) -> Adapter:
    def read(name: str, dtype: torch.dtype | None) -> LowRank:
        return held[name] if dtype is None else held[name].to(dtype)

    return Adapter(modules, lambda name: held[name].to(torch.float64), read=read, **others)
