"""Layers that were wrapped twice: PEFT puts ``.base_layer`` into the names of what it finds inside a wrapper.

Inside an attention layer (``nn.MultiheadAttention``) that is the form of its ``out_proj``; around expert parameters
(``target_parameters``), the form of the second of them. Anywhere else the base's own layer is meant: the model had an
adapter around it already.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from coremerge.errors import TensorError, UnsupportedError
from coremerge.formats.config import as_integer
from coremerge.formats.patterns import Patterns

if TYPE_CHECKING:
    from coremerge.formats.checkpoint import Checkpoint, Keys

_INNER = "base_layer"
_ATTENTION = ".base_layer.out_proj"


def settle(checkpoint: Checkpoint, keys: Keys) -> None:
    """Give layers that were wrapped twice the base's own names, and say so in the notes.

    Raises:
        UnsupportedError: LoRA on expert parameters.
        TensorError: two adapters around one layer.
    """
    _refuse_experts(checkpoint, keys.parts)
    inner = [name for name in keys.parts if _INNER in name.split(".") and not _is_attention(name, keys.parts)]
    for name in inner:
        own = ".".join(step for step in name.split(".") if step != _INNER)
        if own in keys.parts:
            raise TensorError(
                f"two adapters are around {own}, one inside the other, and the config tells the scale of one only",
                file=checkpoint.tensors.path, key=next(iter(keys.parts[name].values())),
                remedy="Merge the first into the base before the second is trained, or save each on its own",
            )  # fmt: skip
        keys.parts[own] = keys.parts.pop(name)
    if inner:
        keys.notes.append(f"{len(inner)} layers were wrapped already ({_INNER} in the name): read as the layers inside")
    declared = _declared(checkpoint)
    if declared:
        keys.notes.append(f"target_parameters lists {', '.join(declared)}, and the file has nothing for them")


def _is_attention(name: str, parts: Mapping[str, object]) -> bool:
    return name.endswith(_ATTENTION) and name.removesuffix(_ATTENTION) in parts


def _refuse_experts(checkpoint: Checkpoint, parts: Mapping[str, Mapping[str, str]]) -> None:
    declared = _declared(checkpoint)
    holders = [path for path in (parameter.rpartition(".")[0] for parameter in declared) if path]
    for name, keys in parts.items():
        layer = name.removesuffix("." + _INNER)
        experts = layer.rpartition(".")[2] == "experts" and layer != name
        stacked = (declared or layer.rpartition(".")[2] == "experts") and _is_stacked(checkpoint, layer, keys)
        if experts or stacked or any(f".{layer}".endswith(f".{path}") for path in holders):
            raise UnsupportedError(
                "LoRA on expert parameters (MoE) is not read yet",
                file=checkpoint.tensors.path, key=next(iter(keys.values())),
                remedy="Merge adapters of target_modules only",
            )  # fmt: skip


def _declared(checkpoint: Checkpoint) -> tuple[str, ...]:
    return checkpoint.config.names("target_parameters") if checkpoint.config.given("target_parameters") else ()


def _is_stacked(checkpoint: Checkpoint, layer: str, keys: Mapping[str, str]) -> bool:
    """Whether A has the rows of several experts, one below the other."""
    config = checkpoint.config
    rows = checkpoint.tensors.entries[keys["lora_A"]].shape[:1] if "lora_A" in keys else ()
    if not rows or config.type != "LORA":
        return False
    rank = Patterns(config, "rank_pattern", as_integer).get(layer, config.integer("r", 8))
    return rank > 0 and rows[0] > rank and rows[0] % rank == 0
