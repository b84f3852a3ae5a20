"""The inputs' side of a fit: a model, some of the tasks' inputs, and what has become of them on their way through it.

Sums over inputs add up, so any number of these, in other processes too, can share a fit's inputs; each is told the
cores that were found and runs its own inputs on.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from coremerge.errors import UnsupportedError
from coremerge.learning.backbone import Batch, frozen, inputs_of, seeded, token_mask
from coremerge.learning.beyond import Sketch, drawn
from coremerge.learning.cores import Cores
from coremerge.learning.forward import OTHER_WAY, WITHOUT_EXPERTS, MergedModel, Target
from coremerge.learning.given import moved, rows_of
from coremerge.learning.kept import mark_of_model
from coremerge.learning.leastsquares import Sums
from coremerge.learning.room import SPILL_BYTES, state_bytes
from coremerge.learning.states import States
from coremerge.learning.stream import Segment, Stream, Updates, Watch
from coremerge.lowrank import LowRank
from coremerge.plan import Plan

FOLDS = 4
"""Parts of the inputs: each is held out once, to see whether the fit is better there than its prior."""

LOTS = 4
"""Parts of a task's batches whose sums are made apart and then added, whoever makes them: the same bytes everywhere."""


Moments = dict[str, Tensor]
"""Module → second moments of its inputs."""

Sketches = dict[str, Sketch]
"""Module → what is seen of its inputs in all directions."""


@dataclass(frozen=True)
class Lot:
    """Some of a task's inputs.

    Attributes:
        task: its name.
        at: which of the task's lots.
        batches: the number of each among the task's, how many rows come before it, and itself.
    """

    task: str
    at: int
    batches: tuple[tuple[int, int, Batch], ...]

    def on(self, device: torch.device | None) -> Lot:
        """The same where the model takes them."""
        return replace(self, batches=tuple((j, rows, moved(batch, device)) for j, rows, batch in self.batches))


