"""Where PEFT's files are not: what lies there instead, and what can be done with it."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path

from coremerge.errors import CoremergeError, SourceError, UnsupportedError
from coremerge.formats.config import CONFIG_NAME, LFS_MARK
from coremerge.formats.safetensors_file import SafetensorsFile, Tensors
from coremerge.hashing import unreadable

PICKLES = (".bin", ".pt", ".pth", ".ckpt")
DEEPEST = 4
"""Levels of folders below a named one in which adapters are looked for: RUN/global_step_10/actor/lora_adapter has 3."""
MOST_FOLDERS = 2_000
"""That are looked into."""
SHOWN = 8

_FACTOR = re.compile(r"(^|\.)lora_(A|B|embedding_A|embedding_B)(\.|$)")
_MLX = re.compile(r"(^|\.)lora_[ab]$")

_KNOWN = (
    (("*.distcp", "pytorch_model_fsdp_*", "sharded_*"), "pieces of torch's distributed checkpoint ({})",
     "Gather it first: accelerate merge-weights FOLDER OUT; then name the file in OUT, with this folder's"
     " adapter_config.json beside it"),
    (("global_step*", "*zero_pp_rank_*", "mp_rank_*"), "DeepSpeed's own checkpoint ({})",
     "Gather it first: python zero_to_fp32.py . OUT, in this folder; then name the file in OUT, with this folder's"
     " adapter_config.json beside it"),
    (("*.gguf",), "an adapter that was converted for llama.cpp ({})", "Give the adapter that it was converted from"),
    (("*.npz",), "an adapter of an early MLX ({})", "Save it again with today's MLX, and convert that"),
)  # fmt: skip
_CONVERT_MLX = (
    "Convert it to PEFT's: lora_A.weight is lora_a transposed, lora_B.weight is lora_b transposed, under"
    " base_model.model.; in adapter_config.json r is MLX's rank, and lora_alpha its scale times its rank"
)


def no_weights(folder: Path, wanted: str, *, allow_pickle: bool = False) -> CoremergeError:
    """The refusal of a folder with a config, and no tensors under the names that PEFT gives them."""
    names = sorted(path.name for path in folder.iterdir())
    for name in reversed(names):  # of numbered ones the last
        if name.endswith(".safetensors") and (keys := _keys(folder / name)):
            if any(map(_MLX.search, keys)):
                return _mlx(folder / name)
            if any(map(_FACTOR.search, keys)):
                remedy = f"If that is the adapter, name the file: {(folder / name).as_posix()}"
                return _missing(folder, wanted, f", but LoRA factors in {name}", remedy)
    for patterns, what, remedy in _KNOWN:
        if listed := [name for name in names if any(fnmatch(name, pattern) for pattern in patterns)]:
            return _missing(folder, wanted, f", but {what.format(_shown(listed))}", remedy)
    if below := adapters_below(folder):
        return _missing(folder, wanted, *_named_below(folder, below))
    if pickles := [name for name in names if _is_pickle(name)]:
        place = (folder / pickles[-1]).as_posix()
        remedy = f"If it holds the adapter and you trust it, name it, with allow_pickle: {place}"
        return _missing(folder, wanted, f", but a pickle: {_shown(pickles)}", remedy)
    remedy = "" if allow_pickle else "; if it only exists as adapter_model.bin, allow_pickle reads that"
    return _missing(folder, wanted, "", f"Download or save the adapter again{remedy}")


def _missing(folder: Path, wanted: str, but: str, remedy: str) -> SourceError:
    return SourceError(f"no {wanted} beside the config{but}", file=folder, key=wanted, remedy=remedy)


def _is_pickle(name: str) -> bool:
    from coremerge.carried import is_state

    return name.endswith(PICKLES) and not is_state(name)


def no_config(folder: Path) -> SourceError:
    """The refusal of a folder without a config."""
    below = adapters_below(folder)
    if below:
        but, remedy = _named_below(folder, below)
        return SourceError(f"no {CONFIG_NAME} here{but}", file=folder, remedy=remedy)
    names = sorted(path.name for path in folder.iterdir())
    if not names:
        return SourceError("the folder is empty", file=folder, remedy="Download or save the adapter again")
    held = [name for name in names if name.endswith(".safetensors") and any(map(_FACTOR.search, _keys(folder / name)))]
    if held:
        what, remedy = (
            f", but LoRA factors in {_shown(held)}",
            "Put the adapter_config.json that was saved with it here",
        )
    else:
        what = ": it looks like a whole model" if "config.json" in names else ""
        remedy = "Give the folder that PEFT's save_pretrained wrote"
    return SourceError(f"no {CONFIG_NAME} in this folder{what}", file=folder, key=CONFIG_NAME, remedy=remedy)


def _named_below(folder: Path, below: Sequence[str]) -> tuple[str, str]:
    return f", but adapters in subfolders: {_shown(below)}", f"Name one of them: {(folder / below[0]).as_posix()}"


def adapters_below(folder: Path) -> list[str]:
    """The folders below that hold adapters, those with weights before all others, numbers in their order."""
    found = sorted(_configs(folder), key=_numbers)
    whole = [at for at in found if any(file.suffix in (".safetensors", *PICKLES) for file in (folder / at).iterdir())]
    return whole or found


def _configs(folder: Path) -> Iterator[str]:
    for count, (here, folders, names) in enumerate(os.walk(folder)):
        place = Path(here).relative_to(folder)
        if CONFIG_NAME in names and place.parts:
            yield place.as_posix()
        deep = len(place.parts) >= DEEPEST or count >= MOST_FOLDERS
        folders[:] = [] if deep else [name for name in folders if not name.startswith(".")]


def _numbers(name: str) -> list[tuple[int, str]]:
    """``checkpoint-20`` before ``checkpoint-100``."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def _shown(names: Collection[str]) -> str:
    return ", ".join([*names][:SHOWN]) + (", ..." if len(names) > SHOWN else "")


