"""A folder of ``transformers``: its model written with given weights, every one of them given."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from coremerge.patterns import listed


def write_model(
    kind: type[Any], config: Any, weights: Mapping[str, Tensor], folder: Path, dtype: torch.dtype = torch.float32
) -> None:
    """``config.json`` and ``model.safetensors`` of a model of ``transformers``.

    Args:
        kind: its class.
        config: its configuration.
        weights: name → weight, by the names of this or an earlier version of ``transformers``, which knows how its own
            have changed; tied weights once.
        folder: to write into.
        dtype: that they are stored in.

    Raises:
        ValueError: a weight of the model is missing, one is not the model's, or has another shape.
    """
    from coremerge.learning.files import load_report

    with load_report():  # no bars
        model, said = kind.from_pretrained(
            None, config=config, state_dict=dict(weights), dtype=dtype, output_loading_info=True,
            ignore_mismatched_sizes=True, trust_remote_code=False,
        )  # fmt: skip
    wrong = {
        "weights are missing": said["missing_keys"],
        "weights that the model has not": said["unexpected_keys"],
        "weights of another shape": [key for key, *_ in said["mismatched_keys"]],
    }
    for what, keys in wrong.items():
        if keys:
            raise ValueError(f"{what}: {listed(dict.fromkeys(sorted(keys), ''))}")
    with load_report():
        model.save_pretrained(folder)
