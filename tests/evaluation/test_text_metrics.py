"""Scores of answers in text."""

from __future__ import annotations

import math

import numpy as np
import pytest
from sacrebleu import corpus_chrf

from coremerge.evaluation.likelihood import Likelihood
from coremerge.evaluation.taskset import ANSWERED
from coremerge.evaluation.text_metrics import TEXT_METRICS, Answered

RIGHT = ["the cat sat on the mat", "a dog", "an old red house", "nothing at all", "trees"] * 4
SAID = ["the cat sat on a mat", "a dog", "the house was red", "", "tree"] * 4


def answered(right: list[str] = RIGHT, said: list[str] = SAID) -> Answered:
    count = len(right)
    hits = np.array([a == b for a, b in zip(right, said, strict=True)])
    return Answered(Likelihood(np.linspace(-5, -1, count), np.full(count, 3), hits), right, said)


def test_the_task_sets_know_them() -> None:
    assert tuple(TEXT_METRICS) == ANSWERED["generation"]


def test_their_values() -> None:
    found = answered()
    assert TEXT_METRICS["exact_match"].score(found) == pytest.approx(0.2)
    assert TEXT_METRICS["log_likelihood"].score(found) == pytest.approx(-3)
    assert TEXT_METRICS["chrf"].score(found) == pytest.approx(corpus_chrf(SAID, [RIGHT]).score / 100)
    # longest common subsequences of 5, 2, 1, 0 and 0 words
    rows = [2 * n / (a + b) for n, a, b in ((5, 6, 6), (2, 2, 2), (1, 4, 4), (0, 3, 1), (0, 1, 1))]
    assert TEXT_METRICS["rouge_l"].score(found) == pytest.approx(np.mean(rows))


@pytest.mark.parametrize("name", TEXT_METRICS)
def test_intervals_hold_the_score_and_come_out_the_same_twice(name: str) -> None:
    metric, found = TEXT_METRICS[name], answered()
    low, high = metric.interval(found)
    assert low < metric.score(found) < high
    assert (low, high) == metric.interval(found) and {type(low), type(high)} == {float}


@pytest.mark.parametrize("name", ["chrf", "rouge_l", "log_likelihood"])
def test_a_single_row_has_no_interval(name: str) -> None:
    assert all(map(math.isnan, TEXT_METRICS[name].interval(answered(RIGHT[:1], SAID[:1]))))


@pytest.mark.parametrize("name", ["chrf", "rouge_l"])
def test_the_right_answers_have_one(name: str) -> None:
    assert TEXT_METRICS[name].score(answered(RIGHT, RIGHT)) == pytest.approx(1)


def test_resamples_without_any_match_count() -> None:
    """sacrebleu scores them 0.0 of another type than the rest, and its own mean of both fails."""
    low, high = TEXT_METRICS["chrf"].interval(answered(["a b c", "xyz"], ["a b c", "qqq"]))
    assert 0 <= low < 0.1 and 0.5 < high <= 1
