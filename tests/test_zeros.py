"""What adds nothing is told, adapter by adapter; nothing but zeros is written only where it was asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from coremerge import Recipe, load
from coremerge.errors import InputError
from coremerge.pipeline import Merged, merge_files
from tiny import make_adapter

MODULES = 4
ZERO_B = "lora_A or lora_B is zero in all of its 4 modules"


def untrained(path: Path, side: str = "lora_B") -> Path:
    """As PEFT makes it: one of the factors is zero."""
    from safetensors.torch import load_file, save_file

    make_adapter(path)
    file = path / "adapter_model.safetensors"
    tensors = {key: value * (side not in key) for key, value in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})
    return path


@pytest.fixture
def adapters(tmp_path: Path) -> dict[str, Path]:
    return {
        "live": make_adapter(tmp_path / "live", 4),
        "other": make_adapter(tmp_path / "other", 6, seed=2),
        "zero": untrained(tmp_path / "zero"),
        "zero_a": untrained(tmp_path / "zero_a", "lora_A"),
        "alpha": make_adapter(tmp_path / "alpha", lora_alpha=0),
    }


def merged(adapters: dict[str, Path], names: str, out: Path, **recipe: Any) -> Merged:
    return merge_files([adapters[name] for name in names.split()], out, Recipe(**recipe))


@pytest.mark.parametrize(
    ("names", "recipe", "told"),
    [
        ("zero live", {}, [f"zero adds nothing to the merge: {ZERO_B}"]),
        ("zero_a live", {"method": "ties", "space": "full"}, [f"zero_a adds nothing to the merge: {ZERO_B}"]),
        ("live zero zero_a", {"method": "sum"}, ["zero adds nothing", "zero_a adds nothing"]),
        ("alpha live", {}, ["alpha adds nothing to the merge: its scale (lora_alpha / r) is 0 in all of its modules"]),
        ("live other", {"weights": [1, 0]}, ["other has weight 0: it adds nothing to the merge"]),
        ("live other", {"weights": {"live": 0}}, ["live has weight 0"]),
        ("live other", {"scale": 0}, ["the scale is 0: the result is zero in all modules"]),
        ("live other", {"weights": [0, 0]}, ["live has weight 0", "other has weight 0"]),
        ("zero zero_a", {"scale": 0}, ["the scale is 0", "zero adds nothing", "zero_a adds nothing"]),
        ("live other", {}, []),
    ],
)
def test_what_adds_nothing_is_warned_of_once_and_everywhere(
    adapters: dict[str, Path], tmp_path: Path, names: str, recipe: dict, told: list[str]
) -> None:
    found = merged(adapters, names, tmp_path / "OUT", **recipe)
    said = [text for text in found.report.warnings if "add" in text or "zero" in text]
    assert len(said) == len(told)
    for text, start in zip(said, told, strict=True):
        assert text.startswith(start)
    record = json.loads((tmp_path / "OUT" / "coremerge.json").read_text())
    card = (tmp_path / "OUT" / "README.md").read_text().replace("\\", "")  # as Markdown escapes it
    assert all(text in record["warnings"] and text in card for text in said)


def test_a_single_module_of_zeros_is_no_news(adapters: dict[str, Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = adapters["other"] / "adapter_model.safetensors"
    tensors = load_file(file)
    first = next(key for key in tensors if "lora_B" in key)
    save_file(tensors | {first: tensors[first] * 0}, file, {"format": "pt"})
    assert merged(adapters, "live other", tmp_path / "OUT").report.warnings == ()


@pytest.mark.parametrize(
    ("names", "recipe", "why"),
    [
        ("zero", {}, r"nothing to merge: the adapters \(zero\) are zero in all of 4 modules"),
        ("zero zero_a alpha", {}, "nothing to merge: .*lora_alpha in their configs"),
        ("zero live", {"weights": [1, 0]}, "nothing to merge"),
        ("live other", {"method": "dare", "parameters": {"drop_rate": 0.9999999}}, "nothing is left: .*of dare"),
        ("live live", {"method": "sum", "weights": [1, -1]}, "nothing is left: .*Check the weights"),
        ("live live", {"method": "sum", "weights": [1, -1], "space": "full", "scale": 2.0}, "nothing is left"),
    ],
)
def test_nothing_but_zeros_is_refused(
    adapters: dict[str, Path], tmp_path: Path, names: str, recipe: dict, why: str
) -> None:
    with pytest.raises(InputError, match=why):
        merged(adapters, names, tmp_path / "OUT", **recipe)
    assert not (tmp_path / "OUT").exists()


@pytest.mark.parametrize("recipe", [{"scale": 0}, {"weights": [0, 0]}, {"weights": {"live": 0, "zero": 0}}], ids=str)
def test_zeros_that_were_asked_for_are_written(adapters: dict[str, Path], tmp_path: Path, recipe: dict) -> None:
    merged(adapters, "live zero", tmp_path / "OUT", **recipe)
    assert all(not update.dense().any() for update in load(tmp_path / "OUT").values())


def test_whole_tensors_and_biases_are_more_than_zeros(tmp_path: Path) -> None:
    head = make_adapter(
        tmp_path / "H", lora_alpha=0, extra={"score.weight": torch.ones(2, 24)}, modules_to_save=["score"]
    )
    found = merge_files([head], tmp_path / "OUT")
    assert "score.weight" in next(iter(load(tmp_path / "OUT").extras))
    assert any("H adds nothing" in text for text in found.report.warnings)


def test_modules_of_which_a_method_leaves_nothing_are_counted(adapters: dict[str, Path], tmp_path: Path) -> None:
    for seed in range(20):
        recipe = {"method": "dare", "parameters": {"drop_rate": 0.98}, "seed": seed}
        found = merged(adapters, "live other", tmp_path / str(seed), **recipe).report
        empty = sum(not module.norm for module in found.modules.values())
        said = [text for text in found.warnings if "nothing is left" in text]
        assert said == ([f"nothing is left of the adapters in {empty} of 4 modules"] * bool(empty))
        if empty:
            return
    raise AssertionError(torch.__version__)