def lots_of(batches: Mapping[str, Sequence[Batch]]) -> list[Lot]:
    """All tasks' inputs, in at most :data:`LOTS` lots each."""
    found = []
    for task, listed in batches.items():
        rows, numbered = 0, []
        for j, batch in enumerate(listed):
            numbered.append((j, rows, batch))
            rows += rows_of(batch)
        size = -(-len(listed) // LOTS)
        found += [Lot(task, i, tuple(numbered[at : at + size])) for i, at in enumerate(range(0, len(listed), size))]
    return found


@dataclass(frozen=True)
class Layout:
    """What a fit has to know of the model.

    Attributes:
        segments: see :class:`~coremerge.learning.stream.Stream`, as are ``repeated`` and ``apart``.
        mark: what tells the model from others.
        states: where hidden states are kept: ``memory`` or ``disk``.
    """

    segments: tuple[Segment, ...]
    repeated: frozenset[str]
    apart: tuple[str, ...]
    mark: str
    states: str


@dataclass(frozen=True)
class Opening:
    """How :class:`Passes` begin, in a form that can be sent.

    Attributes:
        model: or what makes it, there.
        plan: the adapters.
        samples: tasks and an input each; from them the order of the model's parts is seen.
        spill: see :func:`~coremerge.learning.fit.fit`.
        own_inputs_do: nothing is asked of the merged model.
        beyond: directions of the inputs that are looked for outside the adapters' rows.
    """

    model: nn.Module | Callable[[], nn.Module]
    plan: Plan
    samples: Sequence[tuple[str, Batch]]
    spill: str | bool | None
    own_inputs_do: bool
    beyond: int = 0

    def __call__(self, lots: Sequence[Lot], cores: Cores | None = None) -> Passes:
        """Those of some of the inputs."""
        model = self.model if isinstance(self.model, nn.Module) else self.model()
        return Passes(model, self, lots, cores or Cores(self.plan))


class Passes:
    """A model and some inputs on their way through it.

    Args:
        model: is frozen until :meth:`close`.
        opening: what else there is to know.
        lots: the inputs.
        cores: of the adapters.

    Raises:
        CoremergeError: see :func:`~coremerge.learning.fit.fit`.
    """

    def __init__(self, model: nn.Module, opening: Opening, lots: Sequence[Lot], cores: Cores) -> None:
        self.plan, self.cores, self._own_inputs_do = opening.plan, cores, opening.own_inputs_do
        self._beyond = opening.beyond
        self._mark = mark_of_model(model)
        with ExitStack() as undo:
            undo.enter_context(frozen(model))
            undo.enter_context(seeded(self.plan.recipe.seed))
            merged = MergedModel(model, self.plan.adapters)
            self.targets = merged.targets
            device = merged.device
            self.lots = [lot.on(device) for lot in lots]
            samples = [(task, moved(sample, device)) for task, sample in opening.samples]
            self.stream = Stream(model, self.targets, samples)
            self._folder = undo.enter_context(self._place(model, opening.spill))
            self.states = States(None if self._folder is None else Path(self._folder))
            self._undo = undo.pop_all()
        self._ran: set[str] = set()
        self.begin({})

    def close(self) -> None:
        """Leave the model as it was, and nothing on the disk."""
        self._undo.close()

    def _place(self, model: nn.Module, spill: str | bool | None) -> AbstractContextManager[str | None]:
        """Where hidden states go; None: into memory."""
        if spill is None:
            itemsize = next((p.dtype.itemsize for p in model.parameters() if p.is_floating_point()), 4)
            batches = [batch for lot in self.lots for _, _, batch in lot.batches]
            spill = state_bytes(getattr(model, "config", None), self.plan, batches, itemsize) > SPILL_BYTES
        if spill is False:
            return nullcontext()
        return TemporaryDirectory(prefix="coremerge-states-", dir=None if spill is True else spill)

    def layout(self) -> Layout:
        """See :class:`Layout`."""
        stream = self.stream
        states = "memory" if self._folder is None else "disk"
        return Layout(stream.segments, stream.repeated, stream.apart, self._mark, states)

    def ran_modules(self) -> set[str]:
        """Those that an input ran."""
        return self._ran

    def begin(self, found: Mapping[str, Tensor]) -> None:
        """From the first block on, with what modules carry before they are fitted (:meth:`take`)."""
        self.states.clear()
        self._unreached: set[tuple[str, int, str]] = set()  # batches that do not run a stack, as texts a vision tower
        self.updates: dict[str, LowRank] = {}
        self.take(found)

    def widen(self, rows: Mapping[str, Tensor]) -> None:
        """Let modules of the segment that runs read more of their inputs: see :meth:`Cores.widen`."""
        self.cores.widen(rows)

    def take(self, found: Mapping[str, Tensor]) -> None:
        """The merged cores (p, q + e) of some modules."""
        for name, core in found.items():
            self.updates[name] = in_model(self.cores[name].lifted(core), self.targets[name])

    def own(self, at: int, wanted: Collection[str]) -> Iterator[tuple[str, int, tuple[Moments, Sketches]]]:
        """A pass of each task with its own adapter through a segment, in which the ``wanted`` modules are.

        What those should give is kept for :meth:`sums`.

        Returns:
            for each lot, its task and number, the moments (q, q) of each module's inputs, and a sketch of those of the
            first module of each stage.
        """
        segment = self.stream.segments[at]
        self.cores.hold({name for stage in segment.stages for name in stage})
        alone: Updates = {}
        last = None
        for lot in self.lots:
            alone, last = alone if lot.task == last else self._alone(lot.task, at), lot.task
            with inputs_of(lot.task):
                found = self._own(at, lot, alone, wanted)
            yield lot.task, lot.at, found

    def _own(self, at: int, lot: Lot, alone: Updates, wanted: Collection[str]) -> tuple[Moments, Sketches]:
        segment, moments, sketches = self.stream.segments[at], Moments(), Sketches()
        first = {stage[0] for stage in segment.stages} if self._beyond else set()
        for j, _, batch in self._reaching(lot, segment):
            goals: dict[str, list[Tensor]] = {name: [] for name in wanted}

            def watch(name: str, x: Tensor, result: Tensor) -> None:
                self._ran.add(name)
                if name in goals:  # noqa: B023
                    goals[name].append(in_basis(result, self.cores[name].left))  # noqa: B023
                    core = self.cores[name]
                    z = in_basis(x, core.right[: core.own].mT).double().cpu()
                    moments[name] = moments.get(name, 0) + z.mT @ z
                    if name in first:
                        more = Sketch.of(x, drawn(x.shape[-1], self._beyond))
                        sketches[name] = sketches[name] + more if name in sketches else more

            given = self.stream.run(batch, at, self._before("own", lot.task, j), alone, _counting(batch, watch))
            if segment.block and given is None:
                self._unreached.add((lot.task, j, segment.stack))
            else:
                self._after("own", lot.task, j, at, given)
            for name, listed in () if self._own_inputs_do else goals.items():
                self.states["goal", lot.task, j, name] = listed
        return moments, sketches

    def _alone(self, task: str, at: int) -> Updates:
        """The task's adapter, where the segment runs."""
        adapter = self.plan.adapters[task]
        near = [name for name in self.stream.running(at) if name in adapter]
        return {name: in_model(adapter.read(name), self.targets[name]) for name in near}

    def sums(self, at: int, names: Sequence[str]) -> Iterator[tuple[str, int, dict[str, list[Sums]]]]:
        """Of the modules of one stage, on their inputs in the merged model as it is so far.

        Returns:
            for each lot, its task and number, and module → part of the inputs (:data:`FOLDS`) → sums.
        """
        segment = self.stream.segments[at]
        for lot in self.lots:
            found = {name: [Sums.zero(*self.cores[name].shape) for _ in range(FOLDS)] for name in names}
            for j, rows, batch in self._reaching(lot, segment):
                goals = {name: iter(self.states["goal", lot.task, j, name]) for name in names}
                watch = self._demanding(goals, rows, found)
                before, updates = self._inputs(at, lot.task, j)
                with inputs_of(lot.task):
                    self.stream.run(batch, at, before, updates, _plain(batch, watch), until=names)
                for name in names:
                    self.states.drop(("goal", lot.task, j, name))
            yield lot.task, lot.at, found

    def _inputs(self, at: int, task: str, j: int) -> tuple[Mapping[str, Any], Updates]:
        """Through what a batch comes to the modules that are fitted: the merged model, as it is so far."""
        return self._before("merged", task, j), self.updates

    def _demanding(
        self, goals: Mapping[str, Iterator[Tensor]], before: int, found: Mapping[str, list[Sums]]
    ) -> Callable[[str, Tensor, Tensor, Tensor], None]:
        """Adds a module's inputs, and what is asked of them, to the sums."""

        def watch(name: str, x: Tensor, output: Tensor, rows: Tensor) -> None:
            if name not in goals:
                return
            goal = next(goals[name]).to(output.device)
            if len(goal) != len(x):
                raise UnsupportedError(OTHER_WAY, key=name, remedy=WITHOUT_EXPERTS)
            core = self.cores[name]
            z, o = in_basis(x, core.right.mT), in_basis(output, core.left)
            y = goal - o
            part = (rows + before) % FOLDS
            for fold in range(FOLDS):
                found[name][fold] += Sums.of(*(each[part == fold] for each in (z, y, o)))

        return watch

    def pass_on(self, at: int) -> None:
        """What the finished block gives in the merged model."""
        segment = self.stream.segments[at]
        for lot in self.lots:
            for j, _, batch in self._reaching(lot, segment):
                with inputs_of(lot.task):
                    given = self.stream.run(batch, at, self._before("merged", lot.task, j), self.updates, _nothing)
                self._after("merged", lot.task, j, at, given)

    def _before(self, way: str, task: str, j: int) -> Mapping[str, Any]:
        """What finished blocks gave: see :meth:`Stream.run`."""
        blocks = (segment.block for segment in self.stream.segments if segment.block)
        return {block: self.states[way, task, j, block] for block in blocks if (way, task, j, block) in self.states}

    def _after(self, way: str, task: str, j: int, at: int, given: Any) -> None:
        block = self.stream.segments[at].block
        if block:
            self.states[way, task, j, block] = given
            needed = self.stream.tail(at)
            for segment in self.stream.segments[:at]:
                if segment.block and segment.block not in needed:
                    self.states.drop((way, task, j, segment.block))

    def _reaching(self, lot: Lot, segment: Segment) -> Iterator[tuple[int, int, Batch]]:
        """The batches that reach the segment, as far as that is known."""
        for j, rows, batch in lot.batches:
            if (lot.task, j, segment.stack) not in self._unreached:
                yield j, rows, batch


def in_basis(x: Tensor, basis: Tensor) -> Tensor:
    """``x`` (tokens, m) in the orthonormal ``basis`` (m, p), at least in float32."""
    kind = torch.promote_types(x.dtype, torch.float32)
    return x.to(kind) @ basis.to(x.device, kind)


def in_model(update: LowRank, target: Target) -> LowRank:
    """As the model's module runs."""
    return LowRank(update.left.to(target.left), update.right.to(target.left))


def _tokens(batch: Batch, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of a module's inputs ``x`` and outputs ``y`` (..., n), those that count (tokens, n); and the row of each."""
    mask = token_mask(batch, x)
    x, y = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
    each, rest = divmod(len(x), rows_of(batch))
    rows = torch.arange(len(x), device=x.device)
    rows = rows // each if each and not rest else torch.zeros_like(rows)
    if mask is None:
        return x, y, rows
    counts = mask.reshape(-1).bool().to(x.device)
    return x[counts], y[counts], rows[counts]


def _counting(batch: Batch, see: Callable[[str, Tensor, Tensor], None]) -> Watch:
    """``see`` a module's inputs and outputs with its update, of the tokens that count."""

    def watch(name: str, x: Tensor, output: Tensor, result: Tensor) -> None:
        x, result, _ = _tokens(batch, x, result)
        see(name, x, result)

    return watch


def _plain(batch: Batch, see: Callable[[str, Tensor, Tensor, Tensor], None]) -> Watch:
    """``see`` a module's inputs, its outputs without an update, and their rows, of the tokens that count."""
    return lambda name, x, output, result: see(name, *_tokens(batch, x, output))


def _nothing(name: str, x: Tensor, output: Tensor, result: Tensor) -> None:
    pass
