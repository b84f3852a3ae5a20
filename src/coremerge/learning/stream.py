"""A model run block by block: finished blocks are not run again, as what they gave is put in their place."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from coremerge.learning.backbone import Batch, PassEndError, StoppedError, backbone_output, inputs_of, put_back
from coremerge.learning.forward import Target
from coremerge.learning.states import mapped
from coremerge.lowrank import LowRank

Watch = Callable[[str, Tensor, Tensor, Tensor], None]
"""Called with a target's name, its input (..., n), its own output (..., m), and that with its update."""

Given = tuple[Any, Mapping[Any, Mapping[Any, Any]]]
"""What a block gave: its output; and argument → key → value, what it left in mappings that it was handed, where later
blocks find it (as Gemma 4's keys and values)."""

Updates = Mapping[str, LowRank]
"""Target name → the update that it carries; a target that is not listed carries none."""

TAIL = 2
"""Blocks at the end of a stack whose outputs are kept: what comes next may take the last but one, as LLaVA does."""

TOLERANCE = 1e-2
"""Relative: whether a block gives the same when it runs behind blocks that are put in place. Rounding in bfloat16 is
two parts in a thousand, a block that misses something differs by much more."""

SKETCH = 8
"""Random directions along which outputs are compared: norms alone say nothing of what a LayerNorm gives."""


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
        inside: the block that runs, if one does.
        targets: names.
        inputs: a mark of each target's input: targets of a block whose marks are equal share theirs.
        places: the blocks that each target ran in; an empty path: outside of any.
        seen: target → blocks that ran before, and a sketch of its input.
        outputs: a sketch of what each block gave.
        leaving: paths of blocks that left something in mappings that they were handed.
    """

    blocks: list[str] = field(default_factory=list)
    inside: str = ""
    targets: list[str] = field(default_factory=list)
    inputs: dict[str, object] = field(default_factory=dict)
    places: dict[str, set[str]] = field(default_factory=dict)
    seen: dict[str, tuple[int, Tensor]] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)
    leaving: set[str] = field(default_factory=set)


class _DoneError(PassEndError):
    pass


class Stream:
    """A model and the order in which its blocks and targets run.

    Args:
        model: see :func:`~coremerge.learning.backbone.backbone_output`; in evaluation mode.
        targets: name → target.
        samples: tasks and a batch each; from them the order is seen, and targets that none reaches are left out.

    Attributes:
        segments: one after the other, they make a pass. A block that runs more than once, or otherwise behind stored
            states than in a whole pass, is not cut out: its targets have whole passes of their own. So do those of
            blocks that share a target, or behind which another one's input would be different.
        apart: stacks of which that is so.
        open: stacks that are run again once they are finished, as others take more from them than their end.
    """

    def __init__(self, model: nn.Module, targets: Mapping[str, Target], samples: Sequence[tuple[str, Batch]]) -> None:
        self.model, self.targets = model, targets
        self._blocks = dict(_blocks(model))
        self._places = {name: self._block(target) for name, target in targets.items()}
        trials = [self._trial(task, sample) for task, sample in samples]
        self.repeated = frozenset(name for calls in trials for name in _twice(calls.targets))
        self._leaving = frozenset[str]().union(*(calls.leaving for calls in trials))
        self.open: set[str] = set()
        self._kept = frozenset[str]()  # blocks whose outputs other stacks take, as of the middle of a vision tower
        wrong = {self._blocks[path] for calls in trials for path in _twice(calls.blocks)}
        shared = (places for calls in trials for places in calls.places.values() if len(places) > 1)
        wrong |= {self._blocks[path] for places in shared for path in places if path}
        for (_, sample), calls in zip(samples, trials, strict=True):
            wrong |= self._not_replayed(sample, calls, wrong)
        self.apart = tuple(sorted(wrong))
        self.segments = _joined([list(self._segments(calls)) for calls in trials])

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
            states: block → what it gave (:data:`Given`), of the finished blocks that :meth:`tail` names.
            updates: see :data:`Updates`.
            watch: called at every target of the segment.
            until: targets after which nothing more needs to run; by default all of the segment does.

        Returns:
            what the segment's block gave; None if it was stopped before, or is no block.
        """
        segment = self.segments[at]
        with ExitStack() as undo:
            self._replay(undo, self.finished(at), states)
            for name in self.running(at):
                target = self.targets[name]
                undo.callback(target.module.register_forward_hook(_adding(target, updates, watch)).remove)
            if until and not self.repeated & set(until):
                self._stop_after(undo, until)
            elif segment.block:
                self._stop_at(undo, segment.block)
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
        """Targets that may run with a segment: a pass ends with the segment's block, so none of the stack's others."""
        segment = self.segments[at]
        blocks = {
            *self.finished(at),
            *(one.block for one in self.segments if segment.block and one.stack == segment.stack),
        }
        return [name for name, block in self._places.items() if block == segment.block or block not in blocks]

    def tail(self, at: int) -> list[str]:
        """Blocks whose outputs are needed after a segment."""
        return self._at_hand([segment.block for segment in self.segments[: at + 1] if segment.block], self._kept)

    def _needed(self, blocks: Sequence[str], kept: Collection[str]) -> list[str]:
        """Of a stack's finished blocks, those from whose outputs the others' can be told, or whose later ones need."""
        asked = self._leaving.union(kept)
        return [block for i, block in enumerate(blocks) if i >= len(blocks) - TAIL or block in asked]

    def _block(self, target: Target) -> str:
        """The block that a target is in, or nothing."""
        return next((path for path in self._blocks if f"{target.path}.".startswith(f"{path}.")), "")

    def _replay(self, undo: ExitStack, finished: Sequence[str], states: Mapping[str, Any]) -> None:
        last = {self._blocks[path]: path for path in finished}
        for path in finished:
            kept = path if path in states else last[self._blocks[path]]
            if kept in states:  # else these inputs do not run the stack
                block = self.model.get_submodule(path)
                undo.callback(put_back, block, "forward", vars(block).get("forward"))
                block.forward = _giving(*states[kept])

    def _stop_at(self, undo: ExitStack, path: str) -> None:
        """End the pass with what a block gives."""

        def give(output: Any, left: Mapping[Any, Mapping[Any, Any]]) -> None:
            raise _DoneError((output, left))

        _noting(undo, self.model.get_submodule(path), give)

    def _stop_before(self, undo: ExitStack, name: str) -> None:
        """End the pass with a target's input."""

        def give(module: nn.Module, args: Any) -> None:
            raise _DoneError((args[0], {}))

        undo.callback(self.targets[name].module.register_forward_pre_hook(give).remove)

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

    def _trial(self, task: str, sample: Batch) -> _Calls:
        """A pass of the model as it is."""
        calls = _Calls()
        held: list[Tensor] = []

        def enter(path: str) -> Callable[..., None]:
            def note(module: nn.Module, args: Any) -> None:
                calls.blocks.append(path)
                calls.inside = path
                held.clear()  # marks are compared within a block: only there must an input live on

            return note

        def leave(path: str) -> Callable[..., None]:
            def note(output: Any, left: Mapping[Any, Mapping[Any, Any]]) -> None:
                calls.outputs[path] = _sketch(output)
                calls.inside = ""
                calls.leaving |= {path} if left else set()

            return note

        def at(name: str) -> Callable[..., None]:
            def note(module: nn.Module, args: Any, output: Any) -> None:
                calls.targets.append(name)
                calls.places.setdefault(name, set()).add(calls.inside)
                if not calls.inside:
                    calls.seen.setdefault(name, (len(calls.blocks), _sketch(args[0])))
                held.append(args[0])
                x = args[0]
                calls.inputs.setdefault(name, (len(calls.blocks), x.data_ptr(), x.shape, x.stride(), x._version))

            return note

        with ExitStack() as undo:
            for path in self._blocks:
                block = self.model.get_submodule(path)
                undo.callback(block.register_forward_pre_hook(enter(path)).remove)
                _noting(undo, block, leave(path))
            for name, target in self.targets.items():
                undo.callback(target.module.register_forward_hook(at(name)).remove)
            undo.enter_context(inputs_of(task))
            backbone_output(self.model, sample)
        return calls

    def _not_replayed(self, sample: Batch, calls: _Calls, apart: Iterable[str]) -> set[str]:
        """Stacks with a block that gives something else behind stored states than in a whole pass; ``apart`` run so.

        And those behind which a target outside of them has another input.
        """
        wrong = set(apart)
        states: dict[str, Given] = {}
        order = [path for path in calls.blocks if self._blocks[path] not in wrong]
        for at, path in enumerate(order):
            stack = self._blocks[path]
            if stack in wrong:
                continue
            done = [p for p in order[:at] if self._blocks[p] not in wrong]
            stop, wanted = partial(self._stop_at, path=path), calls.outputs[path]
            given = self._same_behind(done, stack, sample, states, stop=stop, wanted=wanted)
            if given is None:
                wrong.add(stack)
            else:
                states[path] = given
        for name, (before, seen) in calls.seen.items():
            done = [p for p in calls.blocks[:before] if self._blocks[p] not in wrong]
            stop = partial(self._stop_before, name=name)
            if done and self._same_behind(done, "", sample, states, stop=stop, wanted=seen) is None:
                wrong |= {self._blocks[p] for p in done}
        return wrong

    def _same_behind(
        self,
        done: Sequence[str],
        stack: str,
        sample: Batch,
        states: Mapping[str, Given],
        *,
        stop: Callable[[ExitStack], None],
        wanted: Tensor,
    ) -> Given | None:
        """What a pass that ends at ``stop`` gives behind blocks that are ``done``, if it is what is ``wanted``.

        Stacks are opened and blocks kept until it is.
        """
        for opened, kept in self._arrangements(stack, done):
            behind = [p for p in done if self._blocks[p] == stack or self._blocks[p] not in opened]
            given = self._behind(behind, sample, {p: states[p] for p in self._at_hand(behind, kept)}, stop)
            if given and _same(_sketch(given[0]), wanted):
                self.open, self._kept = opened, kept
                return given
        return None

    def _arrangements(self, stack: str, done: Sequence[str]) -> Iterator[tuple[set[str], frozenset[str]]]:
        """Other stacks that are open and blocks that are kept: as so far, with one block more, with all, or opened."""
        others = [path for path in done if self._blocks[path] not in {stack, *self.open}]
        yield self.open, self._kept
        yield from ((self.open, self._kept | {path}) for path in reversed(others))
        yield self.open, self._kept.union(others)
        yield self.open | {self._blocks[path] for path in done} - {stack}, self._kept

    def _at_hand(self, finished: Sequence[str], kept: Collection[str]) -> list[str]:
        """Of the finished blocks of all stacks, those whose outputs are kept."""
        stacks: dict[str, list[str]] = {}
        for path in finished:
            stacks.setdefault(self._blocks[path], []).append(path)
        return [path for blocks in stacks.values() for path in self._needed(blocks, kept)]

    def _behind(
        self, finished: Sequence[str], sample: Batch, states: Mapping[str, Given], stop: Callable[[ExitStack], None]
    ) -> Given | None:
        """What a pass gives behind stored states where it is stopped; None: it does not come there."""
        with ExitStack() as undo:
            self._replay(undo, finished, states)
            stop(undo)
            try:
                backbone_output(self.model, sample)
            except _DoneError as done:
                given: Given = done.args[0]
                return given
            except StoppedError:  # it asks for more than outputs, as it runs in a whole pass
                return None
        return None

    def _segments(self, calls: _Calls) -> Iterator[Segment]:
        """In the order in which they begin."""
        order = [path for path in calls.blocks if self._blocks[path] not in self.apart]
        inside: dict[str, list[str]] = {path: [] for path in order}
        loose: list[tuple[int, Segment]] = []
        for name in dict.fromkeys(calls.targets):
            path = self._places[name]
            if path in inside:
                inside[path].append(name)
            else:
                ran = calls.blocks[: calls.inputs[name][0]]  # type: ignore[index]
                loose.append((sum(path in inside for path in ran), Segment(((name,),))))
        for i, path in enumerate(order):
            yield from (segment for before, segment in loose if before == i)
            yield Segment(_stages(inside[path], calls), path, self._blocks[path])
        yield from (segment for before, segment in loose if before == len(order))


