"""Distillation: the cores trained by gradient to give each task's own outputs on the same inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from coremerge import Adapter, Recipe, merge
from coremerge.learning.backbone import Batch, backbone_output, frozen, token_mask
from coremerge.learning.forward import MergedModel
from coremerge.learning.objectives import alone
from coremerge.lowrank import LowRank

STEPS, RATE = 120, 3e-3


def distilled(model: nn.Module, adapters: Mapping[str, Adapter], data: Mapping[str, Sequence[Batch]]) -> Adapter:
    """The adapter with the nearest last hidden states; from the isotropized sum, one batch of every task a step."""
    bases, start = _start(adapters)
    with frozen(model):
        goals = _goals(model, adapters, data)
        cores = _trained(model, bases, start, data, goals)
    return Adapter.from_updates(
        {name: LowRank(left.double(), (cores[name] @ right).double()) for name, (left, right) in bases.items()}
    )


Bases = Mapping[str, tuple[Tensor, Tensor]]
"""Module → U (m, p), Vᵀ (q, n)."""


def _start(adapters: Mapping[str, Adapter]) -> tuple[Bases, dict[str, Tensor]]:
    prior = merge(adapters, Recipe(method="sum", steps=["isotropize"], dtype="float64")).adapter
    bases, start = {}, {}
    for name in prior:
        held = [adapter[name] for adapter in adapters.values() if name in adapter]
        left = torch.linalg.qr(torch.cat([u.left for u in held], -1)).Q
        right = torch.linalg.qr(torch.cat([u.right for u in held]).mT).Q.mT
        bases[name] = left.float(), right.float()
        start[name] = ((left.mT @ prior[name].left) @ (prior[name].right @ right.mT)).float()
    return bases, start


def _goals(
    model: nn.Module, adapters: Mapping[str, Adapter], data: Mapping[str, Sequence[Batch]]
) -> dict[str, list[Tensor]]:
    merged = MergedModel(model, adapters)

    def goal(task: str, batch: Batch) -> Tensor:
        with torch.no_grad(), merged.run(batch, alone(task)) as run:
            assert run.hidden is not None
            return run.hidden

    return {task: [goal(task, batch) for batch in listed] for task, listed in data.items()}


def _trained(
    model: nn.Module,
    bases: Bases,
    start: Mapping[str, Tensor],
    data: Mapping[str, Sequence[Batch]],
    goals: Mapping[str, Sequence[Tensor]],
) -> dict[str, Tensor]:
    cores = {name: nn.Parameter(core.clone()) for name, core in start.items()}
    optimizer = torch.optim.AdamW(cores.values(), lr=RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, STEPS)
    with torch.enable_grad(), _carried(model, bases, cores):
        for step in range(STEPS):
            for task, listed in data.items():
                at = step % len(listed)
                loss = _distance(model, listed[at], goals[task][at]) / len(data)
                loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    return {name: core.detach() for name, core in cores.items()}


def _distance(model: nn.Module, batch: Batch, goal: Tensor) -> Tensor:
    hidden: Tensor = backbone_output(model, batch).last_hidden_state
    mask = token_mask(batch, hidden)
    assert mask is not None
    counts = mask.unsqueeze(-1)
    return ((hidden - goal).square() * counts).sum() / (goal.square() * counts).sum()


@contextmanager
def _carried(model: nn.Module, bases: Bases, cores: Mapping[str, Tensor]) -> Iterator[None]:
    def hook(name: str) -> Callable[..., Tensor]:
        left, right = bases[name]
        return lambda module, args, output: output + args[0] @ right.mT @ cores[name].mT @ left.mT

    with ExitStack() as undo:
        for name in bases:
            undo.callback(model.get_submodule(name).register_forward_hook(hook(name)).remove)
        yield
