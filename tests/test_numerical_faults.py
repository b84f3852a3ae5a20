"""Numbers at the edge of what floats hold: the right result, or a refusal or a note that names what is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from coremerge import Adapter, LowRank, Recipe, load, merge
from coremerge.errors import ConfigError, TensorError
from coremerge.linalg import LinAlgError, column_basis, numerical_rank
from coremerge.merging import execute
from coremerge.pipeline import merge_files
from coremerge.plan import make_plan
from laws import close, lowrank, named, normal, one, run
from tolerances import SINGLE

SPACES = ["core", "knots", "full"]
RECIPES = [{"method": "sum"}, {"method": "tsv", "steps": ["isotropize"]}, {"method": "ties"}, {"method": "cart"}]


def write(folder: Path, alpha: float, seed: int, dtype: torch.dtype = torch.float32, size: float = 1.0) -> Path:
    """One module, 7 × 6 of rank 2, with a B of this size."""
    draw = normal(seed)
    folder.mkdir()
    factors = {"A": draw(2, 6), "B": size * draw(7, 2).clamp(-1, 1)}
    save_file(
        {f"base_model.model.layer.lora_{x}.weight": factor.to(dtype) for x, factor in factors.items()},
        folder / "adapter_model.safetensors",
    )
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": alpha, "target_modules": ["layer"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def two(folder: Path, alpha: float, **how: object) -> list[Path]:
    return [write(folder / f"a{i}", alpha, i, **how) for i in range(2)]


def written(folder: Path) -> tuple[Tensor, Tensor]:
    tensors = load_file(folder / "adapter_model.safetensors")
    return tensors["base_model.model.layer.lora_B.weight"], tensors["base_model.model.layer.lora_A.weight"]


# Scales.


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("recipe", RECIPES, ids=str)
@pytest.mark.parametrize("octaves", [-300, -100, 100, 300])
def test_an_extreme_alpha_scales_the_merge_and_nothing_else(
    tmp_path: Path, space: str, recipe: dict, octaves: int
) -> None:
    plain, scaled = (
        merge([load(path) for path in two(tmp_path / str(o), 2.0 * 2.0**o)], Recipe(space=space, **recipe))
        for o in ((tmp_path / "0").mkdir() or 0, (tmp_path / str(octaves)).mkdir() or octaves)
    )
    close(scaled.adapter["layer"].dense() * 2.0**-octaves, plain.adapter["layer"].dense())
    assert scaled.report.scale == pytest.approx(plain.report.scale)


@pytest.mark.parametrize("alpha", [1e-300, 1e300])
def test_an_alpha_that_cannot_be_meant_is_refused_by_name(tmp_path: Path, alpha: float) -> None:
    with pytest.raises(ConfigError, match=r"a1: lora_alpha: module layer counts 5e[-+]\d+ times"):
        merge_files([write(tmp_path / "a0", 2, 0), write(tmp_path / "a1", alpha, 1)], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_update_whose_square_is_nothing_is_refused_by_name() -> None:
    update = lowrank(6, 5, 2)
    faint = LowRank(1e-100 * update.left, 1e-100 * update.right)
    with pytest.raises(TensorError, match=r"a1: layer: an update of size 1e-\d+ cannot be computed with"):
        run(named([update, faint]), method="sum")


@pytest.mark.parametrize("size", [1e-170, 1e170])
def test_factors_of_any_size_are_merged_where_their_product_is_ordinary(size: float) -> None:
    updates = [lowrank(6, 5, 2, seed=s) for s in range(2)]
    skewed = [LowRank(u.left * size, u.right / size) for u in updates]
    for space in SPACES:
        close(run(named(skewed), space=space, method="sum").adapter["layer"].dense(), sum(u.dense() for u in updates))


def test_weights_of_any_size_are_scaled_away_or_refused() -> None:
    updates = [lowrank(6, 5, 2, seed=s) for s in range(2)]
    plain = run(named(updates), method="sum", scale="auto").adapter["layer"].dense()
    for weight in (1e-14, 1e14, 1e-60):
        result = run(named(updates), method="sum", scale="auto", weights=[weight, weight])
        close(result.adapter["layer"].dense(), plain)
    for weight in (1e-300, 1e300):
        with pytest.raises(ConfigError, match="weights: module layer becomes one of size"):
            run(named(updates), method="sum", weights=[weight, weight])


def test_parameters_that_blow_up_a_merge_are_refused() -> None:
    updates = [lowrank(6, 5, 2, seed=s) for s in range(2)]
    with pytest.raises(TensorError, match="layer: the merged update is too large"):
        run(named(updates), method="cart", parameters={"scale": 1e200})


# What small things beside large ones become.


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("ratio", [1e6, 1e9, 1e11])
def test_a_sum_keeps_what_is_small_next_to_a_huge_adapter(space: str, ratio: float) -> None:
    huge, small = ratio * lowrank(9, 7, 2), lowrank(9, 7, 2, seed=1)
    merged = run(named([huge, small]), space=space, method="sum").adapter["layer"].dense()
    assert (merged - huge.dense() - small.dense()).abs().max() < 1e-14 * huge.dense().abs().max()


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("recipe", [{"method": "sum"}, {"method": "tsv", "steps": ["isotropize"]}], ids=str)
def test_how_an_update_is_split_into_factors_does_not_decide_whether_it_counts(space: str, recipe: dict) -> None:
    updates = [lowrank(9, 7, 2, seed=s) for s in range(3)]
    plain = run(named(updates), **recipe).adapter["layer"].dense()
    for factor in (1e-12, 1e12):
        uneven = [LowRank(factor * updates[0].left, updates[0].right / factor), *updates[1:]]
        close(run(named(uneven), space=space, **recipe).adapter["layer"].dense(), plain)


def test_what_is_as_good_as_zero_does_not_count_in_the_scale() -> None:
    update = lowrank(9, 7, 2)
    result = run(named([update, 1e-14 * lowrank(9, 7, 2, seed=1)]), method="sum", scale="auto")
    assert result.report.scale == pytest.approx(1.0)


def test_a_basis_of_any_size_is_orthonormal() -> None:
    stack = normal()(20, 4)
    for size in (1e-300, 1e-158, 1e-30, 1e158, 1e300):
        for singular in (True, False):
            vectors = stack * size @ column_basis(stack * size, singular=singular).transform
            close(vectors.mT @ vectors, torch.eye(4).double(), 1.0)


@pytest.mark.parametrize("recipe", [{"space": "full"}, {"space": "full", "steps": ["balance"]}, {"steps": ["balance"]}])
def test_rounding_errors_do_not_vote_in_ties(recipe: dict) -> None:
    draw = normal()
    updates = [LowRank(torch.zeros(12, 2).double(), torch.zeros(2, 12).double()) for _ in range(3)]
    for i, update in enumerate(updates):  # none has an entry where another one has
        update.left[4 * i : 4 * i + 4], update.right[:, 4 * i : 4 * i + 4] = draw(4, 2), draw(2, 4)
    for turn in (torch.eye(12).double(), torch.linalg.qr(draw(12, 12)).Q if recipe.get("space") != "full" else None):
        if turn is not None:
            turned = [LowRank(turn @ u.left, u.right) for u in updates]
            merged = run(named(turned), method="ties", parameters={"density": 1.0}, **recipe).adapter["layer"].dense()
            close(merged, sum(u.dense() for u in turned))


# What is not a number.


def test_values_that_are_not_finite_have_no_rank() -> None:
    for bad in (float("nan"), float("inf")):
        with pytest.raises(LinAlgError):
            numerical_rank(torch.tensor([bad, 1.0]))


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("steps", [[], ["balance"]])
def test_sixteen_bit_values_that_leave_float32_once_they_are_scaled_are_merged(
    tmp_path: Path, space: str, steps: list[str]
) -> None:
    for size in (3e38, 1e-38):
        folder = tmp_path / f"{size}"
        folder.mkdir()
        paths = two(folder, 32, dtype=torch.bfloat16, size=size)
        exact = sum(load(path)["layer"].dense() for path in paths)
        result = merge([load(path) for path in paths], Recipe(space=space, method="sum", steps=steps, scale=1.0))
        close(result.adapter["layer"].dense(), exact)
        assert exact.abs().max() > 0
        short = result.adapter.read("layer", torch.float32)
        close(short.left.double() @ short.right.double(), exact, tol=SINGLE)


def test_nan_is_refused_with_its_file_and_tensor(tmp_path: Path) -> None:
    paths = two(tmp_path, 2)
    tensors = load_file(paths[1] / "adapter_model.safetensors")
    tensors["base_model.model.layer.lora_A.weight"][1, 2] = float("nan")
    save_file(tensors, paths[1] / "adapter_model.safetensors")
    with pytest.raises(TensorError, match=r"a1.*layer\.lora_A\.weight: 1 of 12 values are NaN"):
        merge_files(paths, tmp_path / "out")


# What is written.


def test_what_is_too_small_for_the_file_is_said(tmp_path: Path) -> None:
    for alpha, dtype, wider in ((1e-12, "float16", "float32, or bfloat16"), (1e-90, "float32", "float64")):
        folder = tmp_path / dtype
        folder.mkdir()
        merged = merge_files(two(folder, alpha), folder / "out", Recipe(dtype=dtype))
        (note,) = merged.notes
        assert note.startswith(f"layer: values too small for {dtype}") and note.endswith(f"--dtype {wider}")
        again = merge_files(two(folder / "out", alpha), folder / "again", Recipe(dtype=wider.split()[-1]))
        assert not again.notes and all(bool(factor.any()) for factor in written(folder / "again"))


def test_what_is_zero_is_not_said_to_be_too_small(tmp_path: Path) -> None:
    merged = merge_files(two(tmp_path, 0), tmp_path / "out", Recipe(dtype="float16", weights=[0, 0]))
    assert not merged.notes and not any(bool(factor.any()) for factor in written(tmp_path / "out"))
    assert not merge_files(two(tmp_path / "out", 2), tmp_path / "scaled", Recipe(dtype="float16", scale=0)).notes


def test_what_is_too_large_for_the_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TensorError, match=r"layer: values up to \S+ do not fit float16.*--dtype float32"):
        merge_files(two(tmp_path, 1e12), tmp_path / "out", Recipe(dtype="float16"))
    assert not (tmp_path / "out").exists()


# The lift in float32.


def test_a_lift_in_float32_is_within_1e_5_of_one_in_float64() -> None:
    taken = 0
    for seed in range(60):
        draw, near = normal(seed), 10.0 ** -(seed % 3)
        common = draw(40, 4)
        factors = [(common + near * draw(40, 4), draw(4, 30)) for _ in range(3)]
        adapters = [one(LowRank(left.bfloat16(), right.bfloat16())) for left, right in factors]
        recipe = Recipe(method="tsv", steps=["isotropize"] if seed % 2 else [], dtype="bfloat16")
        merged = execute(make_plan(adapters, recipe), threads=1).adapter
        short, exact = merged.read("layer", torch.float32), merged["layer"]
        for side in ("left", "right"):
            a, b = getattr(short, side).double(), getattr(exact, side)
            taken += not torch.equal(a.float(), b.float())
            close(a, b, float(b.abs().max()), tol=SINGLE)
    assert taken > 30


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_a_lift_of_numbers_near_the_ends_of_float32_stays_in_float64(size: float) -> None:
    updates = [lowrank(40, 30, 4, seed=s) for s in range(2)]
    adapters = [one(LowRank((size * u.left).bfloat16(), (u.right / size).bfloat16())) for u in updates]
    merged = execute(make_plan(adapters, Recipe(method="sum", dtype="bfloat16")), threads=1).adapter
    assert torch.equal(merged.read("layer", torch.float32).left, merged["layer"].left.float())


def test_zeros_everywhere_merge_to_zero() -> None:
    nothing = Adapter.from_updates({"layer": LowRank(torch.zeros(6, 2), torch.zeros(2, 5))})
    for space in SPACES:
        for recipe in RECIPES:
            result = merge([nothing, nothing], Recipe(space=space, **recipe))
            assert result.report.scale == 1.0
            assert not result.adapter["layer"].dense().any()
