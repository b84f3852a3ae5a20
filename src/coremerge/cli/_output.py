"""What the commands print, and how they end.

Tables go to stdout, progress and warnings to stderr; a refusal is one message and exit status 1.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn, ParamSpec

import typer

from coremerge.cli import INTERRUPTED
from coremerge.text import redacted, visible, visible_json, visible_lines

P = ParamSpec("P")
Progress = Callable[[str, int, int], None]

_OPTIONS = {
    r"\ballow_pickle\b": "--allow-pickle",
    r"\bvera_width(=\.\.\.)?": "--vera-width",
    r"\binitial=\.\.\.": "--initial NAME=PATH",
    r"\bbase=": "--base ",
}
"""Remedies speak of Python's arguments; on the command line they are options."""


def guarded(command: Callable[P, None]) -> Callable[P, None]:
    """``command`` with every refusal as one message on stderr and exit status 1, and Ctrl-C as :data:`INTERRUPTED`."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        from coremerge.errors import CoremergeError

        try:
            command(*args, **kwargs)
            sys.stdout.flush()
        except CoremergeError as error:
            fail(_message(error))
        except KeyboardInterrupt:
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:
            raise  # the reader has gone: typer ends in silence
        except Exception as error:
            from coremerge.memory import out_of_memory

            if refusal := out_of_memory(error):
                fail(_message(refusal))
            if isinstance(error, OSError):
                fail(_system_message(error))
            raise

    return run


def fail(message: str) -> NoReturn:
    """One message on stderr, then the end."""
    typer.echo(f"Error: {printable(message)}", err=True)
    raise typer.Exit(1)


def _message(error: Exception) -> str:
    text, remedy = str(error), getattr(error, "remedy", None) or ""
    spoken = remedy
    for pattern, option in _OPTIONS.items():
        spoken = re.sub(pattern, option, spoken)
    return text.removesuffix(remedy) + spoken


def _system_message(error: OSError) -> str:
    reason = error.strerror or str(error) or type(error).__name__
    if error.filename is None:  # files are named, streams are not
        return f"cannot print: {reason}. Print elsewhere, or pass --quiet; a result that was to be written is there"
    return f"{error.filename}: {reason}. Check that it is there, that you may use it, and that its disk is well"


def printable(text: object) -> str:
    """``text`` on one line, without secrets; what a terminal would obey is spelt out."""
    return visible(redacted(str(text))).strip()


def unmarked(text: object) -> str:
    """``text`` for rich, which would take ``[/]`` in it for a command of its own."""
    from rich.markup import escape

    return escape(printable(text))


def say(text: str) -> None:
    """Lines on stdout, whoever wrote the names in them."""
    typer.echo(visible_lines(redacted(text)))


def remark(kind: str, text: str) -> None:
    """One line on stderr: a ``warning``, a ``note``."""
    typer.echo(f"{kind}: {printable(text)}", err=True)


def print_json(data: Any) -> None:
    """One JSON object on stdout."""
    typer.echo(visible_json(redacted(json.dumps(data, indent=2, ensure_ascii=False))))


def table(headings: Sequence[str], rows: Iterable[Sequence[object]], right: Iterable[int] = ()) -> str:
    """Aligned columns under their headings; those in ``right`` end, the others start on one line.

    Example:
        >>> print(table(["name", "rank"], [["math", 8], ["code", 16]], right=[1]))
        name  rank
        ----  ----
        math     8
        code    16
    """
    heads, *cells = [[printable(cell) for cell in row] for row in (headings, *rows)]
    widths = [max(map(len, column)) for column in zip(heads, *cells, strict=True)]
    ends = set(right)

    def line(row: Sequence[str]) -> str:
        padded = (c.rjust(w) if i in ends else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        return "  ".join(padded).rstrip()

    return "\n".join(map(line, [heads, ["-" * width for width in widths], *cells]))


def facts(pairs: Iterable[tuple[str, object]]) -> str:
    """Names and what there is to say of them, one a line.

    Example:
        >>> print(facts([("rank", 8), ("written to", "out")]))
        rank        8
        written to  out
    """
    listed = [(printable(name), printable(value)) for name, value in pairs]
    width = max((len(name) for name, _ in listed), default=0)
    return "\n".join(f"{name:{width}}  {value}".rstrip() for name, value in listed)


def duration(seconds: float) -> str:
    """A time for people.

    Example:
        >>> duration(0.0123), duration(75)
        ('0.01 s', '1 min 15 s')
    """
    if seconds < 59.5:
        return f"{seconds:.2f} s" if seconds < 9.995 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s"


def number(value: float) -> str:
    """A factor for people: at most four significant digits.

    Example:
        >>> number(1.0), number(0.123456), number(1234567.0)
        ('1', '0.1235', '1.235e+06')
    """
    return f"{value:.4g}"


@contextmanager
def progress_bar(quiet: bool = False, *, stages: bool = False) -> Iterator[Progress]:
    """A bar on stderr while the block runs; none where stderr is no terminal, or when ``quiet``.

    ``stages``: what is told of takes minutes, and each its own time: no guess of the end, and lines where there is no
    terminal.
    """
    _hush_hub(quiet)
    if quiet or not sys.stderr.isatty():
        with _warnings(quiet):
            yield _tell_stage if stages and not quiet else lambda label, done, total: None
        return
    from rich import progress
    from rich.console import Console

    columns = progress.Progress.get_default_columns()
    if stages:
        columns = (*columns[:2], progress.MofNCompleteColumn(), progress.TimeElapsedColumn())
    with _warnings(quiet), progress.Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("starting", total=None)
        yield lambda label, done, total: bar.update(task, description=unmarked(label), completed=done, total=total)


def _tell_stage(label: str, done: int, total: int) -> None:
    if done < total:
        typer.echo(f"{done + 1} of {total}: {printable(label)}", err=True)


@contextmanager
def _warnings(quiet: bool) -> Iterator[None]:
    """What the package logs is remarked on, unless ``quiet``."""
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: None if quiet else remark("warning", record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("coremerge")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def _hush_hub(quiet: bool) -> None:
    """The hub's client draws bars of its own, even into files."""
    if quiet or not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
