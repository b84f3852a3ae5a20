"""Copies, near copies and shared spans: what is below the precision of the stored numbers does not count."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from coremerge.adapter import Adapter
from coremerge.lowrank import LowRank
from coremerge.merging import merge
from coremerge.methods import METHODS
from coremerge.recipe import Recipe
from coremerge.spaces import SPACES
from coremerge.steps import STEPS, Before
from laws import BASIC, examples, normal, orthogonal

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
M, N, R = 48, 40, 4
FLAT = [["isotropize"], [{"isotropize": {"span": True}}, {"truncate": {"rank": 3}}]]


def trained(seed: int, m: int = M, n: int = N, r: int = R) -> LowRank:
    """Singular values with gaps, as trained adapters have them: rounding turns no direction into another."""
    values = torch.tensor([2.0**-i for i in range(r)], dtype=torch.float64)
    root = values.sqrt()
    return LowRank(orthogonal(m, seed)[:, :r] * root, root[:, None] * orthogonal(n, seed + 100)[:r])


def stored(update: LowRank, dtype: torch.dtype, name: str = "a") -> Adapter:
    return Adapter.from_updates({"layer": LowRank(update.left.to(dtype), update.right.to(dtype))}, name=name)


def merged(adapters: dict[str, Adapter], recipe: dict) -> Tensor:
    return merge(adapters, Recipe(**recipe), threads=1).adapter["layer"].dense()


def apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def error(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


RECIPES = [{}, *({"method": method} for method in METHODS)]
IN_SPACES = [
    (recipe, space) for recipe in RECIPES for space in SPACES if space == "core" or recipe.get("method", "tsv") in BASIC
]


@pytest.mark.parametrize(("recipe", "space"), IN_SPACES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_copies_merge_to_the_adapter_itself(recipe: dict, space: str, dtype: torch.dtype) -> None:
    update = trained(1)
    for others in ([torch.float32], [dtype], [dtype, torch.float16]):
        given = {"a": stored(update, torch.float32), **{str(i): stored(update, d) for i, d in enumerate(others)}}
        result = merged(given, recipe | {"space": space})
        # copies differ by half a spacing on average; the mean of several is nearer
        assert apart(result, update.dense()) < max(error(dtype), error(torch.float16) * (len(others) > 1))


@pytest.mark.parametrize(("recipe", "space"), IN_SPACES, ids=str)
def test_copies_keep_directions_that_are_smaller_than_their_rounding(recipe: dict, space: str) -> None:
    """Most of an adapter in 8 bits: its numbers are among the smallest that these hold."""
    update = trained(12)
    fine, coarse = stored(update, torch.float32), stored(0.02 * update, torch.float8_e4m3fn)
    assert (
        apart(merged({"a": coarse, "b": coarse}, recipe | {"space": space}), coarse["layer"].to(torch.float64).dense())
        < 1e-6
    )
    tail = LowRank(update.left * torch.tensor([1, 1e-1, 1e-2, 1e-3]).double(), update.right)
    for dtype in DTYPES:
        same = stored(tail, dtype)
        result = merged({"a": same, "b": same}, recipe | {"space": space})
        assert apart(result, same["layer"].to(torch.float64).dense()) < 1e-6
    nearer = merged({"a": fine, "b": stored(update, torch.float8_e4m3fn)}, recipe | {"space": space})
    if METHODS[recipe.get("method", "tsv")].linear:  # a sum is that of the numbers that there are
        return
    # the coarser counts by its precision; the size is the mean of both
    assert apart(nearer / nearer.norm(), update.dense() / update.dense().norm()) < 1e-4


@pytest.mark.parametrize(("recipe", "space"), IN_SPACES, ids=str)
def test_one_adapter_is_itself_whatever_it_is_stored_as(recipe: dict, space: str) -> None:
    for dtype in DTYPES:
        one = stored(trained(2), dtype)
        for scale in ("auto", 1.0):
            result = merge({"a": one}, Recipe(**recipe, space=space, scale=scale), threads=1)
            assert apart(result.adapter["layer"].dense(), one["layer"].dense()) < 1e-12
            assert result.report.rank == R


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_beside_one_of_weight_zero_too(recipe: dict) -> None:
    """An adapter that has no weight has no size that the merge is brought to."""
    one, large = stored(trained(2), torch.float32), stored(5.0 * trained(3), torch.float32)
    result = merged({"a": one, "b": large}, recipe | {"weights": {"a": 1.0, "b": 0.0}})
    assert apart(result, one["layer"].dense()) < 1e-12


@pytest.mark.parametrize("method", list(METHODS))
def test_what_is_named_acts_on_one_adapter_too(method: str) -> None:
    one = {"a": stored(trained(3), torch.float32)}
    flat = merge(one, Recipe(method=method, steps=["isotropize"], scale=1), threads=1).adapter["layer"].svd
    assert flat.rank() == R
    assert float(flat.values[0] / flat.values[R - 1]) == pytest.approx(1, rel=1e-6)  # float32 factors
    if METHODS[method].neutral:
        known = {"rank": 2, "drop_rate": 0.5, "density": 0.1, "epsilon": 0.05}
        acting = {key: value for key, value in known.items() if key in METHODS[method].parameters}
        cut = merged(one, {"method": method, "parameters": acting})
        assert apart(cut, one["a"]["layer"].dense()) > 0.1


@pytest.mark.parametrize("space", list(SPACES))
@pytest.mark.parametrize("steps", FLAT, ids=str)
@pytest.mark.parametrize("method", [name for name in METHODS if METHODS[name].unitary])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_flattened_copies_stay_in_their_span(method: str, steps: list, space: str, dtype: torch.dtype) -> None:
    update = trained(4)
    given = {"a": stored(update, torch.float32), "b": stored(update, dtype), "c": stored(2.0 * update, dtype)}
    result = merged(given, {"method": method, "steps": steps, "space": space})
    span = update.svd.truncate(R)
    outside = result - span.left @ (span.left.mT @ result @ span.right.mT) @ span.right
    assert outside.norm() < 20 * error(dtype) * result.norm()  # the smallest direction is an eighth of the largest


def shared_rows(dtype: torch.dtype, count: int = 4) -> tuple[dict[str, Adapter], Tensor]:
    """Adapters whose A's are one matrix with its rows rescaled and mixed: trained from one initial A, LoRA-FA, VeRA."""
    draw = normal(5)
    rows = draw(R, N)
    mixed = [(draw(R, R) if i % 2 else torch.diag(draw(R).abs() + 0.5)) @ rows for i in range(count)]
    return {str(i): stored(LowRank(draw(M, R), a), dtype) for i, a in enumerate(mixed)}, rows


