from __future__ import annotations

import numpy as np
import pytest

from coremerge.evaluation.metrics import (
    METRICS,
    Metric,
    accuracy,
    find_metric,
    fisher,
    names_of,
    pearson,
    rmse,
    spearman,
    wilson,
)
from tolerances import DIGITS

DRAW = np.random.default_rng(0)
LABELS = DRAW.integers(0, 3, 200).astype(float)
GUESSES = np.where(DRAW.random(200) < 0.7, LABELS, DRAW.integers(0, 3, 200))
X, Y = DRAW.normal(size=(2, 50))
DIRECTIONS = DRAW.normal(size=(2, 50, 4, 3))


def test_accuracy_counts_rows() -> None:
    assert accuracy(np.array([1, 0, 1, 0]), np.array([1.0, 0.0, 0.0, 1.0])) == 0.5


def test_an_exact_match_has_every_label_of_a_row() -> None:
    labels = np.array([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]])
    guesses = np.array([[1, 0], [1, 0], [0, 1]])
    metric = METRICS["exact_match"]
    assert (metric.score(guesses, labels), accuracy(guesses, labels)) == (pytest.approx(1 / 3), pytest.approx(4 / 6))
    assert metric.between(guesses, labels) == wilson(np.array([1, 0, 0]), np.ones(3))  # of three rows, not six labels
    assert metric.score(GUESSES, LABELS) == accuracy(GUESSES, LABELS)


def test_the_top_classes_hold_the_label_or_not() -> None:
    metric = find_metric("top_2")
    assert metric and metric.top == 2
    guesses, labels = np.array([[2, 0], [1, 2], [0, 1], [0, 2]]), np.array([0.0, 0.0, 0.0, 1.0])
    assert metric.score(guesses, labels) == 0.5
    assert metric.between(guesses, labels) == wilson(np.array([1, 1, 0, 0]), np.ones(4))
    patches = metric.score(guesses.reshape(2, 2, 2), labels.reshape(2, 2))
    assert patches == 0.5


def test_metrics_have_names_and_top_any_number() -> None:
    assert find_metric("accuracy") is METRICS["accuracy"]
    assert [find_metric(name) for name in ("top_0", "top_", "top_x", "top_1.5", "acc", "top_5,none")] == [None] * 6
    assert all(find_metric(name) for name in names_of("regression"))
    assert "top_K (such as top_5)" in names_of("classification") and "r2" not in names_of("classification")


def test_f1_and_iou_are_means_over_the_classes_that_occur() -> None:
    counts = [[int(((a == GUESSES) & (b == LABELS)).sum()) for a in range(3)] for b in range(3)]
    right = [counts[c][c] for c in range(3)]
    wrong = [sum(counts[c]) + sum(row[c] for row in counts) - 2 * right[c] for c in range(3)]
    f1 = np.mean([2 * right[c] / (2 * right[c] + wrong[c]) for c in range(3)])
    iou = np.mean([right[c] / (right[c] + wrong[c]) for c in range(3)])
    assert METRICS["f1"].score(GUESSES, LABELS) == pytest.approx(f1)
    assert METRICS["miou"].score(GUESSES, LABELS) == pytest.approx(iou)


def test_correlations_are_numpys() -> None:
    assert pearson(X, Y) == pytest.approx(np.corrcoef(X, Y)[0, 1], abs=DIGITS)
    ranks = [values.argsort().argsort() for values in (X, Y)]
    assert spearman(X, Y) == pytest.approx(np.corrcoef(*ranks)[0, 1], abs=DIGITS)


def test_errors_are_those_of_their_definitions() -> None:
    assert rmse(X, Y) == pytest.approx(np.sqrt(((X - Y) ** 2).mean()))
    assert METRICS["mae"].score(X, Y) == pytest.approx(np.abs(X - Y).mean())
    assert METRICS["r2"].score(X, Y) == pytest.approx(1 - ((X - Y) ** 2).sum() / ((Y - Y.mean()) ** 2).sum())
    assert {name for name, metric in METRICS.items() if not metric.higher_is_better} == {"rmse", "mae", "angular_error"}


def test_a_correlation_with_a_constant_is_zero() -> None:
    assert pearson(np.ones(4), np.arange(4.0)) == spearman(np.arange(4.0), np.ones(4)) == 0.0


def test_wilsons_interval_is_from_the_counts() -> None:
    low, high = wilson(np.array([1.0] * 8 + [0.0] * 2), np.ones(10))
    p, n, z = 0.8, 10, 1.959964
    centre, half = p + z * z / (2 * n), z * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    whole = 1 + z * z / n
    expected = ((centre - half) / whole, (centre + half) / whole)
    assert (low, high) == pytest.approx(expected, abs=1e-6)  # z has so many digits


