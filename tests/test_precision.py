"""Shorter floats are used only where they cost nothing that the result could show."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from coremerge import Adapter, LowRank, Recipe, load, merge
from coremerge.adapter import Module
from coremerge.lowrank import svds
from coremerge.merging import _short_lift_will_do, execute
from coremerge.plan import make_plan
from tolerances import DOUBLE, SINGLE


def adapter(seed: int, decay: float = 0.5) -> Adapter:
    torch.manual_seed(seed)
    sizes = decay ** torch.arange(4)
    update = LowRank((torch.randn(24, 4) * sizes).bfloat16(), torch.randn(4, 20).bfloat16())
    return Adapter.from_updates({"layers.0.q_proj": update, "layers.1.q_proj": 2.0 * update})


def in_float64(given: Adapter) -> Adapter:
    """With numbers that no narrower float holds."""
    return Adapter.from_updates({name: LowRank(update.left / 3, update.right / 3) for name, update in given.items()})


@pytest.mark.parametrize(
    ("dtype", "scale", "expected"),
    [
        (torch.bfloat16, 2.0, torch.float32),
        (torch.float16, 0.75, torch.float32),
        (torch.float16, 16 / 8**0.5, torch.float64),
        (torch.bfloat16, 2.0**40, torch.float64),
        (torch.float32, 1.0, torch.float64),
    ],
)
def test_float32_is_used_where_it_is_exact(dtype: torch.dtype, scale: float, expected: torch.dtype) -> None:
    assert Module((4, 3), 2, dtype=dtype, scale=scale).exact_dtype == expected


@pytest.mark.parametrize("alpha", [8, 5])
def test_what_is_read_short_equals_what_is_read_long(tmp_path: Path, alpha: int) -> None:
    adapter(0).save(tmp_path / "a", dtype="bfloat16")
    config = tmp_path / "a" / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 4', f'"lora_alpha": {alpha}'))
    held = load(tmp_path / "a")
    for name in held:
        short, long = held.read(name), held[name]
        assert short.dtype == torch.float32
        assert torch.equal(short.left.double(), long.left)
        assert torch.equal(short.right.double(), long.right)


def test_a_lift_in_float32_is_invisible_after_rounding(tmp_path: Path) -> None:
    result = merge([adapter(0), adapter(1)], Recipe(dtype="bfloat16"))
    for name, exact in result.adapter.items():
        short = result.adapter.read(name, torch.float32)
        torch.testing.assert_close(short.left.double(), exact.left, rtol=0, atol=SINGLE * float(exact.left.abs().max()))
        torch.testing.assert_close(
            short.right.double(), exact.right, rtol=0, atol=SINGLE * float(exact.right.abs().max())
        )


def test_an_ill_conditioned_lift_stays_in_float64() -> None:
    steep = [in_float64(adapter(seed, decay=1e-3)) for seed in (0, 1)]  # whose smallest directions are no errors
    result = execute(make_plan(steep, Recipe(method="tsv", steps=["isotropize"], dtype="bfloat16")))
    for name, exact in result.adapter.items():
        assert torch.equal(result.adapter.read(name, torch.float32).left, exact.left.float())


def test_amplification_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    from coremerge import merging

    seen = []
    monkeypatch.setattr(merging, "_short_lift_will_do", lambda s, d: seen.append(s) or _short_lift_will_do(s, d))
    result = merge([adapter(0), adapter(1)], Recipe(dtype="float16"))
    result.adapter.read("layers.0.q_proj", torch.float32)
    (solved,) = seen
    assert 1 < solved.amplification < 1000
    assert _short_lift_will_do(solved, torch.float16)
    assert not _short_lift_will_do(replace(solved, amplification=1e5), torch.float16)


def test_svds_of_like_matrices_are_those_of_each() -> None:
    torch.manual_seed(0)
    made = [LowRank(torch.randn(6, 2).double(), torch.randn(2, 5).double()) for _ in range(3)]
    for thin, matrix in zip(svds(made), made, strict=True):
        assert matrix.svd is thin
        torch.testing.assert_close(thin.dense(), matrix.dense())


@pytest.mark.parametrize("space", ["core", "knots", "full"])
@pytest.mark.parametrize("steps", [[], ["balance"]])
def test_short_inputs_merge_as_their_exact_values_do(tmp_path: Path, space: str, steps: list[str]) -> None:
    for i in range(2):
        adapter(i).save(tmp_path / str(i), dtype="bfloat16")
    files = [load(tmp_path / str(i)) for i in range(2)]
    recipe = Recipe(space=space, method="sum", steps=steps, scale=1.0)
    for name, update in merge(files, recipe).adapter.items():
        expected = sum(file[name].dense() for file in files)
        torch.testing.assert_close(update.dense(), expected, rtol=DOUBLE / 10, atol=DOUBLE / 10)
