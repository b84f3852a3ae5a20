"""Scores of predictions, from scikit-learn and SciPy, each with the direction that is better and its uncertainty."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from coremerge.errors import MissingExtraError

Values = NDArray[Any]
"""Predictions or labels, one a row: classes' indices, or numbers."""

Kind = Literal["classification", "regression"]
Interval = tuple[float, float]

CONFIDENCE = 0.95
RESAMPLES = 400
"""Of the bootstrap, for scores without an interval of their own."""


@dataclass(frozen=True)
class Metric:
    """A score.

    Attributes:
        kind: of the tasks it is for.
        score: of predictions and labels.
        higher_is_better: else it is an error.
        interval: of predictions and labels, :data:`CONFIDENCE` wide; None: by bootstrap over rows.
    """

    kind: Kind
    score: Callable[[Values, Values], float]
    higher_is_better: bool = True
    interval: Callable[[Values, Values], Interval] | None = None

    def between(self, predictions: Values, labels: Values) -> Interval:
        """The interval that holds the score on all such rows with :data:`CONFIDENCE`."""
        if len(labels) < 2:
            return (float("nan"), float("nan"))
        return (self.interval or self._bootstrap)(predictions, labels)

    def _bootstrap(self, predictions: Values, labels: Values) -> Interval:
        draw = np.random.default_rng(0)
        rows = draw.integers(0, len(labels), (RESAMPLES, len(labels)))
        scores = [self.score(predictions[chosen], labels[chosen]) for chosen in rows]
        low, high = np.quantile(scores, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
        return float(low), float(high)


def _sklearn() -> Any:
    try:
        from sklearn import metrics
    except ImportError:
        raise MissingExtraError("scores need scikit-learn", remedy="pip install 'coremerge[evaluate]'") from None
    return metrics


def accuracy(predictions: Values, labels: Values) -> float:
    """Share of rows whose class is predicted."""
    return float(_sklearn().accuracy_score(labels.ravel(), predictions.ravel()))


def f1(predictions: Values, labels: Values) -> float:
    """F1, averaged over the classes that occur."""
    return float(_sklearn().f1_score(labels.ravel(), predictions.ravel(), average="macro", zero_division=0.0))


def miou(predictions: Values, labels: Values) -> float:
    """Intersection over union, averaged over the classes that occur."""
    return float(_sklearn().jaccard_score(labels.ravel(), predictions.ravel(), average="macro", zero_division=0.0))


def pearson(predictions: Values, labels: Values) -> float:
    """Pearson's correlation; 0 where either is constant."""
    return _correlation("pearsonr", predictions, labels)


def spearman(predictions: Values, labels: Values) -> float:
    """Spearman's rank correlation; 0 where either is constant."""
    return _correlation("spearmanr", predictions, labels)


def _correlation(name: str, predictions: Values, labels: Values) -> float:
    _sklearn()
    from scipy import stats

    x, y = predictions.ravel().astype(float), labels.ravel().astype(float)
    return float(getattr(stats, name)(x, y).statistic) if np.ptp(x) and np.ptp(y) else 0.0


def rmse(predictions: Values, labels: Values) -> float:
    """Root of the mean squared error."""
    return math.sqrt(_sklearn().mean_squared_error(labels.ravel(), predictions.ravel()))


def mae(predictions: Values, labels: Values) -> float:
    """Mean absolute error."""
    return float(_sklearn().mean_absolute_error(labels.ravel(), predictions.ravel()))


def r2(predictions: Values, labels: Values) -> float:
    """Coefficient of determination."""
    return float(_sklearn().r2_score(labels.ravel(), predictions.ravel()))


def wilson(predictions: Values, labels: Values) -> Interval:
    """Wilson's interval of a share, from the counts."""
    from scipy import stats

    right = int((predictions == labels).sum())
    found = stats.binomtest(right, labels.size).proportion_ci(CONFIDENCE, method="wilson")
    return float(found.low), float(found.high)


def fisher(predictions: Values, labels: Values) -> Interval:
    """Fisher's interval of Pearson's correlation, from the score and the count."""
    score, count = pearson(predictions, labels), labels.size
    if count <= 3 or abs(score) >= 1:
        return (-1.0, 1.0) if count <= 3 else (score, score)
    half = 1.959964 / (count - 3) ** 0.5
    return float(np.tanh(np.arctanh(score) - half)), float(np.tanh(np.arctanh(score) + half))


METRICS: Mapping[str, Metric] = {
    "accuracy": Metric("classification", accuracy, interval=wilson),
    "f1": Metric("classification", f1),
    "miou": Metric("classification", miou),
    "pearson": Metric("regression", pearson, interval=fisher),
    "spearman": Metric("regression", spearman),
    "r2": Metric("regression", r2),
    "rmse": Metric("regression", rmse, higher_is_better=False),
    "mae": Metric("regression", mae, higher_is_better=False),
}
"""Name → metric."""
