"""Devices that cannot compute are refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from coremerge.devices import check_device
from coremerge.errors import ConfigError
from coremerge.pipeline import merge_files
from tiny import make_adapter

UNUSABLE = ["meta", "meta:0", "gpu", "", "cuda:999", "hpu", "privateuseone", "xla", "fpga", "lazy"]


@pytest.mark.parametrize("device", UNUSABLE)
def test_a_device_that_cannot_compute_is_refused(device: str, tmp_path: Path) -> None:
    for dtype in (torch.float64, torch.float32):
        with pytest.raises(ConfigError, match=r"device = .*cannot be used: .*--device cpu"):
            check_device(device, dtype)
    with pytest.raises(ConfigError, match="cannot be used"):
        merge_files([make_adapter(tmp_path / "A")], tmp_path / "OUT", device=device)
    assert not (tmp_path / "OUT").exists()


def test_the_processor_can_compute() -> None:
    check_device("cpu")
    check_device("cpu:0")
