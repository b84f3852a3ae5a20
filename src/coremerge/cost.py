"""What a merge costs, told beforehand: bytes, operations, memory and time from shapes, ranks and processors alone.

docs/scaling.md derives it; ``python -m benchmarks.scale.cost`` measures the constants and how far off it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from coremerge.plan import Plan

TALL, CORE, BYTE, MODULE, DENSE, START = 2e-11, 2.3e-9, 1.7e-9, 1.6e-3, 8e-10, 1.4
"""Seconds of one processor: for an operation on tall factors, on cores and on whole updates, for a byte that is read,
converted or written, for a module, and to begin."""

HANDED, WRITTEN = 1e-3, 1e-9
"""Seconds that a module, and a byte of the result, cost the one process which hands out the work and writes."""


@dataclass(frozen=True)
class Cost:
    """Of a merge, or of one module of it.

    Attributes:
        modules: their number.
        read: bytes of the adapters' factors: read once to merge and once to lift, and before that once for their norms,
            where these are made equal, and once where the method has to know something of all modules.
        written: bytes of the result.
        tall: operations on factors of m or n rows.
        core: operations on cores.
        dense: operations on whole m × n updates.
        copied: bytes of a base model that is written anew, in place of the factors.
    """

    modules: int = 0
    read: int = 0
    written: int = 0
    tall: float = 0.0
    core: float = 0.0
    dense: float = 0.0
    copied: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))

    @property
    def operations(self) -> float:
        """All of them: multiplications and additions in float64."""
        return self.tall + self.core + self.dense

    @property
    def processor_seconds(self) -> float:
        """Of one processor like the one that the constants were measured on."""
        moved = self.read + (2 * self.copied or self.written)
        return TALL * self.tall + CORE * self.core + DENSE * self.dense + BYTE * moved + MODULE * self.modules

    def seconds(self, workers: int, *, cluster: bool = False) -> float:
        """By the clock, with ``workers`` processors; on a ``cluster`` one process hands out the work and writes."""
        return START + max(self.processor_seconds / workers, self.handed if cluster else 0.0)

    @property
    def handed(self) -> float:
        """Seconds of the one process of a cluster which hands out the work and writes an adapter."""
        return HANDED * self.modules + WRITTEN * self.written

    def to_dict(self) -> dict[str, Any]:
        """For ``--dry-run --json``."""
        return {
            "bytes_read": self.read + self.copied,
            "bytes_written": self.copied or self.written,
            "operations": self.operations,
            "processor_seconds": self.processor_seconds,
        }


def cost_of(plan: Plan) -> Cost:
    """Of all modules of ``plan``."""
    return sum((cost_of_module(plan, name) for name in plan.modules), Cost())


def cost_of_module(plan: Plan, name: str) -> Cost:
    """Of one module.

    With R the sum of the adapters' ranks and k the rank of the result: R × R triangles of both sides' stacked factors,
    and the way back, take 2 (m + n) R (R + k) operations; the decompositions of cores are in proportion to R³; a method
    or step that works on all entries in full space decomposes T updates of m × n.
    """
    planned = plan.modules[name]
    (m, n), summed, rank = planned.module.shape, sum(planned.ranks.values()), planned.module.rank
    looks = plan.resolved.method.survey is not None
    times = 2 + (plan.recipe.norms == "equal" and len(plan.adapters) > 1) + looks
    stored = sum(plan.adapters[key].modules[name].dtype.itemsize * r for key, r in planned.ranks.items())
    return Cost(
        modules=1,
        read=times * stored * (m + n),
        written=rank * (m + n) * plan.dtype.itemsize,
        tall=2.0 * (m + n) * summed * (summed * (1 + looks) + rank),
        core=float(min(m, n, summed) ** 3),
        dense=float(len(planned.ranks) * m * n * min(m, n)) if plan.is_dense else 0.0,
    )
