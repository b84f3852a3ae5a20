"""Write an adapter as the PEFT LoRA that PEFT, vLLM and converters read alike.

The scale is in the factors: ``lora_alpha = r`` and no rsLoRA, one rank for all modules (zero rows where a module's own
is smaller; unless PEFT's ``rank_pattern`` is asked for), a plain list of targets. Modules are written one by one into a
file laid out beforehand, so memory does not grow with their number and the bytes do not depend on the number of
threads.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Container, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from coremerge.adapter import Adapter, Module
from coremerge.errors import OutputError, TensorError
from coremerge.executors import local
from coremerge.formats.atomic import Resumable, atomic_directory, tensor_file, write_files
from coremerge.formats.beside import write_carried
from coremerge.formats.safetensors_layout import NAMES, Layout, TensorFile, all_finite, output_dtype
from coremerge.hashing import file_sha256
from coremerge.lowrank import LowRank

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PREFIX = "base_model.model."


@dataclass(frozen=True)
class Saved:
    """What was written.

    Attributes:
        path: the directory.
        weights: the files of tensors.
        bytes: their size.
        rank: of all modules, or the largest of them; 0 for a whole model.
        dtype: of the factors, or of the weights that were changed.
        notes: what was settled on the way, in plain words.
    """

    path: Path
    weights: tuple[Path, ...]
    bytes: int
    rank: int
    dtype: torch.dtype
    notes: tuple[str, ...] = ()

    @cached_property
    def sha256(self) -> Mapping[str, str]:
        """File name → SHA-256 of each file of tensors; computed when asked for."""
        return {file.name: file_sha256(file) for file in self.weights}


def save(
    adapter: Adapter,
    path: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    rank_pattern: bool = False,
    overwrite: bool = False,
    threads: int | None = 1,
    files: Mapping[str, str | bytes] | None = None,
    inputs: Iterable[Path] = (),
    resume: Resumable | None = None,
    factors: Callable[[Sequence[str], torch.dtype], Iterator[LowRank]] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Saved:
    """Write ``adapter`` into the directory ``path``, complete or not at all.

    Args:
        adapter: its modules are asked for one by one.
        path: a directory; made, with its parents.
        dtype: of the factors: torch's, or ``"float32"``, ``"bf16"``, ...; ``adapter.dtype`` when None.
        rank_pattern: each module at its own rank, which the config lists: smaller, but not everything reads it (vLLM
            does not).
        overwrite: replace an adapter that is there already.
        threads: modules in work side by side; all processors when None.
        files: further small files to put beside it: name → content.
        inputs: further files that ``adapter`` is read from, beside ``adapter.info.files``: never overwritten.
        resume: see :func:`~coremerge.formats.atomic.atomic_directory`.
        factors: gives those of the modules of these names, rounded to that dtype, in place of ``adapter``.
        progress: called with the modules done and their number.

    Raises:
        OutputError: it cannot be written there, or PEFT has no form for it.
        TensorError: values that are not finite, in themselves or in ``dtype``.
        ConfigError: an unknown dtype.
    """
    if not adapter.modules:
        raise OutputError("an adapter without modules cannot be written", file=path)
    kept = output_dtype(adapter.dtype if dtype is None else dtype)
    ranks = _ranks(adapter, rank_pattern)
    rank = max(ranks.values())
    _refuse_clashes(adapter, path)
    layout = Layout.of(_shapes(adapter, ranks, kept))
    texts = {CONFIG_NAME: json.dumps(adapter_config(adapter, ranks), indent=2) + "\n"}
    sources = (*adapter.info.files, *adapter.info.beside.values(), *inputs)
    faint: list[str] = []
    with atomic_directory(path, overwrite=overwrite, inputs=sources, needed=layout.data_bytes, resume=resume) as folder:
        write_files(folder, {**(files or {}), **texts})
        write_carried(folder, adapter.info.beside, adapter.info.stamps)
        with tensor_file(folder, WEIGHTS_NAME, layout, resume) as file:
            if file:
                with closing(_written(file, adapter, ranks, factors, dtype=kept, threads=threads)) as written:
                    for done, said in enumerate(written, 1):
                        faint += said
                        if progress:
                            progress(done, len(adapter.modules))
    out = Path(path).expanduser()
    return Saved(out, (out / WEIGHTS_NAME,), layout.file_bytes, rank, kept, _notes(faint, kept))


def _notes(faint: Sequence[str], dtype: torch.dtype) -> tuple[str, ...]:
    """What is said of modules whose values are below what ``dtype`` holds in full."""
    if not faint:
        return ()
    others = f" and {len(faint) - 1} more modules" if len(faint) > 1 else ""
    wider = "" if dtype.itemsize > 4 else "; write it in another dtype: --dtype " + _wider(dtype)
    kind = str(dtype).removeprefix("torch.")
    return (f"{faint[0]}{others}: values too small for {kind}, which keeps few of their digits or none{wider}",)


def _wider(dtype: torch.dtype) -> str:
    return "float32, or bfloat16" if dtype == torch.half else "float64"


def _written(
    file: TensorFile,
    adapter: Adapter,
    ranks: Mapping[str, int],
    factors: Callable[[Sequence[str], torch.dtype], Iterator[LowRank]] | None,
    *,
    dtype: torch.dtype,
    threads: int | None,
) -> Generator[list[str], None, None]:
    """All tensors, module by module; of each what :func:`_write_module` returns."""
    for name in adapter.extras:
        file.write(PREFIX + name, adapter.extras[name])
    names = list(adapter.modules)

    def write(name: str, update: LowRank | None = None) -> list[str]:
        update = adapter.read(name, wide(dtype)) if update is None else update
        return _write_module(file, name, adapter, update, rank=ranks[name], dtype=dtype)

    if factors is None:
        yield from local.run(write, names, threads)
    else:
        yield from map(write, names, factors(names, dtype))


def wide(dtype: torch.dtype) -> torch.dtype:
    """What factors are computed in before they are rounded to ``dtype``: 16 bits need no more than float32."""
    return torch.float32 if dtype.itemsize == 2 else torch.float64


def _refuse_clashes(adapter: Adapter, path: str | Path) -> None:
    """Refuse what PEFT would not load, or would load in part and in silence."""
    embeddings = [name for name, module in adapter.modules.items() if module.kind == "embedding"]
    if adapter.biases and embeddings:
        raise OutputError(
            "PEFT has no form for an adapter with both trained biases (lora_bias) and an embedding",
            file=path, key=embeddings[0], remedy="Leave one of the adapters out, or merge into the base model",
        )  # fmt: skip
    for whole in adapter.info.modules_to_save:
        both = [name for name in adapter.modules if f".{whole}." in f".{name}."]
        if both:
            raise OutputError(
                "trained whole by one adapter and adapted by another: PEFT loads only one of the two",
                file=path, key=both[0], remedy="Drop the whole one: --extras drop",
            )  # fmt: skip


def _ranks(adapter: Adapter, own: bool) -> dict[str, int]:
    """Module → rank in the file; the parts of a MultiheadAttention, which PEFT adapts together, have one."""
    largest: dict[str, int] = {}
    for name, module in adapter.modules.items():
        key = _adapted(name) if own else ""
        largest[key] = max(1, module.rank, largest.get(key, 0))
    return {name: largest[_adapted(name) if own else ""] for name in adapter.modules}


def _adapted(name: str) -> str:
    """The layer that PEFT wraps: a MultiheadAttention's out_proj goes with the layer itself."""
    return name.partition(".base_layer.")[0]


