"""Tensor files: what is stored is what is read, and damage is named."""

from __future__ import annotations

import json
import os
import pickle
import struct
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import zoo
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from coremerge import load
from coremerge.errors import CoremergeError, SourceError, TensorError
from coremerge.formats import safetensors_file
from coremerge.formats.safetensors_file import (
    EIGHT_BITS,
    PickledFile,
    SafetensorsFile,
    read_factor,
    read_pair,
    read_whole,
)

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16,
          torch.int8, torch.uint8, torch.bool]  # fmt: skip


def test_every_dtype_and_shape(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    tensors = {f"{dtype}": torch.arange(6).reshape(2, 3).to(dtype) for dtype in DTYPES}
    tensors |= {"scalar": torch.tensor(3.0), "empty": torch.ones(0, 4)}
    save_file(tensors, path, metadata={"format": "pt"})
    file = SafetensorsFile(path)
    assert file.metadata == {"format": "pt"}
    for key, value in tensors.items():
        read = file.read(key)
        assert torch.equal(read, value) and read.dtype == value.dtype and read.shape == value.shape
        assert file.entries[key].shape == tuple(value.shape)


def test_nothing_stays_open_and_threads_do_not_mix(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    tensors = {str(i): torch.full((300, 40), float(i)) for i in range(20)}
    save_file(tensors, path)
    file = SafetensorsFile(path)
    wrong: list[str] = []

    def read_all() -> None:
        wrong.extend(key for key, value in tensors.items() if not torch.equal(file.read(key), value))

    handles = Path("/proc/self/fd")
    before = len(list(handles.iterdir())) if handles.exists() else None
    threads = [threading.Thread(target=read_all) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    if before is not None:
        assert len(list(handles.iterdir())) == before


def test_what_is_read_can_be_written_to(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(3)}, path)
    file = SafetensorsFile(path)
    file.read("a").zero_()
    assert file.read("a").sum() == 3


def test_a_float64_sum_that_overflows_is_still_finite(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.full((4,), 1e308, dtype=torch.float64)}, path)
    assert read_factor(SafetensorsFile(path), "a").max() == 1e308


def test_whole_tensors_are_checked_and_integers_allowed(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.tensor([1.0, torch.nan], dtype=torch.float16), "n": torch.tensor(7)}, path)
    file = SafetensorsFile(path)
    assert read_whole(file, "n") == 7
    with pytest.raises(TensorError, match=r"x.safetensors: a: 1 of 2 values are NaN or infinite.*checkpoint"):
        read_whole(file, "a")
    with pytest.raises(TensorError, match=r"x.safetensors: n: stored as I64"):
        read_factor(file, "n")


def test_a_dtype_that_torch_cannot_hold_plainly(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(2).to(torch.complex64)}, path)
    with pytest.raises(TensorError, match=r"a: dtype C64 cannot be read"):
        SafetensorsFile(path).read("a")


@pytest.mark.parametrize("dtype", EIGHT_BITS.values())
def test_8_bit_floats_are_read_exactly(tmp_path: Path, dtype: torch.dtype) -> None:
    every = torch.arange(256, dtype=torch.uint8).view(dtype)
    values = every[torch.isfinite(every.double())]
    save_file({"a": values, "b": values.clone()}, tmp_path / "x.safetensors")
    file = SafetensorsFile(tmp_path / "x.safetensors")
    assert torch.equal(read_factor(file, "a"), values.double())
    assert torch.equal(read_whole(file, "a").double(), values.double())
    pair = read_pair(file, ("b", "a"), torch.float32)
    assert torch.equal(pair[0].double(), values.double()) and torch.equal(pair[0], pair[1])


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_8_bit_floats_that_are_not_finite(tmp_path: Path, dtype: torch.dtype) -> None:
    save_file({"a": torch.tensor([1.0, torch.nan]).to(dtype)}, tmp_path / "x.safetensors")
    for read in (read_factor, read_whole):
        with pytest.raises(TensorError, match="1 of 2 values are NaN"):
            read(SafetensorsFile(tmp_path / "x.safetensors"), "a")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return (zoo.simple(tmp_path_factory.mktemp("whole")) / "adapter_model.safetensors").read_bytes()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 10_000))