@pytest.mark.parametrize("space", list(SPACES))
@pytest.mark.parametrize("recipe", [{}, {"method": "tsv", "steps": ["isotropize"]}, {"steps": ["isotropize"]}], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_is_lifted_out_of_the_rows_that_all_share(recipe: dict, space: str, dtype: torch.dtype) -> None:
    given, rows = shared_rows(dtype)
    for one in (recipe, recipe | {"method": "sum", "steps": ["isotropize"]}):
        result = merge(given, Recipe(**one, space=space), threads=1)
        basis = torch.linalg.qr(rows.mT).Q
        update = result.adapter["layer"].dense()
        assert result.report.rank == R
        assert apart(update @ basis @ basis.mT, update) < 50 * error(dtype)  # mixing has a condition of some ten


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_merge_merged_again_with_an_input_of_its_own_has_no_more_directions(dtype: torch.dtype) -> None:
    inputs = {str(i): stored(trained(10 + i), dtype) for i in range(3)}
    once = merge(inputs, Recipe(method="tsv", dtype=str(dtype).removeprefix("torch.")), threads=1).adapter
    again = stored(once["layer"], dtype)
    for steps in ([], ["isotropize"]):
        result = merge({"merge": again, "input": inputs["0"]}, Recipe(method="tsv", steps=steps), threads=1)
        assert result.report.rank == 3 * R


def test_a_file_in_float32_of_numbers_in_bfloat16_is_a_copy_of_what_it_came_from() -> None:
    update = trained(6)
    coarse = LowRank(update.left.bfloat16().float(), update.right.bfloat16().float())
    given = {"a": stored(update, torch.float32), "b": stored(coarse, torch.float32)}
    assert apart(merged(given, {}), update.dense()) < error(torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("space", "method"), [(space, recipe["method"]) for recipe, space in IN_SPACES if recipe])
def test_what_cancels_up_to_rounding_is_nothing(space: str, method: str, dtype: torch.dtype) -> None:
    update = trained(7)
    given = {"a": stored(update, torch.float32), "b": stored(-1.0 * update, dtype)}
    recipe = {"method": method, "space": space, "scale": 1, "steps": [] if method != "sum" else ["isotropize"]}
    if METHODS[method].linear:
        assert merged(given, recipe).norm() < 2 * error(dtype) * update.norm()
    if method == "ties":
        assert merged(given, recipe | {"parameters": {"density": 1}}).norm() < 2 * error(dtype) * update.norm()


ACTING = [
    (),
    *(
        ({name: examples(STEPS[name])},)
        for name in STEPS
        if not isinstance(STEPS[name].make(examples(STEPS[name])), Before)
    ),
]


@pytest.mark.parametrize("steps", ACTING, ids=str)
@pytest.mark.parametrize(("space", "method"), [(space, recipe["method"]) for recipe, space in IN_SPACES if recipe])
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32), ids=str)
def test_rounding_changes_a_merge_by_its_own_order(space: str, method: str, steps: tuple, dtype: torch.dtype) -> None:
    """Three adapters of which two are copies, one of them rounded: as near to the merge of exact copies as that is."""
    one, other = trained(8), trained(9)
    recipe = {"method": method, "steps": list(steps), "space": space, "scale": 1}
    exact = {"a": stored(one, torch.float32), "b": stored(one, torch.float32), "c": stored(other, torch.float32)}
    rounded = exact | {"b": stored(one, dtype)}
    smooth = METHODS[method].unitary
    # an entry that is trimmed or not by a hair jumps by its size: their share is of the order of the rounding, and
    # the norm of the jump of its root
    most = 20 * error(dtype) if smooth else 3 * error(dtype) ** 0.5
    assert apart(merged(rounded, recipe), merged(exact, recipe)) < most


@pytest.mark.parametrize("space", list(SPACES))
@pytest.mark.parametrize("steps", [[], ["isotropize"]], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_errors_of_a_large_adapter_hide_no_direction_of_a_small_one(
    steps: list, space: str, dtype: torch.dtype
) -> None:
    """A small one's directions are known as well as it is: the large one does not write there."""
    size = 0.1 / error(dtype)
    given = {"large": stored(size * trained(1), dtype), "small": stored(trained(2), dtype)}
    for method in ("tsv", "sum"):
        result = merge(given, Recipe(method=method, steps=steps, space=space), threads=1)
        assert result.report.rank == 2 * R


def test_a_sum_that_is_cut_keeps_what_is_below_rounding() -> None:
    """Linear but for the cut: nothing is lifted, so that nothing need be left out."""
    update = trained(3)
    given = {"a": stored(update, torch.float32), "b": stored(update, torch.bfloat16)}
    cut = [{"truncate": {"rank": 2 * R}}]
    assert merge(given, Recipe(method="sum", steps=cut), threads=1).report.rank == 2 * R
