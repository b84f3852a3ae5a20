"""What the accuracy benchmarks compute of their measurements."""

from __future__ import annotations

import pytest
from benchmarks.accuracy.compression import Point, correlation, draw, means, pearson, row, spearman


def curve(direction: float, steps: int = 6) -> list[Point]:
    return [Point(10 * i, direction * i**2, 1 - 0.1 * i, 1 + 0.1 * i) for i in range(steps)]


def test_correlations_against_known_values() -> None:
    assert pearson([1, 2, 3], [2, 4, 6]) == pytest.approx(1)
    assert pearson([1, 2, 3, 4], [1, 3, 2, 4]) == pytest.approx(0.8)
    assert spearman([1, 2, 3, 4], [1, 8, 27, 64]) == pytest.approx(1)
    assert spearman([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(0.9486832980505138)  # equal values share a rank


def test_a_correlation_is_of_the_ratio_and_the_score() -> None:
    rising = curve(1.0)
    assert correlation(rising, spearman) == pytest.approx(-1)
    assert correlation(rising, spearman, "last") == pytest.approx(1)
    turned = [*rising, Point(60, 20.0, 0.6, 2.0)]
    assert correlation(turned, spearman, since=50) == pytest.approx(-1)


def test_the_kinds_are_averaged_apart() -> None:
    curves = {"a": curve(1.0), "b": curve(-1.0), "c": curve(1.0), "fixed": curve(-1.0)}
    kinds = dict(zip(curves, ("classification", "classification", "regression", "regression"), strict=True))
    lines = means(kinds, curves, ["fixed"])
    assert [(line[0], line[1], line[5]) for line in lines] == [
        ("mean of 2", "classification", "0.00"),
        ("mean of 1", "regression", "-1.00"),
    ]
    assert row("a", "classification", curves["a"])[2:6] == ["0.00 → 25.00", "1.000 → 0.500", "-0.96", "-1.00"]


@pytest.mark.parametrize("count", [1, 5])
def test_a_figure(count: int) -> None:
    figure = draw({f"t{i}": curve(1.0) for i in range(count)}, {f"t{i}": "accuracy" for i in range(count)})
    titles = [axes.get_title() for axes in figure.axes]
    assert [title.partition("\n")[0] for title in titles if title] == [f"t{i}" for i in range(count)]
