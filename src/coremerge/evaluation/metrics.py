"""Scores of predictions, from scikit-learn and SciPy, each with the direction that is better and its uncertainty."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from coremerge.errors import MissingExtraError
from coremerge.installing import install

Values = NDArray[Any]
"""Predictions or labels, one a row or, per patch, a row of them: classes' indices, or numbers."""

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
        top: so many classes are predicted for each label, along a last dimension, the likeliest first; None: one,
            without that dimension.
    """

    kind: Kind
    score: Callable[[Values, Values], float]
    higher_is_better: bool = True
    interval: Callable[[Values, Values], Interval] | None = None
    top: int | None = None

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
        raise MissingExtraError("scores need scikit-learn", remedy=install("evaluate")) from None
    return metrics


def accuracy(predictions: Values, labels: Values) -> float:
    """Share of rows whose class is predicted."""
    return float(_sklearn().accuracy_score(labels.ravel(), predictions.ravel()))


def exact_match(predictions: Values, labels: Values) -> float:
    """Share of rows all of whose labels are predicted: of patches every one. With one label a row it is accuracy."""
    return float(_whole(predictions, labels).mean())


def top(predictions: Values, labels: Values) -> float:
    """Share of labels that are among the classes predicted for them."""
    return float(_among(predictions, labels).mean())


def _whole(predictions: Values, labels: Values) -> Values:
    right: Values = (predictions == labels).reshape(len(labels), -1).all(1)
    return right


def _among(predictions: Values, labels: Values) -> Values:
    right: Values = (predictions == labels[..., None]).any(-1)
    return right


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
    return _from_counts(predictions == labels)


def _from_counts(right: Values) -> Interval:
    from scipy import stats

    found = stats.binomtest(int(right.sum()), right.size).proportion_ci(CONFIDENCE, method="wilson")
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
    "exact_match": Metric("classification", exact_match, interval=lambda *found: _from_counts(_whole(*found))),
    "f1": Metric("classification", f1),
    "miou": Metric("classification", miou),
    "pearson": Metric("regression", pearson, interval=fisher),
    "spearman": Metric("regression", spearman),
    "r2": Metric("regression", r2),
    "rmse": Metric("regression", rmse, higher_is_better=False),
    "mae": Metric("regression", mae, higher_is_better=False),
}
"""Name → metric; :func:`find_metric` knows ``top_K``, too."""

_TOP = re.compile(r"top_([1-9]\d{0,5})")


def find_metric(name: str) -> Metric | None:
    """The metric of that name: one of :data:`METRICS`, or ``top_5`` for any number; None if there is none."""
    found = _TOP.fullmatch(name)
    if found is None:
        return METRICS.get(name)
    return Metric("classification", top, interval=lambda *given: _from_counts(_among(*given)), top=int(found[1]))


def names_of(kind: str) -> list[str]:
    """What metrics of a kind of task are called, for messages."""
    names = [name for name, metric in METRICS.items() if metric.kind == kind]
    return [*names, "top_K (such as top_5)"] if kind == "classification" else names