def _keys(name: str, module: Module) -> tuple[str, str]:
    """The keys of B and A, in this order: that of ``left @ right``."""
    form = "lora_embedding_{}" if module.kind == "embedding" else "lora_{}.weight"
    return f"{PREFIX}{name}.{form.format('B')}", f"{PREFIX}{name}.{form.format('A')}"


def _factor_shapes(module: Module, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """B and A as PEFT stores them: a convolution's kernel belongs to A, B has one of ones."""
    out, inner = module.shape
    kernel = module.kernel
    channels = inner // math.prod(kernel)
    return (out, rank, *(1 for _ in kernel)), (rank, channels, *kernel)


def _shapes(adapter: Adapter, ranks: Mapping[str, int], dtype: torch.dtype) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Key → dtype and shape of every tensor of the file."""
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name in adapter.extras:
        tensor = adapter.extras[name]
        if tensor.dtype not in NAMES:
            raise TensorError(f"dtype {tensor.dtype} cannot be written", key=name)
        shapes[PREFIX + name] = NAMES[tensor.dtype], tuple(tensor.shape)
    for name, module in adapter.modules.items():
        for key, shape in zip(_keys(name, module), _factor_shapes(module, ranks[name]), strict=True):
            shapes[key] = NAMES[dtype], shape
        if adapter.biases:
            shapes[f"{PREFIX}{name}.lora_B.bias"] = NAMES[dtype], module.shape[:1]
    return shapes


def _write_module(
    file: TensorFile, name: str, adapter: Adapter, update: LowRank, *, rank: int, dtype: torch.dtype
) -> list[str]:
    """Its name, if its values are too small for ``dtype``."""
    module = adapter.modules[name]
    if update.shape != module.shape or update.rank > rank:
        raise TensorError(
            f"announced as {module.shape} of rank {module.rank}, but is {update.shape} of rank {update.rank}", key=name
        )
    faint = False
    for key, side in zip(_keys(name, module), ("left", "right"), strict=True):
        slot = file.layout.slots[key]
        rounded = _padded(getattr(update, side), (slot.shape[0], math.prod(slot.shape[1:])), dtype)
        largest = _largest(rounded)
        if not math.isfinite(largest):
            cast(rounded, getattr(adapter[name], side), name)
        if largest < torch.finfo(dtype).smallest_normal and update.rank:
            faint |= bool(largest or getattr(adapter[name], side).any())
        file.write(key, rounded.view(slot.shape))
    if adapter.biases:
        bias = adapter.biases[name] if name in adapter.biases else torch.zeros(module.shape[0])
        file.write(f"{PREFIX}{name}.lora_B.bias", cast(bias.to(dtype), bias, name))
    return [name] if faint else []


def _largest(tensor: Tensor) -> float:
    """The largest magnitude; NaN if there is one."""
    if not tensor.numel():
        return 0.0
    low, high = tensor.aminmax()
    return max(-low.item(), high.item())


def _padded(factor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    if tuple(factor.shape) == shape:
        return factor.to(dtype).contiguous()
    result = torch.zeros(shape, dtype=dtype)
    result[: factor.shape[0], : factor.shape[1]] = factor
    return result


def cast(rounded: Tensor, exact: Tensor, name: str) -> Tensor:
    """``rounded`` itself, once it is known that no value of ``exact`` overflowed.

    Raises:
        TensorError: one did, or was not finite to begin with.
    """
    if all_finite(rounded):
        return rounded
    if not all_finite(exact):
        raise TensorError("the result has NaN or infinite values", key=name, remedy="Check the inputs and the scale")
    raise TensorError(
        f"values up to {float(exact.abs().max()):.3g} do not fit {str(rounded.dtype).removeprefix('torch.')}",
        key=name,
        remedy="Write it in another dtype: --dtype float32" + (", or bfloat16" if rounded.dtype == torch.half else ""),
    )


def adapter_config(adapter: Adapter, ranks: Mapping[str, int]) -> dict[str, Any]:
    """What ``adapter_config.json`` says: see the module's docstring."""
    info, rank = adapter.info, max(ranks.values())
    smaller = {_adapted(name): r for name, r in ranks.items() if r != rank}
    # PEFT takes the first pattern that a name ends with: one of full rank that ends like a smaller one is listed, too
    hidden = {n: r for n, r in ((_adapted(n), r) for n, r in ranks.items()) if n not in smaller and _ends(n, smaller)}
    listed = smaller | hidden
    others = {name: listed[name] for name in sorted(listed, key=lambda name: (-len(name), name))}
    patterns = {"alpha_pattern": others, "rank_pattern": others} if others else {}
    return {
        "auto_mapping": dict(info.auto_mapping) if info.auto_mapping else None,
        "base_model_name_or_path": info.base_model,
        "bias": "none",
        "fan_in_fan_out": info.fan_in_fan_out,
        "inference_mode": True,
        "init_lora_weights": True,
        "layer_replication": [list(span) for span in info.layer_replication] if info.layer_replication else None,
        "lora_alpha": rank,
        "lora_bias": bool(adapter.biases),
        "lora_dropout": 0.0,
        "modules_to_save": list(info.modules_to_save) or None,
        "peft_type": "LORA",
        "r": rank,
        "revision": info.base_revision,
        "target_modules": target_modules(adapter.modules, info.targets),
        "task_type": info.task_type,
        "trainable_token_indices": {name: list(ids) for name, ids in info.token_indices.items()} or None,
        "use_rslora": False,
        **patterns,
    }


def _ends(name: str, known: Container[str]) -> bool:
    """Whether ``name`` ends with one of the ``known`` names, after a dot."""
    parts = name.split(".")
    return any(".".join(parts[at:]) in known for at in range(1, len(parts)))


def target_modules(modules: Iterable[str], targets: Iterable[str] = ()) -> list[str]:
    """What PEFT's config must list so that exactly ``modules`` are adapted.

    A full name is exact. The end of one is too, where the inputs show that the base has no other modules of that name:
    ``targets`` are such ends (:attr:`coremerge.adapter.Info.targets`), and some servers know modules by them alone.
    PEFT matches either by ``endswith``.

    Example:
        >>> names = [f"model.layers.{i}.self_attn.{x}_proj" for i in range(2) for x in "qv"]
        >>> target_modules(names, ["q_proj", "v_proj"])
        ['q_proj', 'v_proj']
        >>> target_modules(names[:2], ["v_proj"])
        ['model.layers.0.self_attn.q_proj', 'v_proj']
    """
    ends = frozenset(targets)
    return sorted({_shortest_end(name, ends) or name for name in map(_adapted, modules)})


def _shortest_end(name: str, known: Container[str]) -> str | None:
    steps = name.split(".")
    return next((end for n in range(1, len(steps) + 1) if (end := ".".join(steps[-n:])) in known), None)
