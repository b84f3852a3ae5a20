"""The heat map of a fit."""

from __future__ import annotations

from typing import Any

from coremerge.report.fitted import NAMED, fitted
from coremerge.report.gather import places_of
from coremerge.report.part import Blocks

NAMES = [f"layers.{i}.q" for i in range(NAMED + 3)]


def draw(modules: dict[str, Any]) -> Any:
    return list(fitted({"fit": {"prior": "iso", "modules": modules}}, Blocks(places_of(NAMES))))


def one(**changes: Any) -> dict[str, Any]:
    return {"prior": 0.5, "fitted": 0.25, "kept": False, "checked": True, "lost": 0.0} | changes


def test_a_merge_without_a_fit_has_no_such_section() -> None:
    assert list(fitted({}, Blocks(places_of(NAMES)))) == []
    assert draw({}) == draw({"elsewhere": one()}) == []


def test_a_kept_prior_shows_its_own_error_and_a_ring() -> None:
    (part,) = draw({NAMES[0]: one(), NAMES[1]: one(kept=True, fitted=0.6)})
    ((_, picture),) = part.figures
    assert "q, 0: 0.25 (the prior&#39;s: 0.50)" in picture and "q, 1: 0.50 (the prior&#39;s: 0.50, kept)" in picture
    assert picture.count('class="ring"') == 1
    assert "On average 0.375; the prior's (iso) 0.5," in part.text


def test_many_names_are_counted() -> None:
    (part,) = draw({name: one(kept=True) for name in NAMES})
    assert part.items[0].startswith(f"{len(NAMES)} of {len(NAMES)} modules keep the prior: layers.0.q, ")
    assert part.items[0].endswith(" and 3 more")


def test_what_the_cut_lost_is_drawn_where_it_lost_anything() -> None:
    (part,) = draw({name: one(lost=0.25 if name == NAMES[2] else 0.0) for name in NAMES})
    assert [caption for caption, _ in part.figures][1:] == ["lost by the cut to its rank, of the merged outputs"]
    assert "q, 2: 0.250" in part.figures[1][1] and part.items == []
