"""coremerge batch: many merges in one go."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from coremerge.cli._cluster import Address, ExecutorName
from coremerge.cli._output import duration, facts, fail, print_json, progress_bar, remark, table
from coremerge.text import size

if TYPE_CHECKING:
    from coremerge.batch import BatchReport


def batch(
    manifest: Annotated[
        Path, typer.Argument(help="Recipes and sets of adapters.", metavar="MANIFEST.yaml", show_default=False)
    ],
    *,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="The folder of all results: DIR/SET/RECIPE each.", metavar="DIR")
    ],
    only: Annotated[
        list[str] | None,
        typer.Option(help="Of the jobs, as 'all/ties' or 'all/*'; may be repeated.", metavar="NAME"),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Make results anew that were made from something else.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and write nothing.")] = False,
    allow_pickle: Annotated[bool, typer.Option("--allow-pickle", help="Read legacy .bin files, too.")] = False,
    device: Annotated[str, typer.Option(help="Where the linear algebra runs: cpu, cuda, cuda:1.")] = "cpu",
    threads: Annotated[
        int | None,
        typer.Option(min=1, help="Modules of a job side by side. Default: all processors; on a cluster 1."),
    ] = None,
    executor: ExecutorName = "local",
    address: Address = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
) -> None:
    """Make many merges: every recipe on every set of adapters.

    Each result is written whole or not at all. A job that fails does not stop the others; the same command again does
    what is missing.
    """
    from coremerge.batch import run_batch
    from coremerge.cli import _options

    cluster = _options.executor(executor, address, device)
    command = ["coremerge", "batch", str(manifest), "-o", str(out)]
    command += ["--allow-pickle"] if allow_pickle else []
    command += ["--device", device] if device != "cpu" else []
    with progress_bar(quiet) as bar:
        try:
            with nullcontext() if dry_run else cluster as elsewhere:
                report = run_batch(
                    manifest,
                    out,
                    only=only or (),
                    threads=threads,
                    device=device,
                    allow_pickle=allow_pickle,
                    overwrite=overwrite,
                    dry_run=dry_run,
                    command=command,
                    executor=elsewhere,
                    progress=bar,
                )
        except KeyboardInterrupt:
            if not dry_run:
                remark("note", f"finished results stay in {out}: the same command goes on from there")
            raise
    if as_json:
        print_json(report.to_dict())
    elif not quiet:
        typer.echo(_text(report, dry_run))
    if not quiet:
        _notes(report)
    if report.failed:
        _end(report, quiet)


def _text(report: BatchReport, dry_run: bool) -> str:
    """All jobs, why some failed, and how many there are of each kind."""
    rows = [(row.name, row.status, duration(row.seconds), size(row.bytes) if row.bytes else "") for row in report.rows]
    counts = [*((status, count) for status, count in report.counts.items()), ("time", duration(report.seconds))]
    place = "not written: dry run" if dry_run else report.out
    parts = [
        table(["job", "", "time", "size"], rows, right=(2, 3)),
        facts((row.name, row.error) for row in report.failed),
        facts([*counts, ("output", place)]),
    ]
    return "\n\n".join(filter(None, parts))


def _end(report: BatchReport, quiet: bool) -> NoReturn:
    """Exit status 1; what is not on stdout is on stderr."""
    *others, last = (f"{row.name}: {row.error}" for row in report.failed)
    if not quiet:
        fail(f"{len(report.failed)} of {len(report.rows)} jobs failed")
    for text in others:
        remark("Error", text)
    fail(last)


def _notes(report: BatchReport) -> None:
    """What there is to know, each once, with the jobs it is about."""
    from coremerge.formats.checkpoint import shorten

    said: dict[str, list[str]] = {}
    for row in report.rows:
        for text in row.notes:
            said.setdefault(text, []).append(row.name)
    for text, names in said.items():
        remark("note", f"{shorten(names)}: {text}")
