"""Out of memory: each library says it in words of its own; here all of them become one refusal."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from errno import ENOMEM

from coremerge.errors import CoremergeError

WORDS = (
    "out of memory",  # CUDA, HIP, MPS, XPU
    "not enough memory",  # PyTorch's allocator, on Windows and in older versions
    "can't allocate memory",  # PyTorch's allocator
    "cannot allocate memory",  # the system: read, mmap, fork
    "unable to mmap",  # PyTorch, where a file is mapped
    "failed to allocate",
    "could not allocate",
    "unable to allocate",
    "bad_alloc",  # C++
    "bad allocation",
    "alloc_failed",  # cuBLAS, cuSOLVER
    "insufficient memory",
)
"""What the messages of errors have in them that stand for it; in lower case."""

KINDS = {"OutOfMemoryError", "SafetensorError"}
"""Names of kinds that are neither RuntimeError, OSError nor MemoryError everywhere."""


def out_of_memory(error: BaseException) -> CoremergeError | None:
    """The refusal that ``error`` stands for; None: it is about something else."""
    if not _is_meant(error):
        return None
    size = re.search(r"allocate (\d+(?:\.\d+)? ?(?:bytes|[KMGT]i?B)?)", str(error), re.IGNORECASE)
    device = re.search(r"\b(CUDA|HIP|MPS|XPU)\b", str(error))
    where, asked = f" on {device[1]}" if device else "", f": {size[1].strip()} were asked for" if size else ""
    return CoremergeError(
        f"out of memory{where}{asked}",
        remedy="Use fewer --threads or a smaller --batch, where there are these, or a machine with more memory",
    )


def _is_meant(error: BaseException) -> bool:
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno == ENOMEM
    known = isinstance(error, (RuntimeError, OSError)) or type(error).__name__ in KINDS
    return known and any(word in str(error).lower() for word in WORDS)


@contextmanager
def memory_refused() -> Iterator[None]:
    """Within the block, an error that stands for too little memory is raised as a refusal."""
    try:
        yield
    except Exception as error:
        refusal = out_of_memory(error)
        if refusal is None:
            raise
        raise refusal from None
