"""The floor of a merge: one process that imports torch, reads the inputs' bytes and writes as many.

It writes as ``coremerge merge`` does: into a fresh file, then one fsync before it ends.
"""

import os
import sys
from pathlib import Path

import torch  # noqa: F401  (its import is part of the floor)

BLOCK = 1 << 20


def copy(sources: list[Path], target: Path) -> None:
    """Read every byte of ``sources`` and write it to ``target``, a megabyte at a time."""
    with target.open("wb", buffering=0) as out:
        for source in sources:
            with source.open("rb", buffering=0) as file:
                while block := file.read(BLOCK):
                    out.write(block)
        os.fsync(out.fileno())


if __name__ == "__main__":
    target, *sources = map(Path, sys.argv[1:])
    copy(sources, target)
