"""Merge weights from unlabelled inputs, by gradient: the model is run, never changed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from coremerge.adapter import Adapter
from coremerge.errors import ConfigError
from coremerge.executors import Executor, Group, shares
from coremerge.executors.local import Here
from coremerge.learning.attention import are_short
from coremerge.learning.backbone import Batch, seeded
from coremerge.learning.given import check_adapters, check_data, listed
from coremerge.learning.result import Weights
from coremerge.learning.settings import Settings, settle
from coremerge.learning.slopes import Descending, Heads, Places

Progress = Callable[[int, int, Mapping[str, float]], "bool | None"]

TOUCHED = "touched"
"""In the state of a result: which coefficients had an influence on what is measured."""


def learn_weights(
    model: nn.Module | Callable[[], nn.Module],
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
    executor: Executor | None = None,
    progress: Progress | None = None,
    **changes: Any,
) -> Weights:
    """Merge weights from a few unlabelled inputs of every task.

    The model's weights, mode and gradients are as they were afterwards.

    Args:
        model: a model of ``transformers`` (its backbone alone is run), on any device or devices; or what makes it.
        adapters: name → adapter, of any rank, alpha and type; all modules linear (or GPT-2's Conv1D).
        data: the same names → batches, as the model takes them; labels are not read. An adapter without data has
            coefficients, too, learned from the others' inputs. Gone through again and again, in the order given.
        objective: ``match`` (the default), ``nsc-own``, ``nsc`` or ``entropy``: see
            :mod:`coremerge.learning.objectives`.
        preset: a name of :data:`PRESETS`, or settings; by default the one that goes with the objective; of ``nsc``
            and ``entropy``, ``language`` where the model reads text, with an image or without, else ``vision``.
        preferences: task → its weight in the objective; 1 for those not named.
        heads: for ``entropy``: task → the backbone's output and the batch to logits.
        seed: of anything random in the model.
        autocast: run the model in this dtype (``torch.bfloat16``).
        checkpointing: trade time for memory in the backward pass.
        resume: a result to go on from: ``steps`` are then counted from its beginning.
        executor: other processes that share the tasks, each with a model of its own, such as
            :class:`coremerge.executors.ray.Ray`.
        progress: called after each step with the steps done, their number, and each task's objective; where it returns
            False, that was the last step.
        changes: settings by name, in place of the preset's.

    Raises:
        ConfigError: an unknown setting, task or objective; no module is measured.
        InputError: a task without inputs; what is no adapter, or no batch; the model stops on one with an exception of
            its own, which is the cause.
        MismatchError: the model lacks a module, or has it in another shape.
        UnsupportedError: a module that cannot be hooked.
    """
    check_adapters(adapters)
    check_data(data)
    check_names("data", data, adapters)
    batches = {task: listed(found, task) for task, found in data.items()}
    language = any("input_ids" in batch for found in batches.values() for batch in found)
    settings = settle(objective, preset, changes, len(adapters), language=language)
    tasks = _tasks(adapters, data, preferences or {}, heads if settings.objective == "entropy" else None)
    given = [(task, batches[task]) for task in tasks]
    whole = sum(tasks.values())
    opening = Descending(
        model,
        adapters,
        settings,
        heads or {},
        {task: weight / whole for task, weight in tasks.items()},
        seed,
        autocast,
        checkpointing,
        are_short(batch for found in batches.values() for batch in found),
    )
    with seeded(seed), closing(_group(opening, given, executor)) as group:
        run = _Descent(group, settings, tuple(tasks))
        if resume is not None:
            run.take_up(resume)
        run.descend(progress)
    return run.result(seed)


def _group(opening: Descending, given: Sequence[tuple[str, Sequence[Batch]]], executor: Executor | None) -> Group:
    """The tasks: here, or shared out among models that an executor has room for."""
    return executor.hold(opening, shares(given, executor.replicas)) if executor else Here(opening(given))


def check_names(key: str, named: Iterable[str], adapters: Iterable[str]) -> None:
    """Whether all that is ``named`` are adapters.

    Raises:
        ConfigError: one is not.
    """
    known = list(adapters)
    for name in named:
        if name not in known:
            raise ConfigError("no adapter of that name", key=key, value=name, remedy=f"Adapters: {', '.join(known)}")


def _tasks(
    adapters: Mapping[str, Adapter],
    data: Mapping[str, Iterable[Batch]],
    preferences: Mapping[str, float],
    heads: Heads | None,
) -> dict[str, float]:
    """Each task that has data, in the adapters' order, with its weight in the objective."""
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


class _Descent:
    """The optimiser's way down."""

    def __init__(self, group: Group, settings: Settings, tasks: tuple[str, ...]) -> None:
        self.group, self.settings, self.tasks = group, settings, tasks
        owners, *_ = group.ask("owners")
        self.places = Places(owners, settings.per)
        self.values = nn.Parameter(torch.full((self.places.count,), float(settings.start or 0.0)))
        self.touched = torch.zeros(self.places.count, dtype=torch.bool)
        self.optimizer = torch.optim.AdamW([self.values], lr=settings.rate, weight_decay=settings.decay)
        self.start = self.values.detach().clone()
        self.path = [self.start]
        self.history: list[list[float]] = []

    def take_up(self, before: Weights) -> None:
        """Go on from ``before``."""
        if before.path.shape[-1] != len(self.start) or before.tasks != self.tasks:
            raise ConfigError("belongs to other adapters, tasks or modules", key="resume")
        self.path, self.history = list(before.path), before.objective.tolist()
        self.values.data.copy_(before.path[-1])
        self.start = before.path[0]
        state = {key: before.state[key].clone() for key in ("step", "exp_avg", "exp_avg_sq")}
        self.optimizer.state[self.values] = state
        self.touched = before.state.get(TOUCHED, state["exp_avg_sq"] != 0).clone()

    def descend(self, progress: Progress | None) -> None:
        """Steps until the last one, or until it stops paying."""
        while len(self.history) < self.settings.steps and not self._stalled():
            found = self.group.ask("slopes", self.values.detach(), len(self.history))
            slopes = [one for listed in found for one in listed]
            losses = {task: loss for task, loss, _ in slopes}
            self.history.append(list(losses.values()))
            self._step(torch.stack([slope for _, _, slope in slopes]))
            if progress and progress(len(self.history), self.settings.steps, losses) is False:
                return

    def _step(self, slopes: Tensor) -> None:
        """One along the sum of the tasks' ``slopes`` (tasks, coefficients)."""
        values, settings = self.values, self.settings
        self.touched |= (slopes != 0).any(0)
        values.grad = reduce(torch.add, slopes)  # in the tasks' order, whoever worked them out
        values.grad += 2 * settings.pull * (values.detach() - self.start) / len(values)
        self.optimizer.step()
        values.data = torch.where(self.touched, values.data, self.start)  # nothing is known of these: no decay either
        if settings.fixed_total:
            self._hold_total()
        if settings.bounds is not None:
            values.data.clamp_(*settings.bounds)
        self.path.append(values.detach().clone())

    def _hold_total(self) -> None:
        """Shift the coefficients of each module, or all where modules share them, back to the mean they started at."""
        for group in self.places.groups():
            self.values.data[group] += self.start[group].mean() - self.values.data[group].mean()

    def _stalled(self) -> bool:
        patience = self.settings.patience
        if patience is None or len(self.history) <= 2 * patience:
            return False
        means = [sum(row) for row in self.history]
        window = [sum(means[i : i + patience]) for i in range(len(means) - patience + 1)]
        return window[-1] >= min(window[:-patience])

    def result(self, seed: int) -> Weights:
        """What was learned."""
        state = {key: value.detach().clone() for key, value in self.optimizer.state.get(self.values, {}).items()}
        state |= {TOUCHED: self.touched.clone()} if state else {}
        return Weights(
            self.places.table(self.values.detach()),
            {**asdict(self.settings), "seed": seed},
            self.tasks,
            torch.tensor(self.history).reshape(len(self.history), len(self.tasks)),
            torch.stack(self.path),
            state,
            tuple(self._notes()),
        )

    def _notes(self) -> Iterator[str]:
        stayed = self.values.detach() == self.start
        yield from self._note(~self.touched & stayed, f"stayed at the start, {float(self.start[0]):.4g}")
        yield from self._note(~self.touched & ~stayed, "moved only as bounds or the fixed total ask")

    def _note(self, which: Tensor, did: str) -> Iterator[str]:
        if self.history and bool(which.any()):
            count = f"{int(which.sum())} of {len(which)} coefficients"
            yield f"{count} have no influence on what is measured and {did}: {self.places.named(which)}"
