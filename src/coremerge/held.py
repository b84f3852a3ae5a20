"""Merged modules until they are written: what is said of each in memory, their cores in memory or in a journal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from coremerge.errors import SourceError
from coremerge.formats.journal import Journal, Part
from coremerge.merging import Solved
from coremerge.outcome import ModuleReport
from coremerge.plan import CORE_BYTES
from coremerge.spaces import Combination


class Held(Mapping[str, Solved]):
    """Module name → :class:`~coremerge.merging.Solved`; memory does not grow with the number of modules' cores.

    Args:
        journal: where cores are kept, so that a crash does not lose them.
        folder: without a journal, where a file without a name is made for the cores beyond ``most``; None: memory only.
        most: bytes of cores that stay in memory.

    Attributes:
        reports: module name → :class:`~coremerge.outcome.ModuleReport`.

    Raises:
        OutputError: the cores cannot be written.
    """

    def __init__(self, journal: Journal | None = None, folder: Path | None = None, most: int = CORE_BYTES) -> None:
        self.reports: dict[str, ModuleReport] = {}
        self._memory: dict[str, Solved] = {}
        self._parts: dict[str, Part] = {}
        self._journal, self._folder, self._left = journal, folder, 0 if journal else most
        self._keeps = journal is not None

    def __getitem__(self, name: str) -> Solved:
        if name in self._memory or not self._journal:
            return self._memory[name]
        part = self._parts[name]
        tensors = self._journal.tensors(part)
        combination = Combination(tensors["left"], tensors["right"], *part.facts["of"])
        return Solved(combination, part.facts["amplification"], self.reports[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.reports)

    def __len__(self) -> int:
        return len(self.reports)

    def __contains__(self, name: object) -> bool:
        return name in self.reports

    def add(self, solved: Mapping[str, Solved]) -> None:
        """More of them; on the disk when this returns, where they are kept for good."""
        last = list(solved)[-1:]
        for name, one in solved.items():
            self.reports[name] = one.report
            size = one.combination.left.nbytes + one.combination.right.nbytes
            if not self._keeps and (self._folder is None or size <= self._left):
                self._memory[name], self._left = one, self._left - size
                continue
            if self._journal is None:
                assert self._folder is not None
                self._journal = Journal.temporary(self._folder)
            sync = self._keeps and [name] == last
            self._parts[name] = self._journal.add(_facts(name, one), _tensors(one), sync=sync)

    def take(self, part: Part) -> None:
        """One that an earlier run kept in the journal.

        Raises:
            SourceError: nobody could have kept that.
        """
        try:
            name, said = str(part.facts["module"]), part.facts["report"]
            report = ModuleReport(**said | {"shape": tuple(said["shape"]), "zero": tuple(said["zero"])})
            _, _ = part.facts["of"]
            float(part.facts["amplification"])
        except (KeyError, TypeError, ValueError, OverflowError):
            file = self._journal.path if self._journal else None
            raise SourceError("a record of it makes no sense", file=file, remedy="Remove it to begin anew") from None
        self.reports[name], self._parts[name] = report, part

    def close(self) -> None:
        """Let go of a file that has no name."""
        if self._journal and not self._keeps:
            self._journal.close()


def _facts(name: str, one: Solved) -> dict[str, Any]:
    return {
        "module": name,
        "report": vars(one.report) | {"ranks": dict(one.report.ranks)},
        "amplification": one.amplification,
        "of": [one.combination.of_left, one.combination.of_right],
    }


def _tensors(one: Solved) -> dict[str, Tensor]:
    return {"left": one.combination.left, "right": one.combination.right}
