"""Scores of answers in text: from the model's own probabilities, from sacrebleu and rouge-score."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from coremerge.errors import MissingExtraError
from coremerge.evaluation.likelihood import Likelihood
from coremerge.evaluation.metrics import RESAMPLES, Interval, resampled, share_interval
from coremerge.installing import install


class Answered(NamedTuple):
    """What a model made of some rows.

    Attributes:
        likelihood: of the right answers.
        right: those.
        said: its own; none where the metric needs none.
    """

    likelihood: Likelihood
    right: Sequence[str]
    said: Sequence[str] = ()


@dataclass(frozen=True)
class TextMetric:
    """A score of answers.

    Attributes:
        score: of what the model made of rows.
        interval: 95 % of the score.
        decodes: the model must answer by itself.
        check: refuse where what it is computed with is not installed.
        of_perplexity: shares of the own adapter's are those of perplexities, as the score can have either sign.
    """

    score: Callable[[Answered], float]
    interval: Callable[[Answered], Interval]
    decodes: bool = False
    check: Callable[[], object] = lambda: None
    of_perplexity: bool = False


def _sacrebleu() -> Any:
    try:
        from sacrebleu.metrics.chrf import CHRF
    except ImportError:
        raise MissingExtraError("chrF needs sacrebleu", remedy=install("evaluate")) from None
    return CHRF


def _rouge() -> Any:
    try:
        from rouge_score import rouge_scorer
    except ImportError:
        raise MissingExtraError("ROUGE needs rouge-score", remedy=install("evaluate")) from None
    return rouge_scorer


def chrf(found: Answered) -> float:
    """chrF2 of all rows together, 0 to 1: F-score of character n-grams up to 6, recall counting twice.

    Source: Popović (2017), "chrF++: words helping character n-grams", as sacrebleu computes it, which gives 100 times
    that.
    """
    return float(_sacrebleu()().corpus_score(list(found.said), [list(found.right)]).score) / 100


def chrf_interval(found: Answered) -> Interval:
    """Of :func:`chrf`: by sacrebleu's own bootstrap over rows."""
    if len(found.right) < 2:
        return (float("nan"), float("nan"))
    score = _of_floats(_sacrebleu())().corpus_score(list(found.said), [list(found.right)], n_bootstrap=RESAMPLES)
    middle, half = float(score._mean) / 100, float(score._ci) / 100
    return max(0.0, middle - half), min(1.0, middle + half)


def _of_floats(chrf_class: Any) -> Any:
    """With scores of one type: a resample without any match scores Python's 0.0 beside NumPy's, and has no mean."""

    class Floats(chrf_class):  # type: ignore[misc]
        def _compute_score_from_stats(self, stats: Any) -> Any:
            found = super()._compute_score_from_stats(stats)
            found.score = float(found.score)
            return found

    return Floats


def rouge_l(found: Answered) -> NDArray[np.float64]:
    """ROUGE-L's F1 of each row: of the longest common subsequence of words, without a stemmer.

    Source: Lin (2004), "ROUGE: A Package for Automatic Evaluation of Summaries".
    """
    scorer = _rouge().RougeScorer(["rougeL"])
    pairs = zip(found.right, found.said, strict=True)
    return np.array([scorer.score(right, said)["rougeL"].fmeasure for right, said in pairs])


def _of_rows(
    rows: Callable[[Answered], NDArray[Any]],
    interval: Callable[[NDArray[Any]], Interval] = resampled,
    **traits: Any,
) -> TextMetric:
    """The mean of a number for each row."""
    return TextMetric(lambda found: float(rows(found).mean()), lambda found: interval(rows(found)), **traits)


TEXT_METRICS: Mapping[str, TextMetric] = {
    "exact_match": _of_rows(lambda found: found.likelihood.right, share_interval),
    "chrf": TextMetric(chrf, chrf_interval, decodes=True, check=_sacrebleu),
    "rouge_l": _of_rows(rouge_l, decodes=True, check=_rouge),
    "log_likelihood": _of_rows(lambda found: found.likelihood.log, of_perplexity=True),
}
"""Name → metric of tasks of the kind ``generation``."""
