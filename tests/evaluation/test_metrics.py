from __future__ import annotations

import numpy as np
import pytest
import torch

from coremerge.evaluation.metrics import accuracy, pearson


def test_accuracy_counts_rows() -> None:
    outputs = torch.tensor([[1.0, 2.0], [3.0, 0.0], [0.0, 1.0], [5.0, 4.0]])
    assert accuracy(outputs, torch.tensor([1.0, 0.0, 0.0, 1.0])) == 0.5


def test_pearson_is_numpys() -> None:
    x, y = np.random.default_rng(0).normal(size=(2, 50))
    expected = np.corrcoef(x, y)[0, 1]
    assert pearson(torch.tensor(x)[:, None], torch.tensor(y)) == pytest.approx(expected, abs=1e-12)


def test_pearson_of_a_constant_is_zero() -> None:
    assert pearson(torch.ones(4, 1), torch.arange(4.0)) == 0.0