def test_every_truncation_is_refused(tmp_path: Path, whole: bytes, length: int) -> None:
    folder = zoo.simple(tmp_path / "a")
    path = folder / "adapter_model.safetensors"
    path.write_bytes(whole[: length % len(whole)])
    with pytest.raises(TensorError, match=r"adapter_model\.safetensors") as refused:
        load(folder)
    assert refused.value.remedy


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 10_000), st.binary(max_size=4))
def test_any_damage_is_read_or_refused(tmp_path: Path, whole: bytes, at: int, junk: bytes) -> None:
    folder = zoo.simple(tmp_path / "a")
    place = at % len(whole)
    (folder / "adapter_model.safetensors").write_bytes(whole[:place] + junk + whole[place + len(junk) :])
    try:
        dict(load(folder))
    except CoremergeError as error:
        assert "a/adapter_" in str(error)


def test_a_file_cut_short_after_it_was_opened(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(100)}, path)
    file = SafetensorsFile(path)
    assert file.entries
    os.truncate(path, 200)
    with pytest.raises(SourceError, match=r"x.safetensors: changed while it was in use"):
        file.read("a")
    path.unlink()
    with pytest.raises(SourceError, match=r"x.safetensors: cannot be read: No such file"):
        file.read("a")
    with pytest.raises(SourceError, match="cannot be read"):
        SafetensorsFile(path)


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
            SourceError,
            "Git LFS pointer.*git lfs",
        ),
        (b"", TensorError, "cut short: only 0 bytes"),
        (b"PK\x03\x04zipzip" + b"\x00" * 9000, TensorError, "a pickle, not a safetensors file"),
        (struct.pack("<Q", 2**40) + b"{}", TensorError, "a header of 1099511627776 bytes is absurd"),
        (struct.pack("<Q", 3) + b"abc", TensorError, "or not a safetensors file"),
        (struct.pack("<Q", 90) + b"{}", TensorError, "cut short, damaged"),
    ],
)
def test_files_of_another_kind(tmp_path: Path, content: bytes, error: type[CoremergeError], message: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(error, match=f"x.safetensors: .*{message}") as refused:
        SafetensorsFile(path)
    assert refused.value.remedy


def test_overlapping_offsets_are_refused(tmp_path: Path) -> None:
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    header = json.dumps({"a": entry, "b": entry}).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"\x00" * 8)
    with pytest.raises(TensorError, match="or not a safetensors file"):
        SafetensorsFile(path)


class TestPickles:
    """Only when asked for, and only tensors."""

    def pickled(self, folder: Path) -> Path:
        from safetensors.torch import load_file

        zoo.simple(folder)
        torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
        (folder / "adapter_model.safetensors").rename(folder.parent / "kept.safetensors")
        return folder

    def test_not_unless_asked(self, tmp_path: Path) -> None:
        folder = self.pickled(tmp_path / "a")
        for source in (folder, folder / "adapter_model.bin"):
            with pytest.raises(SourceError, match=r"adapter_model.bin: this is a pickle.*allow_pickle.*safetensors"):
                load(source)

    def test_the_same_update_when_asked(self, tmp_path: Path) -> None:
        folder = self.pickled(tmp_path / "a")
        plain = load(zoo.simple(tmp_path / "b"))
        for source in (folder, folder / "adapter_model.bin"):
            adapter = load(source, allow_pickle=True)
            assert adapter.name == "a"
            for name, update in plain.items():
                assert torch.equal(adapter[name].dense(), update.dense())
                assert adapter.modules[name] == plain.modules[name]

    def test_no_code_is_run(self, tmp_path: Path) -> None:
        class Trap:
            def __reduce__(self) -> tuple[object, tuple[str]]:
                return os.system, (f"touch {tmp_path}/sprung",)

        folder = self.pickled(tmp_path / "a")
        for content in (pickle.dumps({"x": Trap()}), b"not a pickle", b""):
            (folder / "adapter_model.bin").write_bytes(content)
            with pytest.raises(SourceError, match=r"adapter_model.bin: cannot be unpickled safely: .*safetensors"):
                load(folder, allow_pickle=True)
        torch.save({"x": Trap()}, folder / "adapter_model.bin")
        with pytest.raises(SourceError, match="cannot be unpickled safely"):
            load(folder, allow_pickle=True)
        assert not (tmp_path / "sprung").exists()

    def test_pointers_and_other_contents(self, tmp_path: Path) -> None:
        folder = self.pickled(tmp_path / "a")
        path = folder / "adapter_model.bin"
        path.write_text("version https://git-lfs.github.com/spec/v1\n")
        with pytest.raises(SourceError, match="Git LFS pointer"):
            load(folder, allow_pickle=True)
        torch.save([torch.ones(2)], path)
        with pytest.raises(TensorError, match="something other than named tensors"):
            load(folder, allow_pickle=True)

    def test_a_dtype_without_a_name_here(self, tmp_path: Path) -> None:
        torch.save({"x": torch.ones(2, dtype=torch.complex64)}, tmp_path / "x.bin")
        file = PickledFile(tmp_path / "x.bin")
        with pytest.raises(TensorError, match=r"x.bin: x: stored as torch.complex64"):
            read_factor(file, "x")


