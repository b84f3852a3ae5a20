"""Which settings weights are learned with."""

from __future__ import annotations

import pytest

from coremerge.errors import ConfigError
from coremerge.learning.settings import PRESETS, settle


@pytest.mark.parametrize("language", [False, True])
@pytest.mark.parametrize("objective", ["nsc", "entropy"])
def test_nsc_is_learned_as_its_paper_does_for_such_a_model(objective: str, language: bool) -> None:
    found, paper = settle(objective, None, {}, 6, language=language), PRESETS["language" if language else "vision"]
    assert (found.steps, found.rate) == (paper.steps, paper.rate) == ((500, 3e-4) if language else (100, 1e-3))
    assert found.objective == objective and found.start == pytest.approx(0.4)
    assert settle(objective, "vision", {}, 6, language=language).steps == 100


def test_other_objectives_have_their_own() -> None:
    for objective in ("nsc-own", "match"):
        assert settle(objective, None, {"start": 0.5}, 2, language=True).rate == PRESETS[objective].rate
    assert settle(None, None, {}, 2).objective == "match"


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (("guess", None, {}), "objective = .*no such objective. Known: nsc-own, match, nsc, entropy"),
        ((None, "guess", {}), "preset = .*no such preset"),
        ((None, None, {"speed": 1}), "speed: no such setting"),
    ],
)
def test_what_is_unknown_is_refused(asked: tuple, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settle(*asked, 2)
