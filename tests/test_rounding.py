from __future__ import annotations

import pytest
import torch

from coremerge.rounding import column_rounding, stored_rounding
from laws import normal

KINDS = (torch.bfloat16, torch.float16, torch.float32)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_the_mean_error_is_what_rounding_does(kind: torch.dtype) -> None:
    x = normal(0)(4000, 8)
    stored = x.to(kind)
    relative = (stored.double() - x).norm(dim=0) / x.norm(dim=0)
    # a column of 4,000 numbers has its mean error to a few parts in a hundred; √6 is an average over mantissas
    assert column_rounding(stored, kind) == pytest.approx(relative, rel=0.1)


@pytest.mark.parametrize("wide", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_numbers_that_came_from_a_narrower_format_are_no_more_precise(kind: torch.dtype, wide: torch.dtype) -> None:
    narrow = normal(1)(30, 3).to(kind)
    assert torch.equal(column_rounding(narrow.to(wide), wide), column_rounding(narrow, kind))


def test_one_number_of_full_precision_is_enough() -> None:
    x = normal(1)(300, 3).to(torch.bfloat16).float()
    x[250, 1] = 1 / 3
    assert column_rounding(x, torch.float32)[0] < 1e-7


def test_of_two_factors_the_coarser_counts() -> None:
    left, right = normal(2)(9, 2), normal(3)(2, 7)
    fine, coarse = left.float(), right.to(torch.bfloat16)
    for pair in ((fine, coarse.float()), (coarse.mT.float(), fine.mT)):
        assert stored_rounding(*pair, torch.float32) == pytest.approx(column_rounding(coarse.mT, torch.bfloat16))


def test_the_smallest_float16_numbers_have_larger_errors() -> None:
    x = normal(4)(4000, 2) * torch.tensor([1.0, 1e-6])
    stored = x.to(torch.float16)
    relative = (stored.double() - x).norm(dim=0) / x.norm(dim=0)
    assert relative[1] > 10 * relative[0]
    # near the smallest number the error is uniform over one spacing, √2 more than the average that is taken
    assert column_rounding(stored, torch.float16) == pytest.approx(relative, rel=0.5)
    assert torch.isfinite(column_rounding(torch.zeros(4, 2, dtype=torch.float16), torch.float16)).all()
