"""Too little memory is one refusal, whoever ran out of it and in whatever words."""

from __future__ import annotations

import json
import mmap
from errno import ENOMEM
from pathlib import Path

import numpy as np
import pytest
import torch

from coremerge.batch import run_batch
from coremerge.errors import CoremergeError
from coremerge.memory import memory_refused, out_of_memory
from coremerge.pipeline import merge_files
from tiny import make_adapter

ALLOCATOR = (
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate"
    " 8589934592 bytes. Error code 12 (Cannot allocate memory)"
)
ERRORS = [
    MemoryError(),
    MemoryError("Unable to allocate 8.00 GiB for an array with shape (1073741824,)"),
    RuntimeError(ALLOCATOR),
    RuntimeError(
        "[enforce fail at CPUAllocator.cpp:68] . DefaultCPUAllocator: not enough memory: you tried to allocate 9"
    ),
    RuntimeError("unable to mmap 4096 bytes from file </dev/shm/x>: Cannot allocate memory (12)"),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 79 GiB"),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("MPS backend out of memory (MPS allocated: 17.9 GB, max allowed: 18.1 GB)"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("std::bad_alloc"),
    OSError(ENOMEM, "Cannot allocate memory"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: f"{type(error).__name__} {error}"[:50])
def test_every_allocator_is_understood(error: Exception) -> None:
    with pytest.raises(CoremergeError, match=r"^out of memory.*fewer --threads or a smaller --batch"), memory_refused():
        raise error


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        OSError(2, "No such file or directory"),
        ValueError("out of memory"),
        CoremergeError("out of memory"),
    ],
)
def test_other_errors_stay_what_they_are(error: Exception) -> None:
    assert out_of_memory(error) is None
    with pytest.raises(type(error)) as raised, memory_refused():
        raise error
    assert raised.value is error


def test_what_was_asked_for_is_said() -> None:
    assert "8589934592 bytes were asked for" in str(out_of_memory(RuntimeError(ALLOCATOR)))
    assert "on CUDA: 20.00 MiB were asked for" in str(out_of_memory(ERRORS[5]))


def test_real_allocators_are_understood() -> None:
    def huge_map() -> object:
        return mmap.mmap(-1, 1 << 62)

    for allocate in (lambda: torch.empty(1 << 60), lambda: np.empty(1 << 58), lambda: bytearray(1 << 62), huge_map):
        with pytest.raises(CoremergeError, match=r"^out of memory"), memory_refused():
            allocate()


@pytest.mark.parametrize("error", [ERRORS[2], ERRORS[4]], ids=["allocator", "mmap"])
@pytest.mark.parametrize("place", ["execute", "make_plan", "save"])
def test_a_merge_that_runs_out_of_memory_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, place: str
) -> None:
    def full(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(f"coremerge.pipeline.{place}", full)
    source = make_adapter(tmp_path / "A")
    with pytest.raises(CoremergeError, match=r"^out of memory"):
        merge_files([source], tmp_path / "OUT")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["A"]
    manifest = tmp_path / "batch.yaml"
    manifest.write_text(json.dumps({"sets": {"one": [str(source)]}}))
    (row,) = run_batch(manifest, tmp_path / "RESULTS").rows
    assert row.status == "failed" and (row.error or "").startswith("out of memory")
