"""Methods: the cores of one module → one core. One idea a file.

A method is a pure function ``method(cores, site)``. The cores are weighted already: w_t X_t stands wherever a paper
writes X_t. They are :class:`~coremerge.lowrank.LowRank`, all of one shape; spectral methods stay with the factors,
element-wise ones ask for entries.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor

from coremerge.layered import Condition, at
from coremerge.lowrank import LowRank, Matrix
from coremerge.registry import Registry


@dataclass(frozen=True)
class Site:
    """Where a merge happens: what random masks may depend on, what is known of all modules, and nothing else.

    Attributes:
        seed: the recipe's.
        modules: the module's name, or the names in one batch.
        tasks: the adapters' names, in the order of the cores.
        last: the highest number of a layer: where gradients end.
        known: what the method's :class:`Survey` found.
    """

    seed: int = 0
    modules: tuple[str, ...] = ("",)
    tasks: tuple[str, ...] = ()
    last: int = 0
    known: Any = None

    def uniform(self, task: int, like: Tensor) -> Tensor:
        """Uniform numbers in [0, 1) of the shape of ``like`` that depend on seed, module and adapter only."""
        name = self.tasks[task] if self.tasks else str(task)
        draws = [_uniform(f"{self.seed}\0{module}\0{name}", like.shape[-2:]) for module in self.modules]
        return torch.stack(draws).reshape(like.shape).to(like.device)


def _uniform(key: str, shape: torch.Size) -> Tensor:
    digest = blake2b(key.encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
    return torch.rand(shape, generator=generator, dtype=torch.float64)


Share = float | Sequence[Any]
"""A parameter: one for all adapters; or for each of them, in their order, a number or what differs by layer."""


def of_task(value: Share, task: int, site: Site) -> float:
    """A parameter for one of the adapters, here."""
    own: Any = value[task] if isinstance(value, Sequence) else value
    if not isinstance(own, tuple):
        return float(own)
    return at(own, site.modules[0], site.last, f"the parameter of adapter {task + 1}")


def shown(value: Share) -> str:
    """Such a parameter, in words.

    Example:
        >>> shown(0.2), shown((0.5, (0.0, 1.0)))
        ('0.2', '0.5, 0 to 1 over the layers (in their order)')
    """
    if not isinstance(value, Sequence):
        return f"{value:g}"
    return ", ".join(map(_shown, value)) + " (in their order)"


def _shown(own: Any) -> str:
    if not isinstance(own, tuple):
        return f"{own:g}"
    if isinstance(own[0], Condition):
        return "one by name (the first that fits)"
    return f"{own[0]:g} to {own[-1]:g} over the layers"


Method = Callable[[Sequence[LowRank], Site], Matrix]


@dataclass(frozen=True)
class Survey:
    """A first pass over all modules, of a method that has to know something of all before it merges any.

    Attributes:
        look: what it takes down of the modules that it is given, as it would be given them to merge: small, and a thing
            that can be sent.
        join: of several such, in any order and however they were put together.
        settle: what it makes of that: :attr:`Site.known`.
    """

    look: Callable[[Sequence[LowRank], Site], Any]
    join: Callable[[Sequence[Any]], Any]
    settle: Callable[[Any], Any]


METHODS: Registry[Method] = Registry("method")

from coremerge.methods import cart, cts, dare, dc, della, linear, magnitude, pcb, sce, ties, tsv, whiten, wudi  # noqa: E402, F401  (each registers itself)
