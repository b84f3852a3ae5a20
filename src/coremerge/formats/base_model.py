"""Input widths of a base model's layers, for VeRA: its files do not tell them.

From the base's safetensors headers where there are any: exact. Else from its ``config.json`` and the layers' names.
Else every module is taken to be as wide as the shared A, unless the file itself shows that this cannot be.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from coremerge.errors import ConfigError, SourceError
from coremerge.formats.checkpoint import Options, shorten
from coremerge.formats.config import Config, read_json
from coremerge.formats.names import PREFIX
from coremerge.formats.safetensors_file import SafetensorsFile
from coremerge.formats.source import download, local_path, parse_hub_id
from coremerge.formats.urls import is_url

_HIDDEN = ("hidden_size", "n_embd", "d_model", "dim", "word_embed_proj_dim")
_INTERMEDIATE = ("intermediate_size", "n_inner", "ffn_dim", "d_ff", "hidden_dim", "encoder_ffn_dim")
_HEADS = ("num_attention_heads", "n_head", "num_heads", "n_heads", "encoder_attention_heads")
_FROM_MLP = ("down_proj", "fc2", "dense_4h_to_h", "w2", "wo", "lin2", "mlp.c_proj", "output.dense", "fc_out", "linear2")
_FROM_ATTENTION = ("o_proj", "out_proj", "attention.output.dense", "attn.c_proj", "self_attention.dense", "out_lin",
                   "SelfAttention.o", "EncDecAttention.o", "attention.wo")  # fmt: skip
_REMEDY = "Give the base model (base=its folder or config.json), or its widest adapted input (vera_width=...)"


class InputWidths:
    """How many inputs each adapted module has.

    Args:
        config: the adapter's config, for messages.
        options: what the person said of the base.
        outs: module → number of outputs, from the file.
    """

    def __init__(self, config: Config, options: Options, outs: Mapping[str, int]) -> None:
        self._config = config
        self._given = options.vera_width
        self._outs = outs
        self._known: Mapping[str, int] = {}
        self.notes: list[str] = []
        if options.base is not None:
            self._known = _from_base(options, outs)

    def widest(self) -> int:
        """The widest input of all modules.

        Raises:
            ConfigError: nobody said.
        """
        if self._given is not None:
            return self._given
        if self._known:
            return max(self._known.values())
        raise ConfigError(
            "the file holds no A and B, and to make them anew the widest input among its modules must be known",
            file=self._config.path,
            key="save_projection",
            value=self._config.raw.get("save_projection"),
            remedy=_REMEDY,
        )

    def of(self, module: str, shared: int) -> int:
        """The inputs of ``module``, of a shared A that is ``shared`` wide.

        Raises:
            ConfigError: the modules have different widths, and nobody said which.
        """
        if not self._known:
            self._assume_equal(shared)
            return shared
        width = self._known[module]
        if width > shared:
            raise ConfigError(
                f"{module} has {width} inputs in the base model, and the shared A only {shared}",
                file=self._config.path,
                key="base_model_name_or_path",
                value=self._config.raw.get("base_model_name_or_path"),
                remedy="Give the base model this adapter was trained on",
            )
        return width

    def _assume_equal(self, shared: int) -> None:
        if self.notes:
            return
        hidden = {out for name, out in self._outs.items() if _ends(name, (*_FROM_MLP, *_FROM_ATTENTION))}
        mixed = len({_ends(name, _FROM_MLP) for name in self._outs}) > 1
        if mixed or (hidden and hidden != {shared}):
            raise ConfigError(
                f"modules of different numbers of inputs, which a VeRA file does not tell: {shorten(self._outs)}",
                file=self._config.path,
                key="target_modules",
                value=self._config.raw.get("target_modules"),
                remedy="Give the base model: base=its folder or config.json",
            )
        self.notes.append(f"every module is taken to have {shared} inputs, as wide as the shared A (no base was given)")


def sliced(shapes: Mapping[str, tuple[int, int]]) -> list[str]:
    """A warning, where every block's layers write a whole part of the width that its other layers read.

    A and B of one process of several may multiply: its B has some of the rows. Only names tell which layers write to
    the residual stream, and a block may be made otherwise: so it is no refusal.

    Args:
        shapes: module → (out, in).
    """
    read: dict[str, set[int]] = {}
    written: dict[str, set[int]] = {}
    for name, (out, inner) in shapes.items():
        if block := re.match(r".*?\.\d+\.", name):
            last = _ends(name, (*_FROM_MLP, *_FROM_ATTENTION))
            (written if last else read).setdefault(block[0], set()).add(out if last else inner)
    blocks = read.keys() & written.keys()
    reads, writes = (sorted(set[int]().union(*(of[block] for block in blocks))) for of in (read, written))
    if len(reads) != 1 or len(writes) != 1 or writes[0] >= reads[0] or reads[0] % writes[0]:
        return []
    return [
        f"its layers read {reads[0]} values and write {writes[0]}: each B seems to be one process's shard (FSDP);"
        " gather them before saving"
    ]


def _ends(name: str, endings: tuple[str, ...]) -> bool:
    longest = max(
        (e for e in (*_FROM_MLP, *_FROM_ATTENTION) if name == e or name.endswith("." + e)), key=len, default=""
    )
    return longest in endings


def _from_base(options: Options, outs: Mapping[str, int]) -> Mapping[str, int]:
    folder, config = _find_base(options)
    shapes = dict(_weight_shapes(folder)) if folder else {}
    if shapes:
        return {name: _width_in(shapes, name, out, folder) for name, out in outs.items()}
    return _from_config(config, outs)


def _find_base(options: Options) -> tuple[Path | None, Path]:
    """The base's folder (None where a config.json was given) and its config."""
    base = options.base or ""
    path = local_path(base)
    if is_url(base):
        return None, _config_at(str(base))
    if path and path.is_file():
        return None, path
    if path is None:
        hub = None if isinstance(base, Path) else parse_hub_id(base)
        if hub is None:
            remedy = "Give its folder, its config.json, its hub id or its URL"
            raise SourceError("no such base model", file=base, remedy=remedy)
        inside = f"{hub.subfolder}/config.json" if hub.subfolder else "config.json"
        path = (download(hub, base, [inside], options.cache_dir, options.token) / inside).parent
    return path, path / "config.json"


