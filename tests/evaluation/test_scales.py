from __future__ import annotations

import pytest
from pydantic import ValidationError

from coremerge.evaluation.scales import Scales, walk

FINE = Scales(factor=2**0.25, patience=2)


@pytest.mark.parametrize("peak", [0.3, 1.0, 2.6])
def test_the_best_scale_is_found_where_scores_have_one_peak(peak: float) -> None:
    best, score = walk(lambda s: -abs(s - peak), FINE)
    assert abs(best - peak) < 0.1 * peak
    assert score == -abs(best - peak)


def test_it_stops_where_scores_keep_rising() -> None:
    assert walk(lambda s: s, Scales())[0] == pytest.approx(16)
    assert walk(lambda s: -s, Scales())[0] == pytest.approx(1 / 16)


def tried(scales: Scales, peak: float, auto: float = 1.0) -> list[float]:
    calls: list[float] = []

    def score(scale: float) -> float:
        calls.append(scale)
        return -((scale - peak) ** 2)

    walk(score, scales, auto)
    return calls


def test_few_scales_are_tried() -> None:
    assert tried(Scales(), 1.0) == pytest.approx([1, 2**0.5, 2**-0.5])
    assert tried(Scales(), 3.0, auto=3.0)[0] == 3.0


def test_the_papers_walk_goes_up_by_tenths_until_scores_fall() -> None:
    walk_up = Scales(start=0.1, step=0.1, both=False, patience=2)
    assert tried(walk_up, 0.4) == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    assert tried(Scales(start=0.1, step=0.2, both=False, largest=0.9), 9.0) == [0.1, 0.3, 0.5, 0.7, 0.9]
    assert tried(Scales(start=0.3, step=0.1), 0.0) == [0.3, 0.4, 0.2, 0.1]


def test_scales_can_be_listed() -> None:
    assert tried(Scales(values=(3.0, 0.5)), 1.0) == [3.0, 0.5]


def test_steps_and_factors_exclude_each_other() -> None:
    with pytest.raises(ValidationError, match="either factor or step"):
        Scales(step=0.1, factor=2)
