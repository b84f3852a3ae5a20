"""What goes wrong around a run: ``python -m benchmarks.reliability.faults``. One clear message, and nothing is lost.

The command runs in a process of its own while something is broken: the disk is full, an input changes, another process
writes the same folder, the hub errs. It ends with exit status 1 and one message; the output is as it was, and nothing
is left beside it but what resume needs. Then the fault is mended, and the same command writes what an undisturbed run
does.
"""

from __future__ import annotations

import argparse
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

import torch

from benchmarks import results
from benchmarks.reliability import hub
from benchmarks.reliability.kill import make_base, make_fit, make_inputs, weights
from coremerge import cli

Act = Callable[[], object]
WRITING = "coremerge.formats.safetensors_layout:TensorFile.write_bytes"
CARD = "pathlib:Path.write_bytes"
SWAP = "coremerge.formats.atomic:_swap"
JOURNAL = "coremerge.formats.journal:Journal.add"
PLANNED = "coremerge.pipeline:Prepared.run"
HASHED = "coremerge.pipeline:make_record"
SPILLING = "coremerge.learning.states:save_file"
COMMANDS = ("merge", "merge --overwrite", "merge --into", "merge --resume", "fit", "fit --resume")


@dataclass(frozen=True)
class Ended:
    """How a run ended."""

    status: int
    said: str

    @property
    def message(self) -> str:
        """The one error.

        Raises:
            AssertionError: it is not one, or no way to end.
        """
        lines = [line for line in self.said.splitlines() if line.startswith("Error: ")]
        assert self.status == 1 and len(lines) == 1 and "Traceback" not in self.said, (self.status, self.said)
        assert ". " in lines[0].replace("...", ""), f"no remedy: {lines[0]}"
        return lines[0].removeprefix("Error: ")


@dataclass
class Case:
    """One command, inputs of its own, and the folder that it writes into.

    Attributes:
        home: holds the inputs, and ``place``.
        place: holds nothing but OUT.
        command: one of :data:`COMMANDS`.
        ours: names in ``place`` that the fault has put there.
    """

    home: Path
    command: str
    ours: set[str] = field(default_factory=set)
    out: Path = field(init=False)

    def __post_init__(self) -> None:
        self.place.mkdir()
        self.out = self.place / "OUT"

    @property
    def place(self) -> Path:
        return self.home / "place"

    @property
    def resumes(self) -> bool:
        return "--resume" in self.command

    @property
    def inputs(self) -> list[Path]:
        kind = "fit" if self.command.startswith("fit") else "adapter"
        return [self.home / f"{kind}{i}" for i in range(2)]

    @property
    def words(self) -> list[str]:
        """Of the command line."""
        sources = [str(path) for path in self.inputs]
        if self.command.startswith("fit"):
            data = [word for path in self.inputs for word in ("--data", f"{path.name}={self.home / 'texts.txt'}")]
            given = ["fit", *sources, "--base", str(self.home / "bert"), *data]
            given += ["--resume", str(self.place / "kept")] if self.resumes else []
            given += ["--spill", str(self.place)] if "--spill" in self.command else []
        else:
            into = ["--into", str(self.home / "base")] if "--into" in self.command else []
            flags = [word for word in ("--overwrite", "--resume") if word in self.command]
            given = ["merge", *sources, "--threads", "1", *into, *flags]
        return [*given, "-o", str(self.out)]

    def left(self) -> list[str]:
        """Names beside OUT that do not belong there."""
        known = {"OUT", *self.ours, *([".OUT.resume", "kept"] if self.resumes else [])}
        return sorted({path.name for path in self.place.iterdir()} - known) if self.place.exists() else []

    def shown(self, message: str) -> str:
        """The message without what differs from run to run."""
        said = re.sub(r"http://127[^/]*|" + re.escape(f"{self.home}/"), "", message)
        return re.sub(r"\btmp\w{8}\b", "(a temporary folder)", said)


def start(words: list[str], log: Path, meddle: Act | None = None) -> int:
    """The command in a process of its own, after ``meddle`` there."""
    child = os.fork()
    if not child:
        _run(words, log, meddle)
    return child


