from __future__ import annotations

import time

import numpy as np
import pytest

from coremerge.evaluation.metrics import METRICS, Metric, find_metric
from coremerge.evaluation.resampling import Values
from tolerances import DIGITS

DRAW = np.random.default_rng(0)
ROWS, PLACES = 30, 8
CLASSES = DRAW.integers(0, 3, (2, ROWS, PLACES))
NUMBERS = DRAW.normal(size=(2, ROWS, PLACES, 3))
NUMBERS[0] += NUMBERS[1]
RESAMPLED = [*(name for name, metric in METRICS.items() if metric.resampled), "top_2"]


def given(metric: Metric, shape: str) -> tuple[Values, Values]:
    """Predictions and labels: a row has one label, many, or many of several numbers."""
    if metric.kind == "classification":
        guesses, labels = (CLASSES[:, :, 0] if shape == "one" else CLASSES) % (metric.classes or 3)
        return (np.stack([guesses, (guesses + 1) % 3], -1) if metric.top else guesses), labels
    if shape == "several" or metric.directions:
        return NUMBERS[0], NUMBERS[1]
    guesses, labels = NUMBERS[:, :, 0, 0] if shape == "one" else NUMBERS[..., 0]
    return guesses, labels


@pytest.mark.parametrize("shape", ["one", "many", "several"])
@pytest.mark.parametrize("name", RESAMPLED)
def test_each_resample_has_the_score_of_its_rows(name: str, shape: str) -> None:
    metric = find_metric(name)
    assert metric is not None and metric.resampled is not None
    guesses, labels = given(metric, shape)
    drawn = np.stack([np.arange(ROWS), *DRAW.integers(0, ROWS, (9, ROWS))])
    counts = np.stack([np.bincount(rows, minlength=ROWS) for rows in drawn]).astype(float)
    expected = [metric.score(guesses[rows], labels[rows]) for rows in drawn]
    np.testing.assert_allclose(metric.resampled(guesses, labels, counts), expected, rtol=DIGITS)


def test_a_class_that_no_row_of_a_resample_has_does_not_count() -> None:
    labels, guesses = np.array([[0, 0], [1, 2]]), np.array([[0, 0], [1, 1]])
    for name in ("f1", "miou"):
        resampled = METRICS[name].resampled
        assert resampled is not None
        found = resampled(guesses, labels, np.array([[2.0, 0.0]]))
        assert found == [METRICS[name].score(guesses[[0, 0]], labels[[0, 0]])] == [1.0]


def test_a_constant_correlates_with_nothing() -> None:
    resampled = METRICS["pearson"].resampled
    assert resampled is not None
    assert resampled(np.ones(4), np.arange(4.0), np.ones((1, 4))) == [0.0]


@pytest.mark.parametrize("name", ["miou", "r2"])
def test_maps_of_a_thousand_pixels_take_seconds_at_most(name: str) -> None:
    values = DRAW.integers(0, 5, (2, 100, 1024)).astype(float)
    start = time.process_time()
    METRICS[name].between(*values)
    assert time.process_time() - start < 10  # 400 passes of scikit-learn's own take longer
