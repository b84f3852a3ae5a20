from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from coremerge.errors import ConfigError, SourceError
from coremerge.evaluation.maps import assembled, read_classes, read_values
from tolerances import SINGLE

DRAW = np.random.default_rng(0)


def saved(path: Path, pixels: np.ndarray, mode: str | None = None) -> Path:
    image = Image.fromarray(pixels)
    (image if mode is None else image.convert(mode)).save(path)
    return path


@pytest.mark.parametrize(
    ("dtype", "shape", "channels", "largest"),
    [(np.uint8, (4, 6), 1, 255), (np.uint16, (4, 6), 1, 65535), (np.uint8, (4, 6, 3), 3, 255)],
)
def test_values_are_shares_of_the_largest_possible(
    tmp_path: Path, dtype: type, shape: tuple[int, ...], channels: int, largest: int
) -> None:
    pixels = DRAW.integers(0, largest + 1, shape).astype(dtype)
    found = read_values(saved(tmp_path / "map.png", pixels), channels, "rows, line 1")
    np.testing.assert_allclose(found, pixels.reshape(4, 6, channels) / largest, rtol=SINGLE)
    assert found.dtype == np.float32


def test_classes_are_the_pixels_themselves(tmp_path: Path) -> None:
    pixels = DRAW.integers(0, 3, (4, 6)).astype(np.uint8)
    for mode in (None, "P"):
        image = Image.fromarray(pixels)
        if mode == "P":
            image = Image.fromarray(pixels, mode="L").convert("P")
            image.putdata(pixels.ravel().tolist())
        image.save(tmp_path / "map.png")
        np.testing.assert_array_equal(read_classes(tmp_path / "map.png", 3, "rows, line 1"), pixels)
    many = np.array([[0, 300]], np.uint16)
    assert read_classes(saved(tmp_path / "many.png", many), 301, "rows, line 1").tolist() == [[0, 300]]
    two = saved(tmp_path / "two.png", np.array([[0, 255]], np.uint8), "1")
    assert read_classes(two, 2, "rows, line 1").tolist() == [[0, 1]]


def test_a_mask_of_0_and_255_is_refused_with_what_to_write(tmp_path: Path) -> None:
    mask = saved(tmp_path / "mask.png", np.array([[0, 255]], np.uint8))
    with pytest.raises(
        ConfigError, match=r"mask\.png: label = 255: a pixel of no class.*0 to 1.*for a mask 1, not 255"
    ):
        read_classes(mask, 2, "rows, line 1")


def test_no_class_is_below_the_first(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, -1]], np.int32)).save(tmp_path / "below.tiff")
    with pytest.raises(ConfigError, match=r"label = -1: a pixel of no class"):
        read_classes(tmp_path / "below.tiff", 2, "rows, line 1")


@pytest.mark.parametrize(("mode", "channels"), [("L", 3), ("RGB", 1), ("RGBA", 3), ("P", 1), ("L", 2)])
def test_another_kind_of_image_is_refused(tmp_path: Path, mode: str, channels: int) -> None:
    path = tmp_path / "map.png"
    Image.new(mode, (4, 4)).save(path)
    with pytest.raises(ConfigError, match=rf"map\.png: label: {channels} values a pixel.*this image is {mode}\b"):
        read_values(path, channels, "rows, line 1")


def test_colours_are_no_classes(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "map.png")
    with pytest.raises(ConfigError, match="one class a pixel is needed, and this image is RGB"):
        read_classes(tmp_path / "map.png", 2, "rows, line 1")


def test_a_map_that_is_missing_is_named_with_its_row(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no image")
    for name in ("nowhere.png", "text.png"):
        with pytest.raises(SourceError, match=rf"rows, line 3: label.*{name}"):
            read_values(tmp_path / name, 1, "rows, line 3")


def test_patches_go_row_by_row_and_their_pixels_by_y_x_and_channel() -> None:
    outputs = torch.randn(5, 6, 2 * 2 * 3)
    maps = assembled(outputs, (2, 3), 2)
    assert maps.shape == (5, 4, 6, 3)
    for y in range(4):
        for x in range(6):
            for channel in range(3):
                patch, place = (y // 2) * 3 + x // 2, ((y % 2) * 2 + x % 2) * 3 + channel
                assert torch.equal(maps[:, y, x, channel], outputs[:, patch, place])
