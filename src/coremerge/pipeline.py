"""From adapter files to an adapter on disk: read, plan, merge, write, with a model card beside it.

:func:`prepare` does all that can be checked beforehand and touches nothing; :meth:`Prepared.run` does the rest;
:func:`merge_files` is one after the other. The command ``coremerge merge`` is a thin layer over them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from coremerge.adapter import Adapter, Lazy
from coremerge.cost import Cost, cost_of
from coremerge.devices import check_device
from coremerge.equal import equalized
from coremerge.errors import ConfigError
from coremerge.formats import load
from coremerge.formats.atomic import check_output, standing
from coremerge.formats.writer import Saved, save
from coremerge.hashing import Hashes, check_unchanged, stamps
from coremerge.held import Held
from coremerge.inputs import Progress, files_of, hashes_of, read_adapters, with_labels
from coremerge.lowrank import LowRank
from coremerge.memory import memory_refused
from coremerge.merging import MergeResult, execute
from coremerge.outcome import Report
from coremerge.plan import Plan, make_plan
from coremerge.recipe import Recipe
from coremerge.report.record import FILE as RECORD
from coremerge.report.record import make_record
from coremerge.surveying import surveyed
from coremerge.unfinished import tidy
from coremerge.zeros import check_not_all_zeros

if TYPE_CHECKING:
    from coremerge.executors import Executor
    from coremerge.formats.atomic import Resumable
    from coremerge.formats.into import IntoPlan
    from coremerge.formats.placing import Placement
    from coremerge.unfinished import Unfinished


@dataclass(frozen=True)
class Given:
    """What a merge of files is asked for, beside its recipe: see :func:`merge_files`."""

    sources: tuple[str | Path, ...]
    into: str | Path | None = None
    base: str | Path | None = None
    vera_width: int | None = None
    initial: Mapping[str, str | Path] | None = None
    allow_pickle: bool = False
    link: bool = False
    rename: Mapping[str, str] | None = None


@dataclass(frozen=True)
class Merged:
    """What :func:`merge_files` did.

    Attributes:
        plan: what was settled beforehand.
        report: of the merge.
        saved: what was written.
        sha256: adapter name → file name → SHA-256 of the files it was read from.
        seconds: spent in all, from the first look at the files.
        notes: what was dropped, normalised or assumed, in plain words.
        into: the base model that it went into, if any.
    """

    plan: Plan
    report: Report
    saved: Saved
    sha256: Mapping[str, Mapping[str, str]]
    seconds: float
    notes: tuple[str, ...]
    into: str | Path | None = None

    def to_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        output = {
            "path": str(self.saved.path),
            "into": None if self.into is None else str(self.into),
            "files": [file.name for file in self.saved.weights],
            "bytes": self.saved.bytes,
            "rank": self.saved.rank or None,
            "dtype": dtype_name(self.saved.dtype),
        }
        return {
            "output": output,
            "recipe": self.plan.recipe.model_dump(mode="json"),
            "plan": self.plan.to_dict(),
            "report": self.report.to_dict(),
            "sha256": {name: dict(files) for name, files in self.sha256.items()},
            "seconds": self.seconds,
            "notes": list(self.notes),
        }


def merge_files(
    sources: Sequence[str | Path],
    out: str | Path,
    recipe: Recipe | None = None,
    *,
    into: str | Path | None = None,
    link: bool = False,
    base: str | Path | None = None,
    vera_width: int | None = None,
    initial: Mapping[str, str | Path] | None = None,
    allow_pickle: bool = False,
    rename: Mapping[str, str] | None = None,
    overwrite: bool = False,
    threads: int | None = None,
    device: str = "cpu",
    batch: int | None = None,
    command: Sequence[str] | None = None,
    max_memory: int | None = None,
    resume: bool = False,
    executor: Executor | None = None,
    progress: Progress | None = None,
) -> Merged:
    """Merge the adapters in ``sources`` and write the result into the directory ``out``, complete or not at all.

    Args:
        sources: folders, files, URLs or hub ids: see :func:`coremerge.load`.
        out: a directory.
        recipe: the defaults of :class:`~coremerge.Recipe` when None. Weights and ``extras`` may name an adapter by its
            label or by its source.
        into: a base model; the result is then that model with the merged update added, not an adapter.
        link: files of its weights that stay as they are become hard links to the base's: see
            :func:`~coremerge.formats.into.save_into`.
        base: the base model (its files' headers or its config), for a VeRA adapter that needs it; ``into`` if None.
        vera_width: in place of ``base``: see :func:`coremerge.load`.
        initial: label or source of a PiSSA-like adapter → where its initial adapter is.
        allow_pickle: read legacy ``.bin`` files.
        rename: beginning of modules' names → what it is in the result: see :func:`coremerge.naming.renamed`.
        overwrite: replace a result that is there already.
        threads: modules in work side by side; all processors when None.
        device: of the linear algebra.
        batch: modules of one shape that go through together.
        command: the words of the command that made it, for the model card.
        max_memory: bytes that the merge may take: fewer threads, or a refusal before any work.
        resume: keep what is done beside ``out``, in ``.OUT.resume``, and go on from what an earlier run kept there.
        executor: other processes that do the work, such as :class:`coremerge.executors.ray.Ray`, to the same bytes.
        progress: called as parts are done.

    Raises:
        CoremergeError: a refusal; ``out`` is then as it was.
    """
    prepared = prepare(
        sources,
        recipe,
        out=out,
        into=into,
        link=link,
        base=base,
        vera_width=vera_width,
        initial=initial,
        allow_pickle=allow_pickle,
        rename=rename,
        overwrite=overwrite,
        progress=progress,
    )
    how: dict[str, Any] = {"threads": threads, "device": device, "batch": batch, "max_memory": max_memory}
    return prepared.run(out, command=command, resume=resume, executor=executor, progress=progress, **how)


@memory_refused()
def prepare(
    sources: Sequence[str | Path],
    recipe: Recipe | None = None,
    *,
    out: str | Path | None = None,
    into: str | Path | None = None,
    link: bool = False,
    base: str | Path | None = None,
    vera_width: int | None = None,
    initial: Mapping[str, str | Path] | None = None,
    allow_pickle: bool = False,
    rename: Mapping[str, str] | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    load: Callable[..., Adapter] = load,
) -> Prepared:
    """Read what the files say of themselves and settle the plan; nothing is merged and nothing is written.

    Arguments and errors are those of :func:`merge_files`; ``out``, when given, is checked. ``load``: see
    :func:`~coremerge.inputs.read_adapters`.
    """
    start = time.perf_counter()
    if link and into is None:
        raise ConfigError("there is no base model whose files could be linked", key="link", remedy="Give into, too")
    if out is not None:
        if not overwrite:
            tidy(Path(out))
        check_output(out, overwrite=overwrite)
    adapters = read_adapters(
        sources,
        base=base or into,
        vera_width=vera_width,
        initial=initial,
        allow_pickle=allow_pickle,
        rename=rename,
        progress=progress,
        load=load,
    )
    if out is not None:
        check_output(out, overwrite=overwrite, inputs=files_of(adapters))
    plan = make_plan(adapters, with_labels(recipe or Recipe(), adapters, sources))
    given = Given(tuple(sources), into, base, vera_width, initial, allow_pickle, link, rename)
    into_plan = None if into is None else _plan_into(into, plan)
    return Prepared(plan, into_plan, given, overwrite, start, _beside_base(plan, base, into_plan))


@dataclass(frozen=True)
class Prepared:
    """A merge of files that only has to be carried out.

    Attributes:
        plan: of the merge.
        into_plan: of the writing into a base model, where that was asked for.
        given: what it was prepared from.
        overwrite: replace a result that is there already.
        start: when it began.
        placement: of the merge in the base model that the scale goes by, where it does.
    """

    plan: Plan
    into_plan: IntoPlan | None
    given: Given
    overwrite: bool
    start: float
    placement: Placement | None = None

    @property
    def into(self) -> str | Path | None:
        """The base model that is written into, if any."""
        return self.given.into

    @property
    def output_bytes(self) -> int:
        """Size of the tensors that will be written, but for what is carried over beside an adapter's factors."""
        return self.into_plan.size if self.into_plan else self.plan.output_bytes

    @property
    def cost(self) -> Cost:
        """Of the merge; of writing into a base model, the bytes that are copied."""
        found = cost_of(self.plan)
        return replace(found, copied=self.into_plan.written(link=self.given.link)) if self.into_plan else found

    def peak_bytes(self, threads: int | None = None, batch: int | None = None) -> int:
        """See :meth:`coremerge.plan.Plan.peak_bytes`."""
        return self.plan.peak_bytes(threads, batch, written=self._written_at_once)

    def threads_within(self, most: int, threads: int | None = None, batch: int | None = None) -> int:
        """See :meth:`coremerge.plan.Plan.threads_within`."""
        return self.plan.threads_within(most, threads, batch, written=self._written_at_once)

    @property
    def _written_at_once(self) -> int:
        """Bytes of a part of a base model's weight: as it is read, in float64, and as it is written."""
        from coremerge.formats.into import ENTRIES

        return ENTRIES * (8 + 8 + 8) if self.into_plan else 0

    @property
    def dtype(self) -> str:
        """Of what will be written."""
        if self.into_plan is None:
            return dtype_name(self.plan.dtype)
        return dtype_name(self.into_plan.dtype) if self.into_plan.dtype else "the base's own"

    @property
    def notes(self) -> tuple[str, ...]:
        """What will be dropped, normalised or assumed, in plain words."""
        own = [f"{name}: {note}" for name, adapter in self.plan.adapters.items() for note in adapter.info.notes]
        return (*dict.fromkeys([*own, *(self.into_plan.notes if self.into_plan else ())]),)

    def weighted(self, weights: Mapping[str, Any]) -> Prepared:
        """This merge, whose recipe has no weights, with ``weights`` by the adapters' labels."""
        plan = make_plan(self.plan.adapters, self.plan.recipe.but(weights=weights))
        return replace(self, plan=replace(plan, settled={**self.plan.settled, **plan.settled}))

    def to_dict(self) -> dict[str, Any]:
        """For ``--dry-run --json``."""
        return {
            "recipe": self.plan.recipe.model_dump(mode="json"),
            "plan": self.plan.to_dict(),
            "output_bytes": self.output_bytes,
            "cost": self.cost.to_dict(),
            "notes": list(self.notes),
        }

    def run(
        self,
        out: str | Path,
        *,
        threads: int | None = None,
        device: str = "cpu",
        batch: int | None = None,
        command: Sequence[str] | None = None,
        hashes: Hashes | None = None,
        progress: Progress | None = None,
        solve: Callable[[Plan], MergeResult] | None = None,
        rank_pattern: bool = False,
        max_memory: int | None = None,
        resume: bool = False,
        attempt: Resumable | None = None,
        executor: Executor | None = None,
    ) -> Merged:
        """Merge and write: see :func:`merge_files`.

        ``hashes`` may have begun with the inputs' files; ``solve`` merges, in place of the plan's recipe;
        ``rank_pattern``: see :func:`coremerge.formats.writer.save`. What ``solve`` does is not resumed, nor done by
        an ``executor``. ``attempt`` is where the result is written before it is in its place, and stays on an error.
        """
        if solve and resume:
            raise ValueError("what solve does is not resumed: it keeps what it needs by itself")
        if not executor:
            check_device(device)
        if max_memory is not None:
            threads = self.threads_within(max_memory, threads, batch)
        tell = progress or _silent
        from coremerge.remote import Away
        from coremerge.report.card import warm_up

        Thread(target=warm_up, daemon=True).start()
        with ExitStack() as stack:
            started = hashes or stack.enter_context(Hashes())
            for file in files_of(self.plan.adapters):
                started.start(file)
            how: dict[str, Any] = {"threads": threads, "device": device, "batch": batch}
            unfinished = stack.enter_context(self._unfinished(out, started, how, rank_pattern)) if resume else None
            held = unfinished.held if unfinished else stack.enter_context(closing(Held(folder=standing(out))))
            with memory_refused():
                plan = self.plan if solve else self._looked_through(how, tell, away=bool(executor))
                away = Away(replace(self, plan=plan), executor, device) if executor and not solve else None
                how |= {"held": held, "solver": away.solve if away else None, "progress": _stage(tell, "merging")}
                result = solve(plan) if solve else execute(plan, **how)
                check_not_all_zeros(plan, result.report)
                sha256 = hashes_of(self.plan.adapters, started)
                card, record = self._card(result, sha256, command), self._record(result, sha256, command)
                files = {"README.md": card, RECORD: record} | self._weights_file()
                written: dict[str, Any] = {"files": files, "threads": threads, "resume": unfinished or attempt}
                written["progress"] = _stage(tell, "writing")
                if away:
                    written |= away.writers(held, result.report.scale)
                saved = self._save(result.adapter, out, rank_pattern, written)
        seconds = time.perf_counter() - self.start
        notes = (*dict.fromkeys([*self.notes, *saved.notes]),)
        return Merged(plan, result.report, saved, sha256, seconds, notes, self.into)

    def _looked_through(self, how: Mapping[str, Any], tell: Progress, *, away: bool) -> Plan:
        """The plan with all that is to be known of all modules beforehand: here, also for a merge that is done away."""
        plan = equalized(self._with_norms(how["threads"], tell), how["threads"])
        device = "cpu" if away else how["device"]
        return surveyed(plan, threads=how["threads"], device=device, batch=how["batch"])

    def _with_norms(self, threads: int | None, tell: Progress) -> Plan:
        """The plan, with the norms of the base's weights where the scale goes by them."""
        if self.placement is None:
            return self.plan
        from coremerge.formats.base_norms import norms_at

        norms = norms_at(self.placement, threads=threads, progress=_stage(tell, "reading the base"))
        return replace(self.plan, base_norms=norms)

    def _unfinished(
        self, out: str | Path, hashes: Hashes, how: Mapping[str, Any], rank_pattern: bool
    ) -> AbstractContextManager[Unfinished]:
        """What an earlier run left of this very merge."""
        from coremerge import __version__
        from coremerge.unfinished import Unfinished

        check_output(out, overwrite=self.overwrite, inputs=files_of(self.plan.adapters))
        base = self.into_plan.base.files if self.into_plan else []
        about = {
            "version": __version__,
            "recipe": self.plan.recipe.model_dump(mode="json"),
            "inputs": list(hashes_of(self.plan.adapters, hashes).items()),
            "base": {str(file): stamp for file, stamp in stamps(base).items()},
            "how": [how["device"], how["batch"], self.dtype, rank_pattern, torch.__version__, self.given.link],
            "given": [self.given.vera_width, self.given.base, self.notes],
            "modules": {name: [p.module.shape, dict(p.ranks)] for name, p in self.plan.modules.items()},
        }
        return Unfinished(Path(out), about)

    def _save(self, adapter: Adapter, out: str | Path, rank_pattern: bool, how: Mapping[str, Any]) -> Saved:
        inputs = files_of(self.plan.adapters)
        if self.into is None or self.into_plan is None:
            return save(adapter, out, overwrite=self.overwrite, rank_pattern=rank_pattern, inputs=inputs, **how)
        from coremerge.formats.into import save_into

        check_unchanged(self.into_plan.base.stamps)
        how = {"dtype": self.plan.recipe.dtype, "link": self.given.link, "inputs": inputs, **how}
        return save_into(self.into, adapter, out, overwrite=self.overwrite, **how)

    def _record(
        self, result: MergeResult, sha256: Mapping[str, Mapping[str, str]], command: Sequence[str] | None
    ) -> str:
        into = None if self.into is None else str(self.into)
        base = into if self.given.base is None else str(self.given.base)
        about: dict[str, Any] = {"notes": self.notes, "dtype": self.dtype, "into": into, "rename": self.given.rename}
        read: dict[str, Any] = {"base": base, "vera_width": self.given.vera_width}
        return make_record(self.plan, result.report, sha256, command=command, **about, **read)

    def _weights_file(self) -> dict[str, str]:
        from coremerge.report.card import WEIGHTS_FILE, per_module

        if not per_module(self.plan.recipe):
            return {}
        return {WEIGHTS_FILE: json.dumps(self.plan.recipe.model_dump(mode="json")["weights"], indent=1) + "\n"}

    def _card(self, result: MergeResult, sha256: Mapping[str, Mapping[str, str]], command: Sequence[str] | None) -> str:
        from coremerge.report.card import describe, model_card

        card = describe(
            result,
            command=command,
            relation="adapter" if self.into is None else "merge",
            dtype=self.dtype,
            notes=self.notes,
            hashes=False,
        )
        inputs = [
            replace(given, sha256=next((h for file, h in sha256[given.name].items() if file != CONFIG), None))
            for given in card.inputs
        ]
        base = card.base_model if self.into is None else str(self.into)
        return model_card(replace(card, inputs=inputs, base_model=base))


CONFIG = "adapter_config.json"


def _plan_into(base: str | Path, plan: Plan) -> IntoPlan:
    """Whether the merged update has a place in ``base``, known before it is computed."""
    from coremerge.formats.into import plan_into

    return plan_into(base, _stand_in(plan), dtype=plan.recipe.dtype)


def _beside_base(plan: Plan, base: str | Path | None, into_plan: IntoPlan | None) -> Placement | None:
    """Where the merge is in the base that its scale goes by, from headers alone: the one it is written into, if any."""
    if plan.recipe.scale != "base":
        return None
    if into_plan:
        return into_plan.placement
    if base is None:
        raise ConfigError("it goes by a base model, and none is named", key="scale", value="base", remedy="Give --base")
    from coremerge.formats.base_weights import open_base
    from coremerge.formats.placing import Placement

    return Placement(open_base(base), _stand_in(plan))


def _stand_in(plan: Plan) -> Adapter:
    """The merged adapter before it is one: what it will have, and no factors."""
    factors: dict[str, LowRank] = {}  # nothing is asked for before it is written
    biases: dict[str, Tensor] = {}
    biased = tuple(name for name in plan.modules if any(name in a.biases for a in plan.adapters.values()))
    extras = {name: extra.load for name, extra in plan.extras.items() if extra.load is not None}
    return Adapter(
        {name: planned.module for name, planned in plan.modules.items()},
        factors.__getitem__,
        name="merged",
        biases=Lazy(biased, biases.__getitem__),
        extras=Lazy(tuple(extras), lambda name: extras[name]()),
        info=plan.info,
    )


def _stage(progress: Progress, label: str) -> Callable[[int, int], None]:
    return lambda done, count: progress(label, done, count)


def _silent(label: str, done: int, count: int) -> None:
    pass


def dtype_name(dtype: torch.dtype) -> str:
    """``float32`` of ``torch.float32``."""
    return str(dtype).removeprefix("torch.")
