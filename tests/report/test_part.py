"""Blocks of a model as columns."""

from __future__ import annotations

from coremerge.report.gather import places_of
from coremerge.report.part import Blocks, means
from coremerge.report.svg import CELL, Column

NAMES = ["lm_head", "encoder.block.1.q", "encoder.block.0.q", "decoder.block.0.q", "decoder.block.0.v"]


def test_stacks_stay_apart_and_blocks_are_in_order() -> None:
    blocks = Blocks(places_of(NAMES))
    assert blocks.columns == [
        Column("encoder 0", "0", "encoder"), Column("encoder 1", "1", "encoder"), Column("decoder 0", "0", "decoder"),
        Column("lm_head", "lm_head"),
    ]  # fmt: skip
    assert blocks.kinds == ["lm_head", "q", "v"]


def test_each_value_is_in_the_cell_of_its_module() -> None:
    values = dict(zip(NAMES, [1.0, 2.0, 3.0, 4.0, 5.0], strict=True)) | {"elsewhere": 9.0}
    blocks = Blocks(places_of(NAMES))
    assert means(blocks.by_kind(values)) == [[None, None, None, 1.0], [3.0, 2.0, 4.0, None], [None, None, 5.0, None]]
    assert means(blocks.by_row([values])) == [[3.0, 2.0, 4.5, 1.0]]


def test_many_columns_have_small_cells() -> None:
    assert Blocks(places_of(["x.0.q"])).cell == CELL
    assert Blocks(places_of([f"x.{i}.q" for i in range(80)])).cell < CELL / 2
    assert Blocks({}).cell == CELL
