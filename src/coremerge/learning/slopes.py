"""Where coefficients lie in one vector, and the slopes of objectives along it: in any number of processes, a few tasks
each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from coremerge.adapter import Adapter
from coremerge.errors import InputError
from coremerge.learning.attention import plain_attention
from coremerge.learning.backbone import Batch, frozen, inputs_of, seeded
from coremerge.learning.blocks import choose_modules, measured_of
from coremerge.learning.forward import MergedModel, Target
from coremerge.learning.given import moved
from coremerge.learning.objectives import Entropy, Match, NullSpace, Objective
from coremerge.learning.settings import Per, Settings
from coremerge.patterns import listed

Heads = Mapping[str, Callable[[Any, Batch], Tensor]]


@dataclass(frozen=True)
class Owners:
    """Whose rank components a module has.

    Attributes:
        adapters: names of the adapters that have it.
        owner: (R,) which of them each component belongs to.
    """

    adapters: tuple[str, ...]
    owner: Tensor


def owners_of(adapters: Mapping[str, Adapter]) -> dict[str, Owners]:
    """Of all modules, whether a model runs them or not."""
    found = {}
    for module in sorted({module for adapter in adapters.values() for module in adapter}):
        having = [name for name, adapter in adapters.items() if module in adapter]
        ranks = [adapters[name].modules[module].rank for name in having]
        owner = torch.arange(len(having)).repeat_interleave(torch.tensor(ranks))
        found[module] = Owners(tuple(having), owner)
    return found


class Places:
    """Which coefficient of the vector each rank component of a module has.

    Args:
        owners: module name → :class:`Owners`.
        per: one coefficient per adapter, module or component.

    Attributes:
        count: of coefficients.
    """

    def __init__(self, owners: Mapping[str, Owners], per: Per) -> None:
        self.owners, self.per = owners, per
        places: dict[Any, int] = {}
        self._index: dict[str, Tensor] = {}
        for name, one in owners.items():
            keys = (_key(per, name, one.adapters[k], i) for i, k in enumerate(one.owner.tolist()))
            self._index[name] = torch.tensor([places.setdefault(key, len(places)) for key in keys])
        self.count = len(places)

    def of(self, name: str, values: Tensor) -> Tensor:
        """A module's coefficients, one per rank component."""
        return values[self._index[name]]

    def named(self, which: Tensor) -> str:
        """Whose coefficients ``which`` are: adapters, or modules and, where not all of theirs are meant, adapters."""
        if self.per == "adapter":
            return ", ".join(dict.fromkeys(name for names in self._among(which).values() for name in names))
        return listed(
            {
                module: "" if len(names) == len(self.owners[module].adapters) else f" ({', '.join(names)})"
                for module, names in self._among(which).items()
            }
        )

    def _among(self, which: Tensor) -> dict[str, list[str]]:
        """Module → its adapters that have some of ``which``."""
        found = {}
        for module, one in self.owners.items():
            mine = self.of(module, which)
            found[module] = [name for k, name in enumerate(one.adapters) if bool(mine[one.owner == k].any())]
        return {module: names for module, names in found.items() if names}

    def groups(self) -> list[Any]:
        """The coefficients of each module; where modules share them, all."""
        return [slice(None)] if self.per == "adapter" else [torch.unique(index) for index in self._index.values()]

    def table(self, values: Tensor) -> dict[str, dict[str, float | tuple[float, ...]]]:
        """Adapter → module → weight."""
        table: dict[str, dict[str, float | tuple[float, ...]]] = {}
        for name, one in self.owners.items():
            for k, adapter in enumerate(one.adapters):
                own = self.of(name, values)[one.owner == k].tolist()
                table.setdefault(adapter, {})[name] = tuple(own) if self.per == "component" else own[0]
        return table


def _key(per: Per, module: str, adapter: str, component: int) -> Any:
    if per == "component":
        return module, component
    return (adapter, module) if per == "module" else adapter


@dataclass(frozen=True)
class Descending:
    """How :class:`Slopes` begin, in a form that can be sent: see :func:`~coremerge.learning.learn_weights`.

    Attributes:
        model: or what makes it, there.
        adapters: name → adapter.
        settings: all of them.
        heads: for ``entropy``.
        shares: task → its share of the objective.
        seed: of anything random in the model.
        autocast: run the model in this dtype.
        checkpointing: trade time for memory.
        short: of all tasks, inputs are short: see :mod:`coremerge.learning.attention`.
    """

    model: nn.Module | Callable[[], nn.Module]
    adapters: Mapping[str, Adapter]
    settings: Settings
    heads: Heads
    shares: Mapping[str, float]
    seed: int
    autocast: torch.dtype | None
    checkpointing: bool
    short: bool = False

    def __call__(self, tasks: Sequence[tuple[str, Sequence[Batch]]]) -> Slopes:
        """Those of some tasks."""
        return Slopes(self.model if isinstance(self.model, nn.Module) else self.model(), self, tasks)


class Slopes:
    """A model, and some tasks' inputs.

    Args:
        model: is frozen until :meth:`close`.
        opening: what else there is to know.
        tasks: name and batches.
    """

    def __init__(self, model: nn.Module, opening: Descending, tasks: Sequence[tuple[str, Sequence[Batch]]]) -> None:
        self.opening = opening
        with ExitStack() as undo:
            undo.enter_context(seeded(opening.seed))
            undo.enter_context(frozen(model, checkpointing=opening.checkpointing))
            if opening.short:
                undo.enter_context(plain_attention(model, opening.autocast))
            merged = MergedModel(model, opening.adapters)
            device = merged.device
            self.tasks = [(task, [moved(batch, device) for batch in given]) for task, given in tasks]
            self._owners = owners_of(opening.adapters)
            self._places = Places(self._owners, opening.settings.per)
            self._objective = _objective(opening.settings, merged, opening.heads)
            self._device = device.type
            self._undo = undo.pop_all()

    def close(self) -> None:
        """Leave the model as it was."""
        self._undo.close()

    def owners(self) -> dict[str, Owners]:
        """Module name → :class:`Owners`."""
        return self._owners

    def slopes(self, values: Tensor, step: int) -> Iterator[tuple[str, float, Tensor]]:
        """For each task, the objective on the batch that is due, and the gradient of its share."""
        for task, given in self.tasks:
            leaf = values.detach().clone().requires_grad_()
            loss = self._descent(task, given[step % len(given)], leaf)
            yield task, loss, torch.zeros_like(values) if leaf.grad is None else leaf.grad

    def _descent(self, task: str, batch: Batch, leaf: Tensor) -> float:
        """Leaves the gradient at ``leaf``; the graph is gone afterwards."""
        kind = self.opening.autocast

        def coefficients(target: Target) -> Tensor:
            return self._places.of(target.name, leaf)

        with (
            inputs_of(task),
            torch.enable_grad(),
            torch.autocast(self._device, kind, enabled=kind is not None),
            self._objective(task, batch, coefficients) as loss,
        ):
            if not bool(torch.isfinite(loss)):
                raise InputError("the objective is not finite", key=task, remedy="Check the inputs, or run in float32")
            if loss.requires_grad:  # else no coefficient has an influence on it
                (loss * self.opening.shares[task]).backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())


def _objective(settings: Settings, merged: MergedModel, heads: Heads) -> Objective:
    if settings.objective == "entropy":
        return Entropy(merged, heads)
    if settings.objective == "match":
        return Match(merged, choose_modules(merged, settings.modules))
    return NullSpace(merged, measured_of(merged, settings.modules), own=settings.objective == "nsc-own")
