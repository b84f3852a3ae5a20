"""Libraries that are asked for when an input needs them."""

from __future__ import annotations

import sys

import pytest

from coremerge.errors import MissingExtraError
from coremerge.learning.optional import first_line, optional


@pytest.mark.parametrize(("module", "name"), [("datasets", "datasets"), ("PIL.Image", "pillow")])
def test_a_missing_extra_is_named(monkeypatch, module, name):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=rf"need {name}\. pip install .*\[learn\]"):
        optional(module)


def test_the_first_line_that_says_something():
    assert first_line(OSError("\n \nno such file. \nin all the world")) == "no such file"
    assert first_line(ValueError()) == "ValueError"
