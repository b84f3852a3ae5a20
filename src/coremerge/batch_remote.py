"""The jobs of a batch that other processes do: each one a task, on files and a disk that all of them see.

A worker stands where the batch was started, so that relative paths, and what the results say of them, are the same. It
first looks whether it sees what the batch sees. A job may be done twice, for a worker may die when its result is in
place; or in part, and then who does it again removes what the dead one left.
"""

from __future__ import annotations

import os
import secrets
import shutil
import socket
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from coremerge import __version__
from coremerge.batch import Job, Row, Shared, run_job
from coremerge.errors import CoremergeError, OutputError, SourceError
from coremerge.executors import Executor, remembered
from coremerge.formats.safetensors_layout import writing
from coremerge.formats.source import in_full, local_path
from coremerge.hashing import Stamp, stamp_of
from coremerge.remote import check_version
from coremerge.report.record import FILE as RECORD
from coremerge.report.record import read_record

SECONDS = 60.0
"""Of a merge: each is a task of its own."""


@dataclass(frozen=True)
class Home:
    """Where a batch was started, as its workers must know it.

    Attributes:
        folder: the current one, where relative paths begin.
        out: of all results, in full.
        token: of this run of the batch: a mark in ``out`` and unfinished results are named after it.
        version: of coremerge.
    """

    folder: str
    out: str
    token: str
    version: str = __version__

    @property
    def mark(self) -> Path:
        """A folder that nobody else has: who sees it sees this disk, and not one that is called alike."""
        return Path(self.out, f".{self.token}.batch")


class Attempt:
    """Where a result is written before it is in its place, under a name that the next attempt knows.

    A :class:`~coremerge.formats.atomic.Resumable` of which nothing is kept.
    """

    def __init__(self, out: str, token: str) -> None:
        wanted = Path(os.path.realpath(out))
        self.place = wanted.with_name(f".{wanted.name}.{token}.partial")
        self.files: set[str] = set()

    def __enter__(self) -> Attempt:
        self.clear()
        return self

    def __exit__(self, *_: object) -> None:
        self.clear()

    def finish(self, name: str) -> None:
        """Nothing is kept."""

    def clear(self) -> None:
        """Remove what is there. It is renamed first: a process that is still at work on it finds it gone as a whole."""
        gone = self.place.with_name(f"{self.place.name}.{secrets.token_hex(4)}.partial")
        with suppress(OSError):
            self.place.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)


def send(jobs: Sequence[Job], out: str | Path, executor: Executor) -> Generator[Row, None, None]:
    """What became of each job, in order.

    Raises:
        OutputError: the folders of the results cannot be made.
        CoremergeError: no process can work at all.
    """
    home = Home(str(Path.cwd()), str(Path(out).expanduser().absolute()), secrets.token_hex(4))
    sent = [replace(job, out=str(Path(job.out).absolute()), threads=job.threads or 1) for job in jobs]
    before: dict[str, Stamp | None] = {}

    def load(job: Job) -> tuple[Job, Mapping[str, str]]:
        before[job.name] = _stamp(job)
        return job, _places(job)

    make = partial(do, home)
    with _marked(home, sent), closing(executor.run(make, sent, lambda _: SECONDS, load, _lost)) as rows:
        for job, row in zip(sent, rows, strict=True):
            made = row.status == "skipped" and before[job.name] != _stamp(job)
            yield replace(row, status="done", notes=_notes(job)) if made else row


def _lost(job: Job, error: CoremergeError) -> Row:
    return Row(job.name, "failed", 0.0, error=str(error))


def _stamp(job: Job) -> Stamp | None:
    with suppress(OSError):
        return stamp_of(Path(job.out, RECORD))
    return None


def _notes(job: Job) -> tuple[str, ...]:
    """Of a result whose maker died before it told them."""
    record = read_record(job.out)
    return (*dict.fromkeys([*record["warnings"], *record["notes"]]),)


def _places(job: Job) -> dict[str, str]:
    """What the job reads that lies on a disk → the same in full."""
    named = [*job.sources, *job.initial.values(), job.base, job.into]
    return {place: in_full(place) for place in named if place and local_path(place)}


@contextmanager
def _marked(home: Home, jobs: Sequence[Job]) -> Iterator[None]:
    """The folders of the results are there, and nothing more than the results is afterwards."""
    made: list[Path] = []
    try:
        for folder in dict.fromkeys([home.mark, *(Path(job.out).parent for job in jobs)]):
            with writing(folder):
                made += [one for one in (folder, *folder.parents) if not one.exists()]
                folder.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        for job in jobs:
            Attempt(job.out, home.token).clear()
        for folder in sorted(made, key=lambda one: len(one.parts), reverse=True):
            with suppress(OSError):  # it holds results
                folder.rmdir()


@remembered
def _shared(home: Home) -> Shared:
    """What this process knows from the batch's other jobs."""
    return Shared()


def do(home: Home, letter: tuple[Job, Mapping[str, str]]) -> Row:
    """:func:`~coremerge.batch.run_job`, in a process that may be on another machine."""
    job, places = letter
    with ExitStack() as stack:
        try:
            stack.enter_context(_standing(home))
            _check(home, places)
        except CoremergeError as error:
            return Row(job.name, "failed", 0.0, error=str(error))
        attempt = stack.enter_context(Attempt(job.out, home.token))
        return run_job(job, _shared(home), attempt=attempt)


@contextmanager
def _standing(home: Home) -> Iterator[None]:
    """In the folder where the batch was started, if it is there."""
    before = Path.cwd()
    with suppress(OSError):
        os.chdir(home.folder)
    try:
        yield
    finally:
        os.chdir(before)


def _check(home: Home, places: Mapping[str, str]) -> None:
    """Refuse to work where the batch means other files."""
    here = socket.gethostname()
    check_version(home.version)
    if not home.mark.is_dir():
        raise OutputError(f"cannot be seen on {here}", file=home.out, remedy="Write to a disk that all machines share")
    for said, place in places.items():
        if local_path(said) is None or in_full(said) != place:
            raise SourceError(
                f"cannot be seen on {here}", file=place,
                remedy="Give all machines the same files: on a disk that they share, or on the hub",
            )  # fmt: skip