def _config_at(url: str) -> Path:
    from coremerge.formats.remote_files import RemoteFolder

    remote = RemoteFolder(url.rstrip("/").removesuffix("/config.json"))
    found = remote.fetch("config.json")
    if not found:
        raise SourceError("no config.json there", file=url, remedy="Give the URL of the base model's folder")
    return found[0]


def _weight_shapes(folder: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Parameter name → shape, from the headers of a folder's safetensors; nothing where there are none."""
    for file in sorted(folder.glob("*.safetensors")):
        for key, entry in SafetensorsFile(file).entries.items():
            yield key, entry.shape


def _width_in(shapes: Mapping[str, tuple[int, ...]], module: str, out: int, folder: Path | None) -> int:
    shape = _find_shape(shapes, f"{module}.weight")
    if shape is None or len(shape) != 2 or out not in shape:
        remedy = "Give the base model this adapter was trained on"
        if folder and _is_quantised(folder):
            remedy = "Its weights are packed and tell no widths: give base=its config.json, or vera_width=..."
        raise ConfigError(
            f"no weight of {module} with {out} outputs in the base model (found {shape and list(shape)})",
            file=folder, key=f"{module}.weight", remedy=remedy,
        )  # fmt: skip
    return shape[1] if shape[0] == out else shape[0]  # GPT-2's Conv1D is stored transposed


def _is_quantised(folder: Path) -> bool:
    config = folder / "config.json"
    return config.is_file() and bool(read_json(config).get("quantization_config"))


def _find_shape(shapes: Mapping[str, tuple[int, ...]], key: str) -> tuple[int, ...] | None:
    """The shape stored as ``key``, or under a longer or shorter prefix (``model.``, ``bert.``)."""
    steps = key.removeprefix(PREFIX).split(".")
    for start in range(min(3, len(steps) - 1)):
        tail = ".".join(steps[start:])
        found = {shape for name, shape in shapes.items() if name == tail or name.endswith("." + tail)}
        if len(found) == 1:
            return found.pop()
    return None


def _from_config(path: Path, outs: Mapping[str, int]) -> Mapping[str, int]:
    raw = read_json(path)
    inner = raw.get("text_config")
    config: dict[str, Any] = {**raw, **inner} if isinstance(inner, dict) else raw
    hidden = _first(config, _HIDDEN)
    if hidden is None:
        raise ConfigError(
            f"the base's config names no width (looked for {', '.join(_HIDDEN)})", file=path, key="hidden_size",
            remedy="Give the base model's folder with its safetensors, or vera_width",
        )  # fmt: skip
    heads, size = _first(config, _HEADS), _first(config, ("head_dim", "d_kv"))
    attention = heads * size if heads and size else hidden
    mlp = _first(config, _INTERMEDIATE) or 4 * hidden
    return {
        name: mlp if _ends(name, _FROM_MLP) else attention if _ends(name, _FROM_ATTENTION) else hidden for name in outs
    }


def _first(config: Mapping[str, Any], keys: tuple[str, ...]) -> int | None:
    found = (config.get(key) for key in keys)
    return next((v for v in found if isinstance(v, int) and not isinstance(v, bool) and v > 0), None)
