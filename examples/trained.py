"""What the examples' training scripts do alike with an adapter: write it, and measure its own null-space ratio."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from coremerge import Adapter
from coremerge.learning import measure_null_space


def save_half(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Writes tensors in half precision."""
    save_file({key: value.half().contiguous() for key, value in tensors.items()}, path, {"format": "pt"})


def save_adapter(model: PeftModel, folder: Path, base: str) -> None:
    """Writes PEFT's own two files, tensors in half precision, targets in order, ``base`` as the base model's name."""
    model.peft_config["default"].base_model_name_or_path = base
    model.save_pretrained(str(folder), save_embedding_layers=False)
    path, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    config = json.loads(path.read_text(encoding="utf-8"))
    if isinstance(config["target_modules"], list):
        config["target_modules"].sort()
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_half(load_file(weights), weights)


def own_ratios(model: Any, adapter: Adapter, batches: Sequence[Mapping[str, Any]]) -> dict[str, tuple[float, float]]:
    """Module → the adapter's ratio on its own inputs while it is active, and that of random rows, √(1 - r/n)."""
    found = measure_null_space(model, {"own": adapter}, {"own": batches}, weights={"own": 1.0})["own"]["own"]
    return {name: (ratio, _of_random_rows(*adapter[name].right.shape)) for name, ratio in found.items()}


def mean_ratios(ratios: Mapping[str, tuple[float, float]]) -> dict[str, float]:
    """Over modules, of the adapter's own and of random rows."""
    own, random = (sum(part) / len(part) for part in zip(*ratios.values(), strict=True))
    return {"own": round(own, 4), "random": round(random, 4)}


def _of_random_rows(rank: int, width: int) -> float:
    return float((1 - rank / width) ** 0.5)