def _keys(file: Path) -> Collection[str]:
    try:
        return SafetensorsFile(file).entries.keys()
    except CoremergeError:
        return ()


def holds_factors(file: Path) -> bool:
    """Whether a safetensors file is an adapter of its own."""
    return any(_FACTOR.search(key) or _MLX.search(key) for key in _keys(file))


def refuse_foreign(tensors: Tensors) -> None:
    """Refuse the tensors of another tool's adapter.

    Raises:
        UnsupportedError: MLX's.
    """
    if tensors.entries and all(map(_MLX.search, tensors.entries)):
        raise _mlx(tensors.path)


def _mlx(file: Path) -> UnsupportedError:
    return UnsupportedError("an adapter of MLX, whose form is not read", file=file, remedy=_CONVERT_MLX)


def refuse_other(file: Path) -> None:
    """Refuse a file that is named as an adapter's tensors and holds none: a text, a GGUF, an archive of numpy's.

    Raises:
        SourceError: saying what it is.
    """
    for suffix, what, remedy in (
        (".json", "this is JSON, not tensors", "Give the adapter's folder, or its adapter_model.safetensors"),
        (".gguf", "this was converted for llama.cpp", "Give the adapter that it was converted from"),
        (".npz", "this is an archive of numpy's, as early MLX wrote", "Save the adapter with PEFT"),
    ):
        if file.suffix == suffix:
            raise SourceError(what, file=file, remedy=remedy)
    if file.suffix not in (".safetensors", *PICKLES) and not _looks_pickled(file):
        raise SourceError(
            "this is no file of tensors", file=file, remedy="Give the adapter's folder, or its safetensors"
        )


def _looks_pickled(file: Path) -> bool:
    try:
        with file.open("rb") as data:
            return data.read(64).startswith((b"PK\x03\x04", b"\x80", LFS_MARK))
    except OSError as error:
        raise unreadable(file, error) from None
