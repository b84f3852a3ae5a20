"""Scores of rows drawn again and again, from what each row adds to a score: a thousand maps need no thousand passes.

Each function takes predictions, labels and counts (resamples, rows), how often a row was drawn, and returns a score for
each resample, (resamples,). With every count 1 that is the score itself; :mod:`~coremerge.evaluation.metrics` says of
which arrays and what it means.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Values = NDArray[Any]
Resampled = Callable[[Values, Values, Values], Values]


def of_pairs(score: Callable[..., float]) -> Resampled:
    """Of a score of classes, which depends only on how often each pair of label and prediction occurs.

    Args:
        score: of predictions, labels and weights.
    """

    def resampled(predictions: Values, labels: Values, counts: Values) -> Values:
        right, guessed, occurs = _pairs(predictions, labels)
        weights = counts @ occurs
        return np.array([score(guessed[some > 0], right[some > 0], some[some > 0]) for some in weights])

    return resampled


def _pairs(predictions: Values, labels: Values) -> tuple[Values, Values, Values]:
    """The labels and predictions of each pair that occurs, (pairs,), and how often in each row, (rows, pairs)."""
    flat = [values.reshape(len(labels), -1).astype(np.int64) for values in (labels, predictions)]
    classes = int(max(values.max() for values in flat)) + 1
    code, rows = flat[0] * classes + flat[1], np.arange(len(labels))[:, None]
    known, at = np.unique(code, return_inverse=True)
    places = at.reshape(code.shape) + rows * len(known)
    occurs = np.bincount(places.ravel(), minlength=len(labels) * len(known)).reshape(len(labels), -1)
    return known // classes, known % classes, occurs.astype(float)


def of_means(parts: Callable[[Values, Values], Values], root: bool = False) -> Resampled:
    """Of a mean over places.

    Args:
        parts: of predictions and labels: what each place adds to the mean, NaN where it is left out; any shape that
            begins with the rows.
        root: the score is the mean's square root.
    """

    def resampled(predictions: Values, labels: Values, counts: Values) -> Values:
        found = parts(predictions, labels).reshape(len(labels), -1)
        means: Values = (counts @ np.nansum(found, 1)) / (counts @ np.isfinite(found).sum(1))
        return np.sqrt(means) if root else means

    return resampled


def r2(predictions: Values, labels: Values, counts: Values) -> Values:
    """1 − Σ (y − p)² / Σ (y − ȳ)², the means ȳ those of each place and output over the resample's rows."""
    y, p = (values.reshape(len(labels), -1).astype(float) for values in (labels, predictions))
    y, p = y - y.mean(0), p - y.mean(0)  # squares of small numbers lose no digits
    residual = counts @ ((y - p) ** 2).sum(1)
    total = counts @ (y**2).sum(1) - ((counts @ y) ** 2).sum(1) / counts.sum(1)
    found: Values = 1 - residual / total
    return found


def pearson(predictions: Values, labels: Values, counts: Values) -> Values:
    """Correlations over rows and places, averaged over outputs; 0 where either is constant."""
    x, y = (_by_output(values) for values in (predictions, labels))
    x, y = x - x.mean((0, 1)), y - y.mean((0, 1))
    moments = [np.einsum("br,ro->bo", counts, part.sum(1)) for part in (x, y, x * x, y * y, x * y)]
    sx, sy, sxx, syy, sxy = (moment / (counts.sum(1, keepdims=True) * x.shape[1]) for moment in moments)
    spread = np.sqrt(np.maximum(sxx - sx**2, 0) * np.maximum(syy - sy**2, 0))
    with np.errstate(invalid="ignore", divide="ignore"):
        each = np.where(spread > 0, (sxy - sx * sy) / spread, 0.0)
    found: Values = each.mean(1)
    return found


def _by_output(values: Values) -> Values:
    """(rows, places, outputs), in float64."""
    return values.reshape(len(values), -1, values.shape[2] if values.ndim == 3 else 1).astype(float)