def _joined(listed: Sequence[list[Segment]]) -> tuple[Segment, ...]:
    """Those of several samples as one row: what only a later sample runs comes before what it leads to there."""
    found: list[Segment] = []
    for more in listed:
        at = len(found)
        for segment in reversed(more):
            keys = [one.block or one.stages for one in found]
            key = segment.block or segment.stages
            if key in keys:
                at = keys.index(key)
                found[at] = _both(found[at], segment)
            else:
                found.insert(at, segment)
    return tuple(found)


def _both(one: Segment, other: Segment) -> Segment:
    """A block with the targets that run in it for one sample and those that do so for another."""
    known = {name for stage in one.stages for name in stage}
    new = (tuple(name for name in stage if name not in known) for stage in other.stages)
    return replace(one, stages=(*one.stages, *filter(None, new)))


def _twice(names: Sequence[str]) -> set[str]:
    """Those that are there more than once."""
    return {name for name, count in Counter(names).items() if count > 1}


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


def _noting(undo: ExitStack, block: nn.Module, see: Callable[[Any, Mapping[Any, Mapping[Any, Any]]], None]) -> None:
    """``see`` what a block gives, and what it leaves in mappings (:data:`Given`)."""
    before: dict[Any, dict[Any, Any]] = {}

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        before.update({name: dict(mapping) for name, mapping in _mappings(args, kwargs)})

    def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        left = {name: _news(before[name], mapping) for name, mapping in _mappings(args, kwargs)}
        see(output, {name: news for name, news in left.items() if news})

    undo.callback(block.register_forward_pre_hook(enter, with_kwargs=True).remove)
    undo.callback(block.register_forward_hook(leave, with_kwargs=True).remove)