def crafted(path: Path, header: dict | bytes, data: bytes = b"", length: int | None = None) -> Path:
    """A file with just this header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(shape: list[int], *offsets: int) -> dict:
    return {"dtype": "F32", "shape": shape, "data_offsets": list(offsets)}


TWICE = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
HOSTILE = {
    "a header of exabytes": ({}, 2**63, "a header of 9223372036854775808 bytes is absurd"),
    "a header longer than the file": ({}, 1000, "cut short"),
    "a product that overflows to nothing": ({"a": entry([2**32, 2**32], 0, 8)}, None, "overflow"),
    "a product that overflows to its size": ({"a": entry([2**62 + 1, 4], 0, 8)}, None, "overflow"),
    "overlapping": ({"a": entry([2], 0, 8), "b": entry([1], 4, 8)}, None, "damaged"),
    "a hole": ({"a": entry([1], 4, 8)}, None, "damaged"),
    "beyond the end": ({"a": entry([4], 0, 16)}, None, "damaged"),
    "backwards": ({"a": entry([2], 8, 0)}, None, "damaged"),
    "another shape than bytes": ({"a": entry([1], 0, 8)}, None, "damaged"),
    "a name twice": (TWICE, None, "a: is in the header twice"),
    "metadata twice": (b'{"__metadata__":{"a":"b","a":"c"},' + TWICE[59:], None, "twice|damaged"),
    "a long name": ({"a" * 1001: entry([2], 0, 8)}, None, r"a\.\.\.: a name of 1,001 characters"),
    "empty and endless": ({"a": entry([0, 2**62, 2**62], 0, 0), "b": entry([2], 0, 8)}, None, "an absurd shape"),
    "a side that torch cannot hold": ({"a": entry([0, 2**64 - 1], 0, 0), "b": entry([2], 0, 8)}, None, "an absurd"),
    "a thousand dimensions": ({"a": entry([2] + [1] * 999, 0, 8)}, None, "an absurd shape of 1000 dimensions"),
    "half a character": (b'{"\\ud83d":' + TWICE[5:53] + b"}", None, "damaged"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_headers_are_refused_before_anything_is_allocated(tmp_path: Path, name: str) -> None:
    header, length, message = HOSTILE[name]
    path = crafted(tmp_path / "x.safetensors", header, bytes(8), length)
    with pytest.raises(TensorError, match=rf"x\.safetensors: .*(?:{message})") as refused:
        _ = SafetensorsFile(path).entries
    assert refused.value.remedy and len(str(refused.value)) < 500


def test_more_tensors_than_any_adapter_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors_file, "MOST_TENSORS", 3)
    path = crafted(tmp_path / "x.safetensors", {str(i): entry([0], 0, 0) for i in range(4)})
    with pytest.raises(TensorError, match=r"x\.safetensors: 4 tensors are absurd"):
        _ = SafetensorsFile(path).entries


class TestHostilePickles:
    @staticmethod
    def folder(path: Path, a: object, b: object = None) -> Path:
        path.mkdir()
        (path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 2}')
        held = {"base_model.model.q.lora_A.weight": a, "base_model.model.q.lora_B.weight": torch.ones(3, 2)}
        torch.save(held, path / "adapter_model.bin")
        return path

    @pytest.mark.parametrize(
        "make",
        [
            lambda: torch.ones(1).expand(2, 10**12),
            lambda: torch.ones(2, 10**12, device="meta"),
            lambda: torch.sparse_coo_tensor([[0], [0]], [1.0], (2, 10**12), check_invariants=True),
        ],
        ids=["one number said to be many", "no numbers at all", "sparse"],
    )
    def test_a_tensor_larger_than_its_file(self, tmp_path: Path, make: Callable[[], torch.Tensor]) -> None:
        folder = self.folder(tmp_path / "a", make())
        with pytest.raises((TensorError, SourceError), match=r"adapter_model\.bin"):
            load(folder, allow_pickle=True)

    @pytest.mark.parametrize("allow", [False, True])
    def test_code_in_it_is_not_run(self, tmp_path: Path, allow: bool) -> None:
        folder = self.folder(tmp_path / "a", Runs(tmp_path / "ran"))
        with pytest.raises(SourceError, match="unpickled safely" if allow else "can run code"):
            load(folder, allow_pickle=allow)
        assert not (tmp_path / "ran").exists()


class Runs:
    """Makes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return Path.touch, (self.mark,)
