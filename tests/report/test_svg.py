from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest

from coremerge.report.svg import HUES, Column, Range, bars, heatmap, legend, lines, ticks

EVIL = '<script>"&'


def parsed(markup: str) -> ElementTree.Element:
    return ElementTree.fromstring(f"<all>{markup}</all>")


def titles(markup: str) -> list[str]:
    return [element.text or "" for element in parsed(markup).iter("title")]


def test_a_heat_map_has_a_cell_for_each_value_and_says_it_on_hovering() -> None:
    picture = heatmap(["a", "b"], ["x", "y"], [[0.5, -0.25], [None, 1.0]], Range(-1, 1))
    assert titles(picture) == ["a, x: 0.50", "a, y: -0.25", "b, x: none", "b, y: 1.00"]
    opacities = re.findall(r'class="(positive|negative)"[^>]*fill-opacity="([\d.]+)"', picture)
    assert opacities == [("positive", "0.500"), ("negative", "0.250"), ("positive", "1.000")]
    assert ">.50<" in picture and ">-.25<" in picture


def test_heads_that_fit_stand_upright_and_words_that_do_not_lean() -> None:
    layers = [str(i) for i in range(12)]
    assert "rotate" not in heatmap(["a"], layers, [[0.5] * 12], Range(0, 1))
    assert heatmap(["a"], [*layers, "lm_head"], [[0.5] * 13], Range(0, 1)).count("rotate") == 1
    assert heatmap(["a"], ["a", "a longer name"], [[0.5] * 2], Range(0, 1)).count("rotate") == 2


def test_numbers_over_small_cells_are_thinned_out() -> None:
    picture = heatmap(["a"], [str(i) for i in range(80)], [[0.5] * 80], Range(0, 1), cell=9)
    assert "rotate" not in picture
    assert ">78<" in picture and ">79<" not in picture and ">1<" not in picture


def test_stacks_stand_over_their_columns() -> None:
    columns = [Column("encoder 0", "0", "encoder"), Column("decoder 0", "0", "decoder"), Column("head", "head")]
    picture = heatmap(["a"], columns, [[0.5, 0.6, 0.7]], Range(0, 1))
    assert titles(picture) == ["a, encoder 0: 0.50", "a, decoder 0: 0.60", "a, head: 0.70"]
    assert picture.count(">encoder<") == picture.count(">decoder<") == 1


def test_more_can_be_said_of_a_cell_and_a_ring_drawn_around_it() -> None:
    picture = heatmap(["a"], ["x", "y"], [[0.5, None]], Range(0, 1), said={(0, 0): "<b>"}, ringed=[(0, 1)])
    assert titles(picture) == ["a, x: 0.50 (<b>)", "a, y: none"]
    assert picture.count('class="ring"') == 1 and "<b>" not in picture


def test_small_cells_have_no_numbers_and_zero_has_no_sign() -> None:
    assert 'class="value' not in heatmap(["a"], ["x"], [[0.5]], Range(0, 1), cell=12)
    assert titles(heatmap(["a"], ["x"], [[-0.001]], Range(-1, 1))) == ["a, x: 0.00"]
    assert ">32<" in heatmap(["a"], ["x"], [[32.0]], Range(0, 64, "{:.0f}".format))


@pytest.mark.parametrize(("value", "share"), [(0.0, 0.0), (0.5, 0.5), (2.0, 1.0), (-0.5, 0.25), (-9.0, 1.0)])
def test_colours_fill_between_zero_and_the_ends(value: float, share: float) -> None:
    assert Range(-2, 1).share(value) == pytest.approx(share)


def test_colours_begin_at_a_low_end_above_zero() -> None:
    assert Range(1, 3).share(2.0) == 0.5
    assert Range(1, 1).share(1.0) == 0.0
    assert Range(0, 1).share(-1.0) == 0.0


def test_a_line_goes_through_its_values() -> None:
    picture = lines({"a": [1.0, 0.5], "b": [0.0, 1.0]}, x_label="step", y_label="loss", main="b")
    a, b = (
        [tuple(map(float, point.split(","))) for point in line.attrib["points"].split()]
        for line in parsed(picture).iter("polyline")
    )
    assert a[0][1] == b[1][1] and a[0][1] < a[1][1] < b[0][1]
    assert "b, step 2: 1" in titles(picture)
    assert 'class="series main"' in picture and 'class="series s0"' in picture


def test_many_points_are_thinned_and_none_gives_nothing() -> None:
    assert len(titles(lines({"a": [float(i) for i in range(1000)]}, x_label="x", y_label="y"))) < 60
    assert lines({"a": []}, x_label="x", y_label="y") == ""
    assert lines({"a": [0.0]}, x_label="x", y_label="y") != ""


def test_bars_have_their_intervals() -> None:
    picture = bars([("a", 0.5, (0.4, 0.7)), ("b", 1.0, None)])
    assert titles(picture) == ["a: 0.500 (0.400 to 0.700)", "b: 1.000"]
    assert picture.count("whisker") == 1


def test_names_are_escaped() -> None:
    for picture in (
        heatmap([EVIL], [EVIL], [[1.0]], Range(0, 1)),
        lines({EVIL: [1.0, 2.0]}, x_label=EVIL, y_label=EVIL),
        bars([(EVIL, 1.0, None)]),
        legend([EVIL]),
    ):
        assert "<script>" not in picture
        parsed(picture)


def test_more_lines_than_hues_begin_again() -> None:
    assert f'class="s{HUES - 1}"' in legend([str(i) for i in range(HUES + 1)])
    assert legend([str(i) for i in range(HUES + 1)]).count('class="s0"') == 2


def test_ticks_are_round() -> None:
    assert ticks(0, 0) == [0]
    assert ticks(-1, 1) == [-1.0, -0.5, 0.0, 0.5, 1.0]
    assert ticks(0, 0.0033)[1] == 0.001
