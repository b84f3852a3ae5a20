"""Scores of predictions, from scikit-learn and SciPy, each with the direction that is better and its uncertainty."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from coremerge.errors import MissingExtraError
from coremerge.evaluation import resampling
from coremerge.evaluation.resampling import Resampled, Values, of_means, of_pairs
from coremerge.installing import install

Kind = Literal["classification", "regression"]
Interval = tuple[float, float]

CONFIDENCE = 0.95
RESAMPLES = 400
"""Of the bootstrap, for scores without an interval of their own."""
SHORTEST = 0.5
"""Labels shorter than that are no directions: middle grey in a map of normals."""


@dataclass(frozen=True)
class Metric:
    """A score of predictions and labels, arrays of one shape.

    (rows,) are classes' indices, or numbers; (rows, places) likewise, one for each patch or pixel of a row; (rows,
    places, outputs) several numbers for each place, of which a row without patches or pixels has one.

    Attributes:
        kind: of the tasks it is for.
        score: of predictions and labels.
        higher_is_better: else it is an error.
        interval: of predictions and labels, :data:`CONFIDENCE` wide, where rows have one label each or count as a
            whole; None: by bootstrap.
        resampled: scores of many resamples at once: see :mod:`~coremerge.evaluation.resampling`; None: one by one.
        whole: a row counts as one, however many labels it has.
        top: so many classes are predicted for each label, along a last dimension, the likeliest first; None: one,
            without that dimension.
        classes: the number of classes it is for; None: any.
        directions: several outputs are the coordinates of a direction; in maps as (n + 1) / 2.
    """

    kind: Kind
    score: Callable[[Values, Values], float]
    higher_is_better: bool = True
    interval: Callable[[Values, Values], Interval] | None = None
    resampled: Resampled | None = None
    whole: bool = False
    top: int | None = None
    classes: int | None = None
    directions: bool = False

    def between(self, predictions: Values, labels: Values) -> Interval:
        """The interval that holds the score on all such rows with :data:`CONFIDENCE`.

        Rows are drawn independently; patches and pixels of one image are not, so that they are resampled with it.
        """
        if len(labels) < 2:
            return (float("nan"), float("nan"))
        if self.interval and (self.whole or labels.size == len(labels)):
            return self.interval(predictions, labels)
        return self._bootstrap(predictions, labels)

    def _bootstrap(self, predictions: Values, labels: Values) -> Interval:
        draw = np.random.default_rng(0)
        rows = draw.integers(0, len(labels), (RESAMPLES, len(labels)))
        if self.resampled:
            counts = np.stack([np.bincount(chosen, minlength=len(labels)) for chosen in rows]).astype(float)
            scores = self.resampled(predictions, labels, counts)
        else:
            scores = np.array([self.score(predictions[chosen], labels[chosen]) for chosen in rows])
        low, high = np.quantile(scores, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
        return float(low), float(high)


def _sklearn() -> Any:
    try:
        from sklearn import metrics
    except ImportError:
        raise MissingExtraError("scores need scikit-learn", remedy=install("evaluate")) from None
    return metrics


def accuracy(predictions: Values, labels: Values, weights: Values | None = None) -> float:
    """Share of labels whose class is predicted."""
    return float(_sklearn().accuracy_score(labels.ravel(), predictions.ravel(), sample_weight=weights))


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


def f1(predictions: Values, labels: Values, weights: Values | None = None) -> float:
    """F1, averaged over the classes that occur."""
    settings = {"average": "macro", "zero_division": 0.0, "sample_weight": weights}
    return float(_sklearn().f1_score(labels.ravel(), predictions.ravel(), **settings))


def miou(predictions: Values, labels: Values, weights: Values | None = None) -> float:
    """Intersection over union of all rows' labels, averaged over the classes that occur."""
    settings = {"average": "macro", "zero_division": 0.0, "sample_weight": weights}
    return float(_sklearn().jaccard_score(labels.ravel(), predictions.ravel(), **settings))


def iou(predictions: Values, labels: Values, weights: Values | None = None) -> float:
    """Intersection over union of the second of two classes, over all rows' labels; 0 where it never occurs."""
    settings = {"pos_label": 1, "zero_division": 0.0, "sample_weight": weights}
    return float(_sklearn().jaccard_score(labels.ravel().astype(int), predictions.ravel().astype(int), **settings))


def pearson(predictions: Values, labels: Values) -> float:
    """Pearson's correlation, averaged over outputs; 0 where either is constant."""
    return _correlation("pearsonr", predictions, labels)


def spearman(predictions: Values, labels: Values) -> float:
    """Spearman's rank correlation, averaged over outputs; 0 where either is constant."""
    return _correlation("spearmanr", predictions, labels)


