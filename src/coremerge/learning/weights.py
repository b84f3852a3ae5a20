"""Merge weights from unlabelled inputs, by gradient: the model is run, never changed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from coremerge.adapter import Adapter
from coremerge.errors import ConfigError, InputError
from coremerge.learning.backbone import Batch, frozen
from coremerge.learning.blocks import choose_modules
from coremerge.learning.forward import MergedModel, Target
from coremerge.learning.objectives import Entropy, Match, NullSpace, Objective
from coremerge.learning.result import Weights
from coremerge.learning.settings import Per, Settings, settle

Heads = Mapping[str, Callable[[Any, Batch], Tensor]]
Progress = Callable[[int, int, Mapping[str, float]], "bool | None"]


def learn_weights(
    model: nn.Module,
    adapters: Mapping[str, Adapter],
    data: Mapping[str, Iterable[Batch]],
    *,
    objective: str | None = None,
    preset: str | Settings | None = None,
    preferences: Mapping[str, float] | None = None,
    heads: Heads | None = None,
    seed: int = 0,
    autocast: torch.dtype | None = None,
    checkpointing: bool = False,
    resume: Weights | None = None,
    progress: Progress | None = None,
    **changes: Any,
) -> Weights:
    """Merge weights from a few unlabelled inputs of every task.

    The model's weights, mode and gradients are as they were afterwards.

    Args:
        model: a model of ``transformers`` (its backbone alone is run), on any device or devices.
        adapters: name → adapter, of any rank, alpha and type; all modules linear (or GPT-2's Conv1D).
        data: the same names → batches, as the model takes them; labels are not read. An adapter without data has
            coefficients, too, learned from the others' inputs. Gone through again and again, in the order given.
        objective: ``nsc-own`` (the default), ``match``, ``nsc`` or ``entropy``: see
            :mod:`coremerge.learning.objectives`.
        preset: a name of :data:`PRESETS`, or settings; by default the one that goes with the objective.
        preferences: task → its weight in the objective; 1 for those not named.
        heads: for ``entropy``: task → the backbone's output and the batch to logits.
        seed: of anything random in the model.
        autocast: run the model in this dtype (``torch.bfloat16``).
        checkpointing: trade time for memory in the backward pass.
        resume: a result to go on from: ``steps`` are then counted from its beginning.
        progress: called after each step with the steps done, their number, and each task's objective; where it returns
            False, that was the last step.
        changes: settings by name, in place of the preset's.

    Raises:
        ConfigError: an unknown setting, task or objective; no module is measured.
        InputError: a task without inputs.
        MismatchError: the model lacks a module, or has it in another shape.
        UnsupportedError: a module that cannot be hooked.
    """
    settings = settle(objective, preset, changes, len(adapters))
    tasks = _tasks(adapters, data, preferences or {}, heads if settings.objective == "entropy" else None)
    torch.manual_seed(seed)
    with frozen(model, checkpointing=checkpointing), torch.enable_grad():
        merged = MergedModel(model, adapters)
        vector = _Vector(merged, settings)
        run = _Descent(_objective(settings, merged, heads or {}), vector, settings, tasks, autocast)
        if resume is not None:
            run.take_up(resume)
        run.descend(data, progress)
    return run.result(seed)


def check_names(key: str, named: Iterable[str], adapters: Iterable[str]) -> None:
    """Whether all that is ``named`` are adapters.

    Raises:
        ConfigError: one is not.
    """
    known = list(adapters)
    for name in named:
        if name not in known:
            raise ConfigError("no adapter of that name", key=key, value=name, remedy=f"Adapters: {', '.join(known)}")


def _objective(settings: Settings, merged: MergedModel, heads: Heads) -> Objective:
    if settings.objective == "entropy":
        return Entropy(merged, heads)
    measured = choose_modules(merged, settings.modules)
    if settings.objective == "match":
        return Match(merged, measured)
    return NullSpace(merged, measured, own=settings.objective == "nsc-own")


def _tasks(
    adapters: Mapping[str, Adapter],
    data: Mapping[str, Iterable[Batch]],
    preferences: Mapping[str, float],
    heads: Heads | None,
) -> dict[str, float]:
    """Each task that has data, in the adapters' order, with its weight in the objective."""
    check_names("data", data, adapters)
    check_names("preferences", preferences, adapters)
    tasks = {name: float(preferences.get(name, 1.0)) for name in adapters if name in data}
    if heads is not None:
        tasks = {name: weight for name, weight in tasks.items() if name in heads}
    if (
        not tasks
        or any(weight < 0 or not math.isfinite(weight) for weight in tasks.values())
        or not any(tasks.values())
    ):
        raise ConfigError("no task to learn from", key="data", remedy="Give inputs, and preferences of at least zero")
    return tasks


class _Vector:
    """All coefficients in one parameter, and which of them each rank component of a target has."""

    def __init__(self, merged: MergedModel, settings: Settings) -> None:
        self.per = settings.per
        self.targets = merged.targets
        places: dict[Any, int] = {}
        self._index: dict[str, Tensor] = {}
        for name, target in merged.targets.items():
            keys = (_key(settings.per, name, target.adapters[k], i) for i, k in enumerate(target.owner.tolist()))
            self._index[name] = torch.tensor([places.setdefault(key, len(places)) for key in keys])
        self.start = float(settings.start or 0.0)
        self.values = nn.Parameter(torch.full((len(places),), self.start))
        self.touched = torch.zeros(len(places), dtype=torch.bool)

    def hold_total(self) -> None:
        """Shift the coefficients of each module, or all where modules share them, back to the mean they started at."""
        groups = [slice(None)] if self.per == "adapter" else [torch.unique(index) for index in self._index.values()]
        for group in groups:
            self.values.data[group] += self.start - self.values.data[group].mean()

    def of(self, target: Target) -> Tensor:
        """One coefficient per rank component."""
        return self.values[self._index[target.name]]

    def table(self, adapters: Sequence[str]) -> dict[str, dict[str, float | tuple[float, ...]]]:
        """Adapter → module → weight."""
        table: dict[str, dict[str, float | tuple[float, ...]]] = {name: {} for name in adapters}
        for name, target in self.targets.items():
            values = self.of(target).detach()
            for k, adapter in enumerate(target.adapters):
                own = values[target.owner.cpu() == k].tolist()
                table[adapter][name] = tuple(own) if self.per == "component" else own[0]
        return table


def _key(per: Per, module: str, adapter: str, component: int) -> Any:
    if per == "component":
        return module, component
    return (adapter, module) if per == "module" else adapter


class _Descent:
    """The optimiser's way down."""

    def __init__(
        self,
        objective: Objective,
        vector: _Vector,
        settings: Settings,
        tasks: Mapping[str, float],
        autocast: torch.dtype | None,
    ) -> None:
        self.objective, self.vector, self.settings, self.tasks = objective, vector, settings, tasks
        self.autocast = autocast
        self.optimizer = torch.optim.AdamW([vector.values], lr=settings.rate, weight_decay=settings.decay)
        self.start = vector.values.detach().clone()
        self.path = [self.start]
        self.history: list[list[float]] = []

    def take_up(self, before: Weights) -> None:
        """Go on from ``before``."""
        if before.path.shape[-1] != len(self.start) or before.tasks != tuple(self.tasks):
            raise ConfigError("belongs to other adapters, tasks or modules", key="resume")
        self.path, self.history = list(before.path), before.objective.tolist()
        self.vector.values.data.copy_(before.path[-1])
        self.start = before.path[0]
        state = {key: before.state[key].clone() for key in ("step", "exp_avg", "exp_avg_sq")}
        self.optimizer.state[self.vector.values] = state

    def descend(self, data: Mapping[str, Iterable[Batch]], progress: Progress | None) -> None:
        """Steps until the last one, or until it stops paying."""
        batches = {task: _endless(data[task], task, len(self.history)) for task in self.tasks}
        while len(self.history) < self.settings.steps and not self._stalled():
            losses = {task: self._descent_of(task, next(batches[task])) for task in self.tasks}
            self.history.append(list(losses.values()))
            self._step()
            if progress and progress(len(self.history), self.settings.steps, losses) is False:
                return

    def _descent_of(self, task: str, batch: Batch) -> float:
        """Adds one task's gradient; its graph is gone afterwards."""
        device = next(iter(self.vector.targets.values())).left.device.type
        with (
            torch.autocast(device, self.autocast, enabled=self.autocast is not None),
            self.objective(task, batch, self.vector.of) as loss,
        ):
            if not bool(torch.isfinite(loss)):
                raise InputError("the objective is not finite", key=task, remedy="Check the inputs, or run in float32")
            (loss * (self.tasks[task] / sum(self.tasks.values()))).backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())

    def _step(self) -> None:
        values, settings = self.vector.values, self.settings
        if values.grad is not None:
            self.vector.touched |= values.grad != 0
            values.grad += 2 * settings.pull * (values.detach() - self.start) / len(values)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if settings.fixed_total:
            self.vector.hold_total()
        if settings.bounds is not None:
            values.data.clamp_(*settings.bounds)
        self.path.append(values.detach().clone())

    def _stalled(self) -> bool:
        patience = self.settings.patience
        if patience is None or len(self.history) <= 2 * patience:
            return False
        means = [sum(row) for row in self.history]
        window = [sum(means[i : i + patience]) for i in range(len(means) - patience + 1)]
        return window[-1] >= min(window[:-patience])

    def result(self, seed: int) -> Weights:
        """What was learned."""
        state = {key: value.detach().clone() for key, value in self.optimizer.state.get(self.vector.values, {}).items()}
        names = list(dict.fromkeys(name for target in self.vector.targets.values() for name in target.adapters))
        return Weights(
            self.vector.table(names),
            {**asdict(self.settings), "seed": seed},
            tuple(self.tasks),
            torch.tensor(self.history).reshape(len(self.history), len(self.tasks)),
            torch.stack(self.path),
            state,
            tuple(self._notes()),
        )

    def _notes(self) -> Iterator[str]:
        still = int((~self.vector.touched).sum())
        if still and self.history:
            yield (
                f"{still} of {len(self.start)} coefficients have no influence on what is measured and stayed at the"
                f" start, {self.settings.start:.4g}"
            )


def _endless(batches: Iterable[Batch], task: str, skip: int) -> Iterator[Batch]:
    """``batches`` again and again, from the one that is due after ``skip`` steps."""
    kept = list(batches)
    if not kept:
        raise InputError("no inputs", key=task, remedy="Give at least one batch")
    at = skip
    while True:
        yield kept[at % len(kept)]
        at += 1
