"""A model run block by block: finished blocks are not run again, as what they gave is put in their place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from coremerge.learning.backbone import Batch, backbone_output, put_back
from coremerge.learning.blocks import block_of
from coremerge.learning.forward import Target
from coremerge.lowrank import LowRank

Watch = Callable[[str, Tensor, Tensor, Tensor], None]
"""Called with a target's name, its input (..., n), its own output (..., m), and that with its update."""

Updates = Mapping[str, LowRank]
"""Target name → the update that it carries; a target that is not listed carries none."""

TAIL = 2
"""Blocks at the end of a stack whose outputs are kept: what comes next may take the last but one, as LLaVA does."""

TOLERANCE = 1e-3
"""Of a block's output, relative: whether it is the same when it runs behind blocks that are put in place."""


@dataclass(frozen=True)
class Segment:
    """A part of the model that is run by itself.

    Attributes:
        stages: names of targets that share an input, in the order in which they run.
        block: its path, or empty: the whole model, of which nothing is kept.
        stack: the path of the list that the block is in.
    """

    stages: tuple[tuple[str, ...], ...]
    block: str = ""
    stack: str = ""


@dataclass
class _Calls:
    """What ran in a pass, in order.

    Attributes:
        blocks: paths of blocks.
        targets: names.
        inputs: a mark of each target's input: targets of a block whose marks are equal share theirs.
        outputs: a mark of what each block gave.
    """

    blocks: list[str] = field(default_factory=list)
    targets: list[str] = field(default_factory=list)
    inputs: dict[str, object] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)


class _DoneError(Exception):
    pass