def _run(words: list[str], log: Path, meddle: Act | None) -> NoReturn:
    status = 70
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
        sys.argv = ["coremerge", *words]
        if meddle:
            meddle()
        cli.main()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 0 if end.code is None else 70
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def ended(child: int, log: Path) -> Ended:
    """Waits for it."""
    _, status = os.waitpid(child, 0)
    return Ended(os.waitstatus_to_exitcode(status), log.read_text())


def run(words: list[str], log: Path, meddle: Act | None = None) -> Ended:
    """Both."""
    return ended(start(words, log, meddle), log)


def before(moment: str, act: Act) -> Act:
    """Meddling that has ``act`` done just before ``module:name`` is called for the first time."""

    def meddle() -> None:
        module, _, path = moment.partition(":")
        *owners, name = path.split(".")
        owner = import_module(module)
        for part in owners:
            owner = getattr(owner, part)
        call, left = getattr(owner, name), [act]

        def hooked(*args: object, **kwargs: object) -> object:
            if left:
                left.pop()()
            return call(*args, **kwargs)

        setattr(owner, name, hooked)

    return meddle


@contextmanager
def mounted(folder: Path, *options: str) -> Iterator[None]:
    """A small disk.

    Raises:
        Skipped: this is not allowed here.
    """
    folder.mkdir(exist_ok=True)
    if (
        os.geteuid()
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", folder], check=False).returncode
    ):
        raise SkippedError("only root may mount disks")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


class SkippedError(Exception):
    """A fault that cannot be made on this machine."""


Fault = Callable[[Case], Iterator[Act | None]]
"""Breaks something and yields what to do in the process; then mends it, yields again, and cleans up."""


def fill(folder: Path) -> None:
    """Leaves no byte free on its disk."""
    with suppress(OSError), (folder / "filler").open("ab", buffering=0) as file:
        for size in (1 << 16, 1 << 12, 1):
            with suppress(OSError):
                while file.write(bytes(size)):
                    pass


@contextmanager
def own_disk(case: Case) -> Iterator[None]:
    """``case.place`` is a small disk for a while, with what was there."""
    old = weights(case.out) or {}
    with mounted(case.place):
        for name, data in old.items():
            case.out.mkdir(exist_ok=True)
            (case.out / name).write_bytes(data)
        yield


def full_disk(moment: str) -> Fault:
    def fault(case: Case) -> Iterator[Act | None]:
        case.ours.add("filler")
        with own_disk(case):
            yield before(moment, lambda: fill(case.place))
            (case.place / "filler").unlink()
            yield None

    return fault


def read_only(case: Case) -> Iterator[Act | None]:
    with own_disk(case):
        subprocess.run(["mount", "-o", "remount,ro", case.place], check=True)
        yield None
        subprocess.run(["mount", "-o", "remount,rw", case.place], check=True)
        yield None


def another_disk(case: Case) -> Iterator[Act | None]:
    with own_disk(case):
        yield None
        yield None


def small_files(case: Case) -> Iterator[Act | None]:
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))
    yield None


def folder_goes(moment: str) -> Fault:
    def fault(case: Case) -> Iterator[Act | None]:
        yield before(moment, lambda: shutil.rmtree(case.place))
        yield None

    return fault


def out_is_a_file(case: Case) -> Iterator[Act | None]:
    case.out.write_text("precious")
    yield None
    assert case.out.read_text() == "precious"
    case.out.unlink()
    yield None


def out_is_mounted(case: Case) -> Iterator[Act | None]:
    with mounted(case.out):
        yield None
    case.out.rmdir()
    yield None


def out_is_a_loop(case: Case) -> Iterator[Act | None]:
    case.out.symlink_to(case.out)
    yield None
    case.out.unlink()
    yield None


def out_is_a_link(case: Case) -> Iterator[Act | None]:
    target = case.home / "elsewhere"
    target.mkdir()
    case.out.symlink_to(target)
    yield None
    assert case.out.is_symlink() and list(target.iterdir())
    case.out.unlink()
    yield None


