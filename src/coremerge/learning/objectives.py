"""What coefficients are learned from: an objective turns unlabelled inputs of one task into one number, to be small."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from coremerge.errors import ConfigError, InputError, UnsupportedError
from coremerge.learning.backbone import Batch, token_mask
from coremerge.learning.forward import OTHER_WAY, WITHOUT_EXPERTS, Coefficients, MergedModel, Target, Watch
from coremerge.learning.ratio import mean_over, ratio_to_basis, row_basis, sum_over


class Objective(Protocol):
    """What is minimised."""

    def __call__(self, task: str, batch: Batch, coefficients: Coefficients) -> AbstractContextManager[Tensor]:
        """The objective of ``task``'s inputs, inside whose context its gradient can be taken."""
        ...


class NullSpace:
    """The null-space ratio of the task's own adapter in the merged model, averaged over target modules and tokens.

    Args:
        merged: the model.
        measured: adapter → names of its modules that count.
        own: take the distance to the ratio that the adapter reaches alone, instead of the ratio itself. A batch must
            then stay as it is between calls.

    Source: Null-Space Compression merging (CVPR 2026); ``own`` is ours.
    """

    def __init__(self, merged: MergedModel, measured: Mapping[str, Collection[str]], *, own: bool = False) -> None:
        self.merged, self.own = merged, own
        self._bases = {
            name: {
                key: row_basis(target.right_of(key)).float() for key in target.adapters if name in measured.get(key, ())
            }
            for name, target in merged.targets.items()
        }
        self._goals: dict[tuple[str, int], tuple[Batch, Mapping[str, Tensor]]] = {}

    @contextmanager
    def __call__(self, task: str, batch: Batch, coefficients: Coefficients) -> Iterator[Tensor]:
        """See :class:`Objective`."""
        goal = self._goal(task, batch) if self.own else {}
        with self.merged.run(batch, coefficients, self.watch(task, batch)) as run:
            found = {name: ratio for name, ratio in run.found.items() if not self.own or name in goal}
            yield _mean((abs(ratio - goal[name]) if goal else ratio for name, ratio in found.items()), task)

    def _goal(self, task: str, batch: Batch) -> Mapping[str, Tensor]:
        """The ratios of the task's adapter alone: the same each time, so taken once a batch."""
        key = task, id(batch)
        if key not in self._goals:
            with torch.no_grad(), self.merged.run(batch, alone(task), self.watch(task, batch)) as run:
                self._goals[key] = batch, run.found  # with the batch, so that no other comes to have its id
        return self._goals[key][1]

    def watch(self, task: str, batch: Batch) -> Watch:
        """The mean ratio at each module."""

        def ratio(target: Target, x: Tensor) -> Tensor | None:
            basis = self._bases.get(target.name, {}).get(task)
            return None if basis is None else mean_over(ratio_to_basis(x, basis.to(x.device)), token_mask(batch, x))

        return ratio


class Match:
    """How far a module's input in the merged model is from that in the model with the task's adapter alone.

    ‖z_merged − z_own‖² / ‖z_own‖², sums over tokens, averaged over target modules and the last hidden states (which the
    last modules act on): zero at best, so there is nothing to inflate. Costs a second forward pass, without gradient.

    Args:
        merged: the model.
        measured: names of the target modules that count.
    """

    def __init__(self, merged: MergedModel, measured: Collection[str]) -> None:
        self.merged, self._measured = merged, frozenset(measured)

    @contextmanager
    def __call__(self, task: str, batch: Batch, coefficients: Coefficients) -> Iterator[Tensor]:
        """See :class:`Objective`."""

        def keep(target: Target, x: Tensor) -> Tensor | None:
            return x if target.name in self._measured else None

        with torch.no_grad(), self.merged.run(batch, alone(task), keep) as run:
            own, end = run.found, run.hidden

        def distance(target: Target, x: Tensor) -> Tensor | None:
            goal = own.get(target.name)
            if goal is not None and goal.shape != x.shape:
                raise UnsupportedError(OTHER_WAY, key=target.name, remedy=WITHOUT_EXPERTS)
            return None if goal is None else _distance(x, goal, token_mask(batch, x))

        with self.merged.run(batch, coefficients, distance) as run:
            last = [] if end is None or run.hidden is None else [_distance(run.hidden, end, token_mask(batch, end))]
            yield _mean([*run.found.values(), *last], task)


def _distance(x: Tensor, goal: Tensor, mask: Tensor | None) -> Tensor:
    """‖x − goal‖² / ‖goal‖² over the tokens that count, in float32."""
    apart, whole = (sum_over(v.square().sum(-1), mask)[0] for v in (x.float() - goal.float(), goal.float()))
    return apart / whole.clamp_min(torch.finfo(whole.dtype).tiny)


class Entropy:
    """The mean entropy of the class predictions: for classification alone.

    Args:
        merged: the model.
        heads: task name → the backbone's output and the batch to logits (rows, classes).

    Source: AdaMerging, arXiv 2310.02575.
    """

    def __init__(self, merged: MergedModel, heads: Mapping[str, Callable[[Any, Batch], Tensor]]) -> None:
        if not heads:
            raise ConfigError(
                "the objective entropy needs heads",
                key="heads",
                remedy="In Python: learn_weights(..., heads={task: from output and batch to logits})",
            )
        self.merged, self._heads = merged, heads

    @contextmanager
    def __call__(self, task: str, batch: Batch, coefficients: Coefficients) -> Iterator[Tensor]:
        """See :class:`Objective`."""
        with self.merged.run(batch, coefficients) as run:
            logs = self._heads[task](run.output, batch).float().log_softmax(-1)
            yield -(logs.exp() * logs).sum(-1).mean()


def alone(task: str) -> Coefficients:
    """The adapter ``task`` with coefficient 1, the others with 0."""

    def coefficients(target: Target) -> Tensor:
        at = target.adapters.index(task) if task in target.adapters else -1
        return (target.owner == at).float()

    return coefficients


def _mean(values: Iterable[Tensor], task: str) -> Tensor:
    listed = list(values)
    if not listed:
        raise InputError(
            "the inputs reach no module that is measured", key=task,
            remedy="Measure other modules, or check that the adapter belongs to this part of the model",
        )  # fmt: skip
    first = listed[0].device
    return torch.stack([value.to(first) for value in listed]).mean()