def _correlation(name: str, predictions: Values, labels: Values) -> float:
    _sklearn()
    from scipy import stats

    outputs = labels.shape[2] if labels.ndim == 3 else 1
    pairs = zip(*(values.reshape(-1, outputs).T.astype(float) for values in (predictions, labels)), strict=True)
    found = [getattr(stats, name)(x, y).statistic if np.ptp(x) and np.ptp(y) else 0.0 for x, y in pairs]
    return float(np.mean(found))


def rmse(predictions: Values, labels: Values) -> float:
    """Root of the mean squared error, over all places and outputs."""
    return math.sqrt(_sklearn().mean_squared_error(labels.ravel(), predictions.ravel()))


def mae(predictions: Values, labels: Values) -> float:
    """Mean absolute error, over all places and outputs."""
    return float(_sklearn().mean_absolute_error(labels.ravel(), predictions.ravel()))


def r2(predictions: Values, labels: Values) -> float:
    """Coefficient of determination: the share that is explained of the variance about each place's and output's mean.

    Places and outputs weigh by their variance; what a map looks like on average is no merit.
    """
    flat = (values.reshape(len(labels), -1) for values in (labels, predictions))
    return float(_sklearn().r2_score(*flat, multioutput="variance_weighted"))


def angular_error(predictions: Values, labels: Values) -> float:
    """Mean angle between predicted and right directions (rows, places, coordinates), in degrees.

    Directions need not be of length 1; labels shorter than a half are none and are left out.
    """
    angles = _angles(predictions, labels)
    return float(np.nanmean(angles)) if np.isfinite(angles).any() else math.nan


def _angles(predictions: Values, labels: Values) -> Values:
    """Degrees, (rows, places), NaN where there is no direction."""
    _sklearn()
    from sklearn.metrics.pairwise import paired_cosine_distances

    x, y = (values.reshape(-1, values.shape[-1]).astype(float) for values in (predictions, labels))
    angles = np.degrees(np.arccos(np.clip(1 - paired_cosine_distances(x, y), -1, 1)))
    angles[np.linalg.norm(y, axis=1) < SHORTEST] = np.nan
    found: Values = angles.reshape(labels.shape[:-1])
    return found


def wilson(predictions: Values, labels: Values) -> Interval:
    """Wilson's interval of a share, from the counts."""
    return share_interval(predictions == labels)


def resampled(values: Values) -> Interval:
    """Of the mean of ``values`` (rows,), by bootstrap over them."""
    if len(values) < 2:
        return (float("nan"), float("nan"))
    rows = np.random.default_rng(0).integers(0, len(values), (RESAMPLES, len(values)))
    low, high = np.quantile(values[rows].mean(1), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def share_interval(right: Values) -> Interval:
    """Wilson's interval of the share of ``right`` that is True."""
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
    "accuracy": Metric("classification", accuracy, interval=wilson, resampled=of_pairs(accuracy)),
    "exact_match": Metric(
        "classification", exact_match, interval=lambda *found: share_interval(_whole(*found)), whole=True
    ),
    "f1": Metric("classification", f1, resampled=of_pairs(f1)),
    "miou": Metric("classification", miou, resampled=of_pairs(miou)),
    "iou": Metric("classification", iou, resampled=of_pairs(iou), classes=2),
    "pearson": Metric("regression", pearson, interval=fisher, resampled=resampling.pearson),
    "spearman": Metric("regression", spearman),
    "r2": Metric("regression", r2, resampled=resampling.r2),
    "rmse": Metric(
        "regression", rmse, higher_is_better=False, resampled=of_means(lambda p, y: (p - y) ** 2, root=True)
    ),
    "mae": Metric("regression", mae, higher_is_better=False, resampled=of_means(lambda p, y: np.abs(p - y))),
    "angular_error": Metric(
        "regression", angular_error, higher_is_better=False, resampled=of_means(_angles), directions=True
    ),
}
"""Name → metric; :func:`find_metric` knows ``top_K``, too."""

_TOP = re.compile(r"top_([1-9]\d{0,5})")


def find_metric(name: str) -> Metric | None:
    """The metric of that name: one of :data:`METRICS`, or ``top_5`` for any number; None if there is none."""
    found = _TOP.fullmatch(name)
    if found is None:
        return METRICS.get(name)
    return Metric(
        "classification", top, top=int(found[1]), resampled=of_means(_among),
        interval=lambda *given: share_interval(_among(*given)),
    )  # fmt: skip


def names_of(kind: str) -> list[str]:
    """What metrics of a kind of task are called, for messages."""
    names = [name for name, metric in METRICS.items() if metric.kind == kind]
    return [*names, "top_K (such as top_5)"] if kind == "classification" else names