def input_changes(how: str, file: str, moment: str) -> Fault:
    """Truncated, removed, replaced by another valid one, or written over."""

    def change(path: Path, other: Path) -> None:
        if how == "cut short":
            os.truncate(path, path.stat().st_size // 2)
        elif how == "removed":
            path.unlink()
        elif how == "replaced":
            shutil.copyfile(other, path.with_name("new"))
            path.with_name("new").replace(path)
        elif path.suffix == ".json":
            path.write_text(path.read_text().replace('"lora_alpha": ', '"lora_alpha": 1'))
        else:
            with path.open("r+b") as opened:
                opened.seek(-4096, os.SEEK_END)
                opened.write(bytes(4096))

    def fault(case: Case) -> Iterator[Act | None]:
        base = file.startswith("model")
        folder, other = (case.home / "base", case.home / "base") if base else case.inputs
        path, twin = folder / file, other / ("model-1.safetensors" if base else file)
        kept = path.read_bytes()
        yield before(moment, lambda: change(path, twin))
        path.write_bytes(kept)
        yield None

    return fault


REFUSED: dict[str, tuple[Fault, tuple[str, ...], str]] = {
    "disk full from the start": (full_disk(PLANNED), COMMANDS, "place"),
    "disk full at the card": (full_disk(CARD), COMMANDS, "OUT"),
    "disk full at the tensors": (full_disk(WRITING), COMMANDS, "OUT"),
    "disk full at the journal": (full_disk(JOURNAL), ("merge --resume", "fit --resume"), "place"),
    "disk full at the hidden states": (full_disk(SPILLING), ("fit --spill",), "place"),
    "files may not be large (ulimit -f)": (small_files, COMMANDS, "place"),
    "disk is read-only": (read_only, COMMANDS, "place"),
    "OUT's folder goes while it is written": (folder_goes(WRITING), ("merge", "merge --into", "merge --resume"), "OUT"),
    "OUT's folder goes at the end": (folder_goes(SWAP), ("merge", "fit"), "OUT"),
    "OUT is a file": (out_is_a_file, ("merge", "merge --resume", "fit"), "OUT"),
    "OUT is a mount point": (out_is_mounted, ("merge", "merge --resume", "fit"), "OUT"),
    "OUT is a link to itself": (out_is_a_loop, ("merge", "merge --resume"), "OUT"),
    **{
        f"weights {how} {when}": (input_changes(how, "adapter_model.safetensors", moment), COMMANDS, "adapter_model")
        for how in ("cut short", "removed", "replaced", "written over")
        for when, moment in {"after planning": PLANNED, "between merging and writing": HASHED}.items()
    },
    "config written over after planning": (input_changes("w", "adapter_config.json", PLANNED), COMMANDS, "config"),
    **{
        f"base shard {how} while writing": (
            input_changes(how, "model-0.safetensors", WRITING), ("merge --into",), "model-0.safetensors",
        )
        for how in ("cut short", "written over")
    },
    "base shard replaced after planning": (
        input_changes("replaced", "model-0.safetensors", PLANNED), ("merge --into",), "model-0.safetensors",
    ),
}  # fmt: skip
"""Fault → how it is made, for which commands, and what the message names."""

HARMLESS: dict[str, tuple[Fault, tuple[str, ...]]] = {
    "OUT on another file system": (another_disk, ("merge", "merge --into", "merge --resume", "fit")),
    "OUT is a link to a folder": (out_is_a_link, ("merge", "merge --resume", "fit")),
    "OUT's folder goes after planning": (folder_goes(PLANNED), ("merge", "merge --resume")),
}


@dataclass
class Ground:
    """Where the cases are set up.

    Attributes:
        folder: holds the inputs, and a folder for each case.
        commands: those that are tried.
        whole: command → what an undisturbed run writes.
    """

    folder: Path
    commands: Iterable[str] = (*COMMANDS, "fit --spill")
    whole: dict[str, dict[str, bytes]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        given = self.folder / "given"
        given.mkdir()
        make_inputs(given), make_base(given / "base")
        if any(command.startswith("fit") for command in self.commands):
            make_fit(given)
        for command in self.commands:
            case = self.case(command)
            done = run(case.words, self.log)
            assert not done.status, done.said
            found = weights(case.out)
            assert found and not case.left(), case.left()
            self.whole[command] = found

    @property
    def log(self) -> Path:
        return self.folder / "log"

    def case(self, command: str) -> Case:
        """Anew, with an old OUT where it will be overwritten."""
        home = self.folder / "case"
        shutil.rmtree(home, ignore_errors=True)
        shutil.copytree(self.folder / "given", home, copy_function=shutil.copy2)
        case = Case(home, command)
        if "--overwrite" in command:
            case.out.mkdir()
            (case.out / "old.safetensors").write_bytes(b"old")
        return case

    def row(self, label: str, command: str, fault: Fault, names: str | None) -> list[object]:
        """Of the table; says so where the fault cannot be made here.

        Raises:
            AssertionError: see :meth:`check`.
        """
        try:
            return [label, command, *self.check(command, fault, names)]
        except SkippedError as why:
            return [label, command, "", f"skipped: {why}", ""]

    def check(self, command: str, fault: Fault, names: str | None) -> list[object]:
        """A command under a fault, and after it: exit status, message, what is left. ``names`` None: does no harm.

        Raises:
            AssertionError: it did not end as it should.
        """
        case = self.case(command)
        old = weights(case.out)
        steps = fault(case)
        try:
            found = run(case.words, self.log, next(steps))
            message = ""
            if names is not None:
                message = found.message
                assert names in message, message
            else:
                assert not found.status, found.said
            here = case.place.exists() and case.out.exists() and case.out.is_dir()
            assert names is None or not here or weights(case.out) in (old, {}), "OUT has changed"
            assert old is None or weights(case.out) == (old if names is not None else self.whole[command])
            left = case.left()
            assert not left, f"left behind: {left}"
            there = {path.name for path in case.place.iterdir()} if case.place.exists() else set()
            next(steps)
            case.place.mkdir(exist_ok=True)
            if names is not None:
                again = run(case.words, self.log)
                assert not again.status, again.said
            elif not case.out.exists():
                run(case.words, self.log)
            assert weights(case.out) == self.whole[command], "not the same bytes afterwards"
            assert not case.left(), case.left()
        finally:
            steps.close()  # type: ignore[attr-defined]
        return [found.status, case.shown(message), ", ".join(sorted(there - case.ours)) or "nothing"]


def together(ground: Ground, command: str) -> list[object]:
    """Two processes write the same OUT, and both are about to put it in place.

    Raises:
        AssertionError: OUT is a mix, or something is left behind.
    """
    case = ground.case(command)
    flags = [case.home / "0", case.home / "1"]

    def meet(mine: Path) -> None:
        mine.touch()
        end = time.monotonic() + 20
        while not all(flag.exists() for flag in flags) and time.monotonic() < end:
            time.sleep(0.001)

    logs = [ground.folder / f"log{i}" for i in range(2)]
    children = []
    for flag, log in zip(flags, logs, strict=True):
        wait = before(HASHED, lambda: time.sleep(2)) if case.resumes else before(SWAP, partial(meet, flag))
        children.append(start(case.words, log, wait))
        time.sleep(0.1 if case.resumes else 0)  # who comes second finds the lock
    both = [ended(child, log) for child, log in zip(children, logs, strict=True)]
    refused = [one for one in both if one.status]
    assert len(refused) < 2, [one.said for one in refused]
    message = refused[0].message if refused else ""
    assert weights(case.out) == ground.whole[command], "a mix"
    assert not case.left() and not (case.place / ".OUT.resume").exists(), sorted(case.place.iterdir())
    status = f"{both[0].status} and {both[1].status}"
    return [status, case.shown(message), "OUT"]


def streams(ground: Ground) -> Iterator[list[object]]:
    """What is printed cannot be: the result is there all the same.

    Raises:
        AssertionError: it is not, or there is a traceback.
    """
    reader, gone = os.pipe()
    os.close(reader)
    with open("/dev/full", "w") as full:  # noqa: PTH123
        given: dict[str, dict[str, Any]] = {
            "stdout's reader has gone": {"stdout": gone},
            "stdout is on a full disk": {"stdout": full},
            "stdout is closed": {"preexec_fn": lambda: os.close(1)},
            "stderr's reader has gone": {"stderr": gone},
            "stderr is closed": {"preexec_fn": lambda: os.close(2)},
        }
        for label, how in given.items():
            case = ground.case("merge")
            found = subprocess.run([*SCRIPT, *case.words], **{"stderr": subprocess.PIPE, **how}, text=True, check=False)
            said = found.stderr or ""
            assert weights(case.out) == ground.whole["merge"] and not case.left(), (label, said)
            assert found.returncode in (0, 1) and "Traceback" not in said and said.count("Error: ") <= 1, (label, said)
            yield [label, "merge", found.returncode, said.strip().removeprefix("Error: "), "OUT"]


SCRIPT = [sys.executable, "-c", "from coremerge.cli import script; script()"]


def from_hub(ground: Ground, faults: Iterable[str]) -> Iterator[list[object]]:
    """An adapter from a hub that errs: a refusal that names it, and the right result once the hub is well.

    Raises:
        AssertionError: it did not end as it should, or took more than a minute.
    """
    with hub.Hub(ground.folder / "given" / "adapter0") as served:
        for label in faults:
            case = ground.case("merge")
            (case.home / "cache").mkdir()
            try:
                with mounted(case.home / "cache") if label == FULL_CACHE else nullcontext():
                    if label == FULL_CACHE:
                        fill(case.home / "cache")
                    yield [f"hub: {label}", *_asked(case, served, *hub.FAULTS.get(label, (None, "No space")))]
            except SkippedError as why:
                yield [f"hub: {label}", "merge", "", f"skipped: {why}", ""]


FULL_CACHE = "the cache's disk is full"


def _asked(case: Case, served: hub.Hub, fault: hub.Fault | None, said: str) -> list[object]:
    cache, words = case.home / "cache", ["merge", hub.REPO, *case.words[2:]]
    environment = {**os.environ, **served.environment, "HF_HOME": str(cache), "HF_HUB_CACHE": str(cache)}

    def ask() -> Ended:
        found = subprocess.run([*SCRIPT, *words], env=environment, capture_output=True, text=True, check=False)
        return Ended(found.returncode, found.stderr)

    served.fault = fault
    served.asked.clear()
    start = time.monotonic()
    message = ask().message
    lasted, asked = time.monotonic() - start, len(served.asked)
    assert hub.REPO in message.replace("--", "/") and said in message and lasted < 60, (lasted, message)
    assert not case.out.exists() and not case.left()
    served.fault = None
    (cache / "filler").unlink(missing_ok=True)
    again = ask()
    assert not again.status and weights(case.out), again.said
    return [f"merge ({asked} requests, {lasted:.0f} s)", 1, case.shown(message), "nothing"]


def rows(ground: Ground, only: str) -> Iterator[list[object]]:
    """All faults whose label begins like that."""
    faults = {**REFUSED, **{label: (*given, None) for label, given in HARMLESS.items()}}
    for label, (fault, commands, names) in faults.items():
        for command in commands if label.startswith(only) else ():
            if command in ground.whole:
                yield ground.row(label, command, fault, names)
    for command in COMMANDS if TWO.startswith(only) else ():
        if command in ground.whole:
            yield [TWO, command, *together(ground, command)]
    if "stdout".startswith(only):
        yield from streams(ground)
    yield from from_hub(ground, [label for label in (*hub.FAULTS, FULL_CACHE) if f"hub: {label}".startswith(only)])


TWO = "two processes write one OUT"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", action="append", help="the beginning of a fault's name; may be repeated")
    parser.add_argument("--command", action="append", help="one command; may be repeated")
    parser.add_argument("--results", type=Path, default=results.ROOT, help="folder of RESULTS.md")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)  # a pool of threads would not be there after a fork
    found = []
    with tempfile.TemporaryDirectory() as name:
        ground = Ground(Path(name).resolve(), given.command or Ground.commands)
        for only in given.only or [""]:
            for row in rows(ground, only):
                found.append(row)
                sys.stderr.write(f"{row}\n")
    text = (
        "Each command runs while something is broken: exit status, its one message (first line), and what is in OUT's"
        " folder afterwards. Checked besides: an OUT that was there is as it was, byte for byte; and when the fault is"
        " mended, the same command writes the bytes of an undisturbed run and leaves nothing beside OUT.\n\n"
    )
    header = ["fault", "command", "exit", "message", "left"]
    results.write("Reliability: faults", text + results.table(header, found), found, seed=0, folder=given.results)


if __name__ == "__main__":
    main()
