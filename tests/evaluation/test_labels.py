from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from coremerge.errors import ConfigError
from coremerge.evaluation.labels import labels_of
from coremerge.evaluation.taskset import Row, Task
from coremerge.learning.rows import Example


def task(kind: str = "regression", per: str = "input", **settings: Any) -> Task:
    given = {"metric": "rmse" if kind == "regression" else "accuracy", "head": "head", "test": "rows", **settings}
    return Task(kind=kind, per=per, **given)


def rows(*labels: Any) -> list[Row]:
    return [Row(Example("a", place=f"rows, line {i}"), label) for i, label in enumerate(labels, 1)]


def test_labels_are_one_array() -> None:
    assert labels_of(rows(1.0, 2.0), task(), "t").tolist() == [1, 2]
    assert labels_of(rows((1.0, 2.0), (3.0, 4.0)), task(per="patch"), "t").shape == (2, 2)
    assert labels_of(rows((1.0, 2.0, 3.0), (3.0, 4.0, 5.0)), task(outputs=3), "t").shape == (2, 3)
    nested = rows(((1.0, 2.0),) * 4, ((3.0, 4.0),) * 4)
    assert labels_of(nested, task(per="patch", outputs=2), "t").shape == (2, 4, 2)


def test_maps_are_read_as_their_task_says(tmp_path: Path) -> None:
    Image.new("L", (6, 4), 51).save(tmp_path / "grey.png")
    Image.new("RGB", (6, 4), (0, 51, 255)).save(tmp_path / "colours.png")
    Image.new("L", (6, 4), 1).save(tmp_path / "mask.png")
    grey = labels_of(rows(tmp_path / "grey.png"), task(per="pixel"), "t")
    assert grey.shape == (1, 4, 6) and np.allclose(grey, 0.2)
    colours = labels_of(rows(tmp_path / "colours.png"), task(per="pixel", outputs=3), "t")
    assert colours.shape == (1, 4, 6, 3) and np.allclose(colours, [0, 0.2, 1])
    mask = labels_of(rows(tmp_path / "mask.png"), task("classification", "pixel", classes=["no", "yes"]), "t")
    assert mask.shape == (1, 4, 6) and (mask == 1).all()


def test_rows_of_different_shapes_are_refused_with_their_place(tmp_path: Path) -> None:
    for side in (4, 6):
        Image.new("L", (side, 4)).save(tmp_path / f"{side}.png")
    sizes = rows(tmp_path / "4.png", tmp_path / "4.png", tmp_path / "6.png")
    with pytest.raises(
        ConfigError, match=r"rows, line 3: tasks\.t: maps of different sizes: \(4, 4\) .* \(4, 6\) here"
    ):
        labels_of(sizes, task(per="pixel"), "t")
    with pytest.raises(
        ConfigError, match=r"rows, line 2: tasks\.t: rows with different numbers of patches: 2 .* 1 here"
    ):
        labels_of(rows((1.0, 2.0), (1.0,)), task(per="patch"), "t")