class Stream:
    """A model and the order in which its blocks and targets run.

    Args:
        model: see :func:`~coremerge.learning.backbone.backbone_output`; in evaluation mode.
        targets: name → target.
        sample: a batch, from which the order is seen; targets that it does not reach are left out.

    Attributes:
        segments: one after the other, they make a pass. A block that runs more than once, or otherwise behind stored
            states than in a whole pass, is not cut out: its targets have whole passes of their own.
        apart: stacks of which that is so.
        open: stacks that are run again once they are finished, as others take more from them than their end.
    """

    def __init__(self, model: nn.Module, targets: Mapping[str, Target], sample: Batch) -> None:
        self.model, self.targets = model, targets
        self._blocks = dict(_blocks(model))
        calls = self._trial(sample)
        self.repeated = frozenset(name for name in calls.targets if calls.targets.count(name) > 1)
        twice = {self._blocks[path] for path in calls.blocks if calls.blocks.count(path) > 1}
        self._order = [path for path in calls.blocks if self._blocks[path] not in twice]
        self.open: set[str] = set()
        self.apart = tuple(sorted(twice | self._not_replayed(sample, calls)))
        self._order = [path for path in self._order if self._blocks[path] not in self.apart]
        self.segments = tuple(self._segments(calls))

    def run(
        self,
        batch: Batch,
        at: int,
        states: Mapping[str, Any],
        updates: Updates,
        watch: Watch,
        *,
        until: Sequence[str] = (),
    ) -> Any:
        """One segment of a pass, with ``updates`` in it.

        Args:
            batch: the inputs.
            at: which segment.
            states: block → what it gave, of the last :data:`TAIL` finished blocks of each stack.
            updates: see :data:`Updates`.
            watch: called at every target of the segment.
            until: targets after which nothing more needs to run; by default all of the segment does.

        Returns:
            what the segment's block gave; None if it was stopped before, or is no block.
        """
        segment = self.segments[at]
        with ExitStack() as undo:
            self._replay(undo, self.finished(at), states)
            for target in self.targets.values():
                undo.callback(target.module.register_forward_hook(_adding(target, updates, watch)).remove)
            if until and not self.repeated & set(until):
                self._stop_after(undo, until)
            elif segment.block:
                block = self.model.get_submodule(segment.block)
                undo.callback(block.register_forward_hook(_give).remove)
            try:
                backbone_output(self.model, batch)
            except _DoneError as done:
                return done.args[0] if done.args else None
        return None

    def finished(self, at: int) -> list[str]:
        """Blocks that a segment does not run again."""
        before = (segment for segment in self.segments[:at] if segment.block)
        return [s.block for s in before if s.stack not in self.open or s.stack == self.segments[at].stack]

    def running(self, at: int) -> list[str]:
        """Targets that may run with a segment."""
        blocks = set(self.finished(at))
        return [name for name, target in self.targets.items() if self._block(target) not in blocks]

    def tail(self, at: int) -> list[str]:
        """Blocks whose outputs are needed after a segment."""
        stacks: dict[str, list[str]] = {}
        for segment in self.segments[: at + 1]:
            if segment.block:
                stacks.setdefault(segment.stack, []).append(segment.block)
        return [block for blocks in stacks.values() for block in blocks[-TAIL:]]

    def _block(self, target: Target) -> str:
        place = block_of(self.model, target.path)
        return f"{place[0]}.{place[1]}" if place else ""

    def _replay(self, undo: ExitStack, finished: Sequence[str], states: Mapping[str, Any]) -> None:
        last = {self._blocks[path]: path for path in finished}
        for path in finished:
            kept = path if path in states else last[self._blocks[path]]
            if kept in states:  # else these inputs do not run the stack
                block = self.model.get_submodule(path)
                undo.callback(put_back, block, "forward", vars(block).get("forward"))
                block.forward = _giving(states[kept])

    def _stop_after(self, undo: ExitStack, until: Sequence[str]) -> None:
        left = set(until)

        def hook(name: str) -> Callable[..., None]:
            def done(module: nn.Module, args: Any, output: Any) -> None:
                left.discard(name)
                if not left:
                    raise _DoneError

            return done

        for name in until:
            undo.callback(self.targets[name].module.register_forward_hook(hook(name)).remove)

    def _trial(self, sample: Batch) -> _Calls:
        """A pass of the model as it is."""
        calls = _Calls()
        held: list[Tensor] = []

        def enter(path: str) -> Callable[..., None]:
            def note(module: nn.Module, args: Any) -> None:
                calls.blocks.append(path)
                held.clear()  # marks are compared within a block: only there must an input live on

            return note

        def leave(path: str) -> Callable[..., None]:
            return lambda module, args, output: calls.outputs.update({path: _mark(output)})

        def at(name: str) -> Callable[..., None]:
            def note(module: nn.Module, args: Any, output: Any) -> None:
                calls.targets.append(name)
                held.append(args[0])
                x = args[0]
                calls.inputs.setdefault(name, (len(calls.blocks), x.data_ptr(), x.shape, x.stride(), x._version))

            return note

        with ExitStack() as undo:
            for path in self._blocks:
                block = self.model.get_submodule(path)
                undo.callback(block.register_forward_pre_hook(enter(path)).remove)
                undo.callback(block.register_forward_hook(leave(path)).remove)
            for name, target in self.targets.items():
                undo.callback(target.module.register_forward_hook(at(name)).remove)
            backbone_output(self.model, sample)
        return calls

    def _not_replayed(self, sample: Batch, calls: _Calls) -> set[str]:
        """Stacks with a block that gives something else behind stored states than in a whole pass."""
        wrong: set[str] = set()
        states: dict[str, Any] = {}
        for at, path in enumerate(self._order):
            stack, done = self._blocks[path], self._order[:at]
            if stack in wrong:
                continue
            others = {self._blocks[p] for p in done} - {stack}
            for opened in (self.open, self.open | others):
                behind = [p for p in done if self._blocks[p] == stack or self._blocks[p] not in wrong | opened]
                states[path] = self._behind(behind, path, sample, states)
                if _same(_mark(states[path]), calls.outputs[path]):
                    self.open = opened
                    break
            else:
                wrong.add(stack)
            for old in [p for p in done if self._blocks[p] == stack][: 1 - TAIL]:
                states.pop(old, None)
        return wrong

    def _behind(self, finished: Sequence[str], path: str, sample: Batch, states: Mapping[str, Any]) -> Any:
        """What a block gives behind stored states."""
        with ExitStack() as undo:
            self._replay(undo, finished, states)
            undo.callback(self.model.get_submodule(path).register_forward_hook(_give).remove)
            try:
                backbone_output(self.model, sample)
            except _DoneError as done:
                return done.args[0]
        return None

    def _segments(self, calls: _Calls) -> Iterator[Segment]:
        """In the order in which they begin."""
        kept = set(self._order)
        inside: dict[str, list[str]] = {path: [] for path in self._order}
        loose: list[tuple[int, Segment]] = []
        first = {path: i for i, path in enumerate(self._order)}
        for name in dict.fromkeys(calls.targets):
            path = self._block(self.targets[name])
            if path in kept:
                inside[path].append(name)
            else:
                loose.append((self._blocks_before(calls, name, first), Segment(((name,),))))
        for i, path in enumerate(self._order):
            yield from (segment for before, segment in loose if before == i)
            yield Segment(_stages(inside[path], calls), path, self._blocks[path])
        yield from (segment for before, segment in loose if before == len(self._order))

    def _blocks_before(self, calls: _Calls, name: str, first: Mapping[str, int]) -> int:
        ran = calls.blocks[: calls.inputs[name][0]]  # type: ignore[index]
        return sum(path in first for path in ran)


def _blocks(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Path and stack of the blocks: the members of the outermost lists of modules."""
    for name, child in model.named_children():
        path = f"{prefix}{name}"
        if isinstance(child, nn.ModuleList):
            yield from ((f"{path}.{i}", path) for i in range(len(child)))
        else:
            yield from _blocks(child, f"{path}.")


def _stages(names: Sequence[str], calls: _Calls) -> tuple[tuple[str, ...], ...]:
    groups: dict[object, list[str]] = {}
    for name in names:
        groups.setdefault(calls.inputs[name], []).append(name)
    return tuple(tuple(group) for group in groups.values())


def _give(module: nn.Module, args: Any, output: Any) -> None:
    raise _DoneError(output)


def _giving(output: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: output


def _adding(target: Target, updates: Updates, watch: Watch) -> Callable[..., Any]:
    def add(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x, update = args[0], updates.get(target.name)
        result = output if update is None else output + ((x @ update.right.mT) @ update.left.mT).to(output)
        watch(target.name, x, output, result)
        return result

    return add


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(one, other, rtol=TOLERANCE, atol=0)


def _mark(output: Any) -> Tensor:
    """Norms of what a block gave."""
    if isinstance(output, Tensor):
        return output.double().norm().reshape(1) if output.is_floating_point() else torch.zeros(0)
    parts = output.values() if isinstance(output, Mapping) else output if isinstance(output, (tuple, list)) else ()
    return torch.cat([torch.zeros(0, dtype=torch.float64), *(_mark(part).double().cpu() for part in parts)])