def _mappings(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[tuple[Any, MutableMapping[Any, Any]]]:
    """Arguments, by place or name, that a block can leave something in."""
    for name, value in (*enumerate(args), *kwargs.items()):
        if isinstance(value, MutableMapping):
            yield name, value


def _news(before: Mapping[Any, Any], after: Mapping[Any, Any]) -> dict[Any, Any]:
    return {key: value for key, value in after.items() if key not in before or before[key] is not value}


def _giving(output: Any, left: Mapping[Any, Mapping[Any, Any]]) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        for name, mapping in _mappings(args, kwargs):
            mapping.update(_fresh(left.get(name, {})))
        return _fresh(output)

    return forward


def _fresh(tree: Any) -> Any:
    """With copies of its tensors: the model may go on in place."""
    return mapped(tree, Tensor, torch.clone)


def _adding(target: Target, updates: Updates, watch: Watch) -> Callable[..., Any]:
    def add(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x, update = args[0], updates.get(target.name)
        result = output if update is None else output + ((x @ update.right.mT) @ update.left.mT).to(output)
        watch(target.name, x, output, result)
        return result

    return add


def _same(one: Tensor, other: Tensor) -> bool:
    """Two sketches, as far as rounding lets them be."""
    return one.shape == other.shape and bool(((one - other).abs() <= TOLERANCE * other[:, :1]).all())


def _sketch(output: Any) -> Tensor:
    """Of each tensor of what a block gave (tensors, 1 + SKETCH): its norm, and what it is along some directions.

    They are outer products of random signs, so that the difference of two sketches is as large as that of the tensors.
    """
    tensors: list[Tensor] = []
    mapped(output, Tensor, tensors.append)
    rows = [_sketched(one) for one in tensors if one.is_floating_point() and one.numel()]
    return torch.stack(rows) if rows else torch.zeros(0, 1 + SKETCH, dtype=torch.float64)


def _sketched(tensor: Tensor) -> Tensor:
    x = tensor.detach().double().cpu().reshape(-1, tensor.shape[-1] if tensor.ndim else 1)
    draw = torch.Generator().manual_seed(0)
    rows, columns = (torch.randint(0, 2, (SKETCH, n), generator=draw).double() * 2 - 1 for n in x.shape)
    return torch.cat([x.norm().reshape(1), ((rows @ x) * columns).sum(-1)])
