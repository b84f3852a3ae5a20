"""Makes ``import zoo`` work from any test here."""

import sys
from pathlib import Path

import pytest

from coremerge.formats import skeleton

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def _no_skeleton_is_kept():
    """What one test found out about a model's class, with or without transformers, is nothing to the next."""
    skeleton._built.cache_clear()
    yield
    skeleton._built.cache_clear()
