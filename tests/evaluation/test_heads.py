from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from coremerge.errors import SourceError, TensorError
from coremerge.evaluation import Evaluator, Task, read_taskset
from coremerge.evaluation.heads import fits, load_head, side_of


def test_a_head_of_the_wrong_size_is_refused(own_folder: Path) -> None:
    save_file({"weight": torch.ones(3, 16), "bias": torch.ones(3)}, own_folder / "colour" / "head.safetensors")
    with pytest.raises(TensorError, match=r"head\.safetensors.*3 outputs, the task 2"):
        load_head(read_taskset(own_folder), "colour")


@pytest.mark.parametrize(
    ("tensors", "why"),
    [
        ({"weight": torch.tensor(1.0)}, r"weight: of shape \[\]"),
        ({"weight": torch.ones(2)}, r"weight: of shape \[2\]"),
        ({"weight": torch.ones(2, 16, 1)}, r"weight: of shape \[2, 16, 1\]"),
        ({"weight": torch.ones(2, 0)}, r"weight: of shape \[2, 0\]"),
        ({"weight": torch.ones(2, 16), "bias": torch.tensor(0.0)}, r"bias: of shape \[\]"),
        ({"weight": torch.ones(2, 16), "bias": torch.ones(1, 2)}, r"bias: of shape \[1, 2\]"),
        ({"weight": torch.ones(2, 16), "bias": torch.ones(3)}, "bias: a bias for 3 outputs beside a weight for 2"),
        ({"weight": torch.full((2, 16), math.nan)}, "weight: 32 of 32 values are NaN or infinite"),
        ({"weight": torch.ones(2, 16), "bias": torch.tensor([0.0, math.inf])}, "bias: 1 of 2 values are NaN"),
        ({"weight": torch.ones(2, 16, dtype=torch.int64)}, "weight = .*floating point"),
        ({"weight": torch.ones(16, 2)}, "16 outputs, the task 2"),
    ],
)
def test_a_head_that_is_no_linear_layer_is_refused_by_name(own_folder: Path, tensors: dict, why: str) -> None:
    save_file(tensors, own_folder / "colour" / "head.safetensors")
    with pytest.raises(TensorError, match=rf"head\.safetensors: .*{why}"):
        load_head(read_taskset(own_folder), "colour")


def test_a_head_of_another_width_is_refused_by_name(own_folder: Path) -> None:
    save_file({"weight": torch.ones(2, 24)}, own_folder / "colour" / "head.safetensors")
    with pytest.raises(TensorError, match=r"head\.safetensors: weight: the head takes 24 features.* makes 16"):
        Evaluator(read_taskset(own_folder), {}).score({}, "test")


def test_a_head_without_weight_is_refused(own_folder: Path) -> None:
    save_file({"bias": torch.ones(2)}, own_folder / "colour" / "head.safetensors")
    with pytest.raises(TensorError, match="weight"):
        load_head(read_taskset(own_folder), "colour")


def test_a_head_may_have_no_bias(own_folder: Path) -> None:
    save_file({"weight": torch.ones(2, 16)}, own_folder / "colour" / "head.safetensors")
    _, bias = load_head(read_taskset(own_folder), "colour")
    assert bias.tolist() == [0, 0]


def test_a_missing_head_is_named(own_folder: Path) -> None:
    (own_folder / "colour" / "head.safetensors").unlink()
    with pytest.raises(SourceError, match=r"head\.safetensors"):
        load_head(read_taskset(own_folder), "colour")


def test_a_head_of_maps_gives_a_square_of_numbers_for_each_patch() -> None:
    settings = {"metric": "accuracy", "classes": ["a", "b", "c"], "head": "h", "test": "t"}
    task = Task(kind="classification", per="pixel", **settings)  # type: ignore[arg-type]
    assert [size for size in range(1, 80) if fits(task, size)] == [3, 12, 27, 48, 75]
    assert [side_of(task, size) for size in (3, 12, 27)] == [1, 2, 3]
    whole = Task(kind="classification", **settings)  # type: ignore[arg-type]
    assert [size for size in range(1, 80) if fits(whole, size)] == [3]
