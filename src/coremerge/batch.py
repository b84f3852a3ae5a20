"""Many merges in one go: every recipe of a manifest on every set of its adapters.

:func:`run_job` does one of them, plain data in and plain data out, so that it can be done anywhere;
:func:`run_batch` does those whose results are missing, one after the other, or side by side on a cluster
(:mod:`coremerge.batch_remote`). A result is there when its ``coremerge.json`` says that it was made from the same
recipe and inputs by the same version.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from coremerge.adapter import Adapter
from coremerge.errors import ConfigError, CoremergeError, OutputError, SourceError
from coremerge.formats import load
from coremerge.formats.atomic import check_output
from coremerge.formats.checkpoint import shorten
from coremerge.formats.config import CONFIG_NAME
from coremerge.formats.source import WEIGHTS_NAME, local_path, parse_hub_id
from coremerge.formats.urls import is_url, unwrapped
from coremerge.hashing import Hashes, check_unchanged
from coremerge.inputs import Progress, files_of, hashes_of, with_labels
from coremerge.manifest import Choice, Manifest, read_manifest
from coremerge.memory import out_of_memory
from coremerge.pipeline import Prepared, prepare
from coremerge.recipe import Recipe
from coremerge.report.record import FILE as RECORD
from coremerge.report.record import changes, read_record

if TYPE_CHECKING:
    from coremerge.executors import Executor
    from coremerge.formats.atomic import Resumable

Status = Literal["done", "skipped", "failed", "planned"]


@dataclass(frozen=True)
class Job:
    """One merge, as plain data; for its fields see :func:`coremerge.pipeline.merge_files`.

    Attributes:
        name: ``SET/RECIPE``, or what the manifest calls it.
        dry_run: only look.
        notes: what was made of its recipe, in plain words.
    """

    name: str
    sources: tuple[str, ...]
    recipe: Recipe
    out: str
    base: str | None = None
    vera_width: int | None = None
    initial: Mapping[str, str] = field(default_factory=dict)
    rename: Mapping[str, str] = field(default_factory=dict)
    into: str | None = None
    allow_pickle: bool = False
    overwrite: bool = False
    threads: int | None = None
    device: str = "cpu"
    command: tuple[str, ...] | None = None
    dry_run: bool = False
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Row:
    """What became of a job.

    Attributes:
        name: the job's.
        status: ``done``; ``skipped``, as its result was there; ``failed``; or ``planned``, in a dry run.
        seconds: spent on it.
        bytes: of the result's weights; of what is planned, at most.
        error: why it failed.
        notes: what was dropped, normalised, assumed or warned of, in plain words.
    """

    name: str
    status: Status
    seconds: float
    bytes: int = 0
    error: str | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class BatchReport:
    """What became of all jobs.

    Attributes:
        out: the folder of all results.
        rows: one per job.
        seconds: spent in all.
    """

    out: str
    rows: tuple[Row, ...]
    seconds: float

    @property
    def failed(self) -> tuple[Row, ...]:
        """The jobs that have no result."""
        return tuple(row for row in self.rows if row.status == "failed")

    @property
    def counts(self) -> dict[str, int]:
        """Status → number of jobs, of those that occur."""
        found = [row.status for row in self.rows]
        return {status: found.count(status) for status in ("done", "planned", "skipped", "failed") if status in found}

    def to_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return {
            "out": self.out,
            "counts": self.counts,
            "seconds": self.seconds,
            "jobs": [asdict(row) | {"notes": list(row.notes)} for row in self.rows],
        }


class Shared:
    """What jobs in one process share: the SHA-256 of their inputs, and the adapters that the last one read."""

    def __init__(self) -> None:
        self.hashes = Hashes()
        self._read: dict[str, Adapter] = {}

    def __enter__(self) -> Shared:
        return self

    def __exit__(self, *_: object) -> None:
        self.hashes.__exit__()

    def loader(self) -> Callable[..., Adapter]:
        """In place of :func:`coremerge.load`, for one job: what the job before it read is not read again."""
        before, self._read = self._read, {}

        def known(source: str, **options: Any) -> Adapter:
            key = repr((source, sorted(options.items())))
            adapter = before.get(key)
            if adapter is None or not _unchanged(adapter):
                adapter = load(source, **options)
            self._read[key] = adapter
            return adapter

        return known


def _unchanged(adapter: Adapter) -> bool:
    try:
        check_unchanged(adapter.info.stamps)
    except SourceError:
        return False
    return True


def run_batch(
    manifest: str | Path | Manifest,
    out: str | Path,
    *,
    only: Sequence[str] = (),
    threads: int | None = None,
    device: str = "cpu",
    allow_pickle: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    command: Sequence[str] | None = None,
    executor: Executor | None = None,
    progress: Progress | None = None,
) -> BatchReport:
    """Make the results that are missing; a job that fails does not stop the others.

    Args:
        manifest: a file: see :class:`~coremerge.manifest.Manifest`.
        out: the folder of all results, ``out/SET/RECIPE`` each.
        only: names of jobs, or patterns of them (``all/*``).
        threads: modules in work side by side; all processors when None, with ``executor`` one.
        device: of the linear algebra.
        allow_pickle: read legacy ``.bin`` files.
        overwrite: make results anew that were made from something else; those that are as wanted stay.
        dry_run: say what would be done, and write nothing.
        command: the words of the command that runs it, for the model cards.
        executor: other processes that do a job each, such as :class:`coremerge.executors.ray.Ray`, to the same bytes;
            a dry run looks from here.
        progress: called with the job and what is done in it, the jobs done and their number; with ``executor``, after
            every job.

    Raises:
        CoremergeError: the manifest, ``out`` or ``executor`` cannot be used.
    """
    start = time.perf_counter()
    how: dict[str, Any] = {"threads": threads, "device": device, "allow_pickle": allow_pickle, "overwrite": overwrite}
    jobs = jobs_of(manifest, out, only=only, command=command, dry_run=dry_run, **how)
    made = _away(jobs, out, executor, progress) if executor and not dry_run else _here(jobs, progress)
    rows = list(made)
    return BatchReport(str(out), tuple(rows), time.perf_counter() - start)


def _here(jobs: Sequence[Job], progress: Progress | None) -> Iterator[Row]:
    with Shared() as shared:
        for done, job in enumerate(jobs):
            yield run_job(job, shared, _of_job(progress, job.name, done, len(jobs)))


def _away(jobs: Sequence[Job], out: str | Path, executor: Executor, progress: Progress | None) -> Iterator[Row]:
    from coremerge.batch_remote import send

    with closing(send(jobs, out, executor)) as rows:
        for done, row in enumerate(rows, 1):
            if progress:
                progress(row.name, done, len(jobs))
            yield row


def _of_job(progress: Progress | None, name: str, done: int, count: int) -> Progress:
    tell = progress or (lambda label, done, count: None)
    tell(name, done, count)
    return lambda stage, part, parts: tell(f"{name}: {stage} {part}/{parts}", done, count)


def run_job(
    job: Job, shared: Shared | None = None, progress: Progress | None = None, *, attempt: Resumable | None = None
) -> Row:
    """Make one result, unless it is there; whatever goes wrong is in the row.

    ``attempt``: see :meth:`coremerge.pipeline.Prepared.run`.
    """
    start = time.perf_counter()
    try:
        with nullcontext(shared) if shared else Shared() as held:
            status, count, notes = _run(job, held, progress, attempt)
            return Row(job.name, status, time.perf_counter() - start, count, notes=notes)
    except Exception as error:  # also a bug that one merge runs into must not end a night's work
        refusal = error if isinstance(error, CoremergeError) else out_of_memory(error)
        said = str(refusal) if refusal else f"{type(error).__name__}: {error}".rstrip(": ")
        return Row(job.name, "failed", time.perf_counter() - start, error=said)


def _run(
    job: Job, shared: Shared, progress: Progress | None, attempt: Resumable | None
) -> tuple[Status, int, tuple[str, ...]]:
    prepared = prepare(
        job.sources,
        job.recipe,
        into=job.into,
        base=job.base,
        vera_width=job.vera_width,
        initial=job.initial,
        rename=job.rename,
        allow_pickle=job.allow_pickle,
        overwrite=job.overwrite,
        progress=progress,
        load=shared.loader(),
    )
    files = _result(prepared, Path(job.out))
    if files:
        changed = _changes(prepared, Path(job.out), shared.hashes)
        if not changed:
            return "skipped", _size(files), ()
        if not job.overwrite:
            raise OutputError(
                f"is there already, but of something else: {'; '.join(changed)}",
                file=job.out, remedy="To make it anew, pass --overwrite",
            )  # fmt: skip
    check_output(job.out, overwrite=job.overwrite, inputs=files_of(prepared.plan.adapters))
    if job.dry_run:
        return "planned", prepared.output_bytes, _notes(job, prepared.plan.warnings, prepared.notes)
    merged = prepared.run(
        job.out,
        threads=job.threads,
        device=job.device,
        command=job.command,
        hashes=shared.hashes,
        progress=progress,
        attempt=attempt,
    )
    return "done", _size(merged.saved.weights), _notes(job, merged.report.warnings, merged.notes)


def _notes(job: Job, *others: Iterable[str]) -> tuple[str, ...]:
    return (*dict.fromkeys(chain(job.notes, *others)),)


def _size(files: Iterable[Path]) -> int:
    return sum(file.stat().st_size for file in files)


def _result(prepared: Prepared, out: Path) -> list[Path]:
    """The weights of a former result, if there is a whole one."""
    names = [*prepared.into_plan.layouts] if prepared.into_plan else [WEIGHTS_NAME]
    others = [RECORD, *([] if prepared.into_plan else [CONFIG_NAME]), *prepared.plan.info.beside]
    return [out / name for name in names] if all((out / name).is_file() for name in [*names, *others]) else []


def _changes(prepared: Prepared, out: Path, hashes: Hashes) -> list[str]:
    """In what the result that is there differs from the one that is wanted."""
    try:
        record = read_record(out)
    except SourceError as error:
        return [error.what]
    into = None if prepared.into is None else str(prepared.into)
    sha256 = hashes_of(prepared.plan.adapters, hashes)
    rename = prepared.given.rename
    found = changes(record, prepared.plan, sha256, dtype=prepared.dtype, into=into, rename=rename)
    return [*found, *_newer(prepared, out)]


def _newer(prepared: Prepared, out: Path) -> Iterator[str]:
    """A base model is too large to be hashed: it must be older than the result."""
    made = (out / RECORD).stat().st_mtime_ns
    newer = [file.name for file in (prepared.into_plan.base.files if prepared.into_plan else ()) if _time(file) > made]
    if newer:
        yield f"{prepared.into} has changed since: {shorten(newer)}"


def _time(file: Path) -> int:
    return file.stat().st_mtime_ns


def jobs_of(
    manifest: str | Path | Manifest,
    out: str | Path,
    *,
    only: Sequence[str] = (),
    command: Sequence[str] | None = None,
    **how: Any,
) -> list[Job]:
    """The manifest's merges as jobs: see :func:`run_batch`, of which ``how`` are further arguments.

    Raises:
        CoremergeError: the manifest cannot be used.
    """
    manifest = manifest if isinstance(manifest, Manifest) else read_manifest(manifest)
    recipes = {name: manifest.recipe(name) for name in manifest.recipes}
    jobs = []
    for choice in manifest.choices():
        base = manifest.sets[choice.set].base or recipes[choice.recipe].base_model
        given = _sources(manifest, choice, base)
        name, place = "/".join(choice.parts), Path(out).expanduser().joinpath(*choice.parts)
        file = recipes[choice.recipe]
        recipe = with_labels(file.recipe, given["sources"], manifest.sets[choice.set].models)
        words = None if command is None else (*command, "--only", name)
        jobs.append(Job(name=name, recipe=recipe, out=str(place), command=words, notes=file.notes, **given, **how))
    _check_apart(jobs)
    return _only(jobs, only)


def _sources(manifest: Manifest, choice: Choice, base: str | None) -> dict[str, Any]:
    """What the job reads, as seen from here."""
    given = manifest.sets[choice.set]

    def place(named: str) -> str:
        return _place(manifest.folder, named)

    return {
        "sources": tuple(map(place, given.models)),
        "base": None if base is None else place(base),
        "vera_width": given.vera_width,
        "initial": {(place(key) if key in given.models else key): place(at) for key, at in given.initial.items()},
        "rename": given.rename,
        "into": None if given.into is None else place(given.into),
    }


def _place(folder: Path, named: str) -> str:
    """A path that a file in ``folder`` names, a hub id or a URL."""
    if named.startswith("~") or is_url(named) or unwrapped(named) != named:
        return named
    found = folder / named
    return named if local_path(found) is None and parse_hub_id(named) else str(found)


def _check_apart(jobs: Sequence[Job]) -> None:
    """No result is, or holds, what another one is made from: --overwrite would replace it."""
    inputs = [path for job in jobs for path in (*job.sources, *job.initial.values(), job.base, job.into) if path]
    held: dict[str, str] = {}
    for path in dict.fromkeys(inputs):
        if (real := local_path(path)) is not None:
            held |= dict.fromkeys(map(str, (real.resolve(), *real.resolve().parents)), path)
    for job in jobs:
        if (source := held.get(str(Path(job.out).resolve()))) is not None:
            raise OutputError("holds an input", file=job.out, key=source, remedy="Choose another output folder")


def _only(jobs: list[Job], only: Sequence[str]) -> list[Job]:
    for wanted in only:
        if not any(_matches(job, wanted) for job in jobs):
            raise ConfigError(
                "no such job", key="only", value=wanted, remedy=f"Jobs: {shorten((job.name for job in jobs), 8)}"
            )
    return [job for job in jobs if not only or any(_matches(job, wanted) for wanted in only)]


def _matches(job: Job, wanted: str) -> bool:
    return job.name == wanted or fnmatchcase(job.name, wanted)
