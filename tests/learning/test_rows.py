"""One kind of inputs in all; what a row can hold is tested where rows are read: test_examples.py."""

from __future__ import annotations

import pytest

from coremerge.errors import InputError
from coremerge.learning.rows import Example, one_kind


def test_one_kind():
    assert one_kind([Example("a"), Example("b")]) == "text"
    with pytest.raises(InputError, match="no inputs"):
        one_kind([])