def test_fishers_interval_is_scipys() -> None:
    from scipy import stats

    expected = stats.pearsonr(X, Y).confidence_interval()
    assert fisher(X, Y) == pytest.approx((expected.low, expected.high), abs=1e-6)  # as many as ours of z
    assert fisher(X[:3], Y[:3]) == (-1.0, 1.0)
    assert fisher(X, X) == pytest.approx((1.0, 1.0))


@pytest.mark.parametrize("name", METRICS)
def test_every_interval_holds_its_score_and_is_the_same_each_time(name: str) -> None:
    metric = METRICS[name]
    given = (GUESSES, LABELS) if metric.kind == "classification" else (X, X + Y)
    if metric.classes:
        given = (GUESSES > 0, LABELS > 0)
    if metric.directions:
        given = (DIRECTIONS[0] + DIRECTIONS[1], DIRECTIONS[0])
    low, high = metric.between(*given)
    assert low < metric.score(*given) < high
    assert metric.between(*given) == (low, high)


def test_a_bootstrapped_interval_agrees_with_one_from_counts() -> None:
    found = Metric("classification", accuracy).between(GUESSES, LABELS)
    assert found == pytest.approx(wilson(GUESSES, LABELS), abs=0.02)  # of 200 rows, two approximations


def test_one_row_says_nothing_of_others() -> None:
    assert np.isnan(METRICS["accuracy"].between(np.ones(1), np.ones(1))).all()


def test_the_iou_is_of_the_second_class() -> None:
    labels, guesses = np.array([[0, 1, 1], [0, 0, 1]]), np.array([[1, 1, 0], [0, 0, 1]])
    assert METRICS["iou"].score(guesses, labels) == 2 / 4
    assert METRICS["iou"].score(1 - guesses, 1 - labels) == 2 / 4
    assert METRICS["iou"].score(np.zeros((2, 3)), np.zeros((2, 3))) == 0.0


def test_r2_is_about_each_places_mean() -> None:
    usual = np.linspace(0, 9, 10)  # what every map looks like on average
    labels = usual + DRAW.normal(size=(200, 10))
    same = np.broadcast_to(labels.mean(0), labels.shape)
    assert METRICS["r2"].score(same, labels) == pytest.approx(0, abs=DIGITS)
    part = labels * 0.9 + same * 0.1
    assert METRICS["r2"].score(part, labels) == pytest.approx(0.99)
    assert METRICS["r2"].score(part[..., None], labels[..., None]) == pytest.approx(0.99)
    assert METRICS["r2"].score(part[:, 0], labels[:, 0]) == pytest.approx(0.99)


def test_correlations_are_averaged_over_outputs() -> None:
    labels = DRAW.normal(size=(50, 3, 2))
    guesses = labels * [2, -1]
    for name in ("pearson", "spearman"):
        assert METRICS[name].score(guesses, labels) == pytest.approx(0, abs=DIGITS)
        assert METRICS[name].score(guesses[:, :1], labels[:, :1]) == pytest.approx(0, abs=DIGITS)
        assert METRICS[name].score(guesses[..., :1], labels[..., :1]) == pytest.approx(1)


def test_angles_are_in_degrees_and_lengths_do_not_count() -> None:
    labels = np.array([[[1.0, 0, 0], [0, 2, 0]], [[0, 0, 1], [0, 0, 0.01]]])
    guesses = np.array([[[3.0, 0, 0], [1, 1, 0]], [[-1, 0, 0], [1, 0, 0]]])
    assert METRICS["angular_error"].score(guesses, labels) == pytest.approx((0 + 45 + 90) / 3)  # the last has none
    turned = np.array([[[np.sin(0.3), np.cos(0.3)]], [[np.sin(6), np.cos(6)]]])
    right = np.array([[[0.0, 1.0]], [[0.0, 1.0]]])
    assert METRICS["angular_error"].score(turned, right) == pytest.approx(np.degrees(0.3 + 2 * np.pi - 6) / 2)
    assert np.isnan(METRICS["angular_error"].score(guesses, np.zeros((2, 2, 3))))


@pytest.mark.parametrize("name", ["accuracy", "pearson", "top_2"])
def test_patches_of_one_image_do_not_count_as_rows(name: str) -> None:
    """Copies of a row's label add nothing to what is known."""
    metric = find_metric(name)
    assert metric is not None
    given = (GUESSES, LABELS) if metric.kind == "classification" else (X, X + Y)
    if metric.top:
        given = (np.stack([GUESSES, (GUESSES + 1) % 3], -1), LABELS)
    maps = [np.repeat(values[:, None], 9, 1) for values in given]
    (low, high), (below, above) = metric.between(*given), metric.between(*maps)
    assert above - below == pytest.approx(high - low, rel=0.25)  # two approximations of one width
    assert metric.score(*maps) == pytest.approx(metric.score(*given))
