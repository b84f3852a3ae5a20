"""coremerge report: a merge to look at."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from coremerge.cli._output import progress_bar, say


def report(
    folder: Annotated[Path, typer.Argument(help="What coremerge merge wrote.", metavar="OUT", show_default=False)],
    *,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Default: report.html in that folder.", metavar="FILE.html")
    ] = None,
    inputs: Annotated[
        list[str] | None,
        typer.Option(
            "--input",
            help="Where the adapters are now, in the merge's order. Default: where they were.",
            metavar="ADAPTER",
        ),
    ] = None,
    weights: Annotated[
        Path | None, typer.Option(help="Learned weights, for their path.", metavar="WEIGHTS.safetensors")
    ] = None,
    scores: Annotated[
        Path | None, typer.Option(help="What coremerge evaluate --json printed.", metavar="SCORES.json")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Modules side by side. Default: all processors.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace FILE.html if it is there already.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
) -> None:
    """Draw a merge: one HTML file.

    What went in, what came out and what was dropped; spectra and ranks; how alike the adapters are and what is kept of
    each; weights and scores. It opens without a network.
    """
    from coremerge.formats.atomic import check_file, write_file
    from coremerge.report.page import FILE, is_report, report_page

    target = out or folder / FILE
    overwrite = overwrite or (out is None and is_report(target))
    check_file(target, overwrite=overwrite)
    with progress_bar(quiet) as bar:
        page = report_page(folder, inputs=inputs, weights=weights, scores=scores, threads=threads, progress=bar)
    write_file(target, page, overwrite=overwrite)
    if not quiet:
        say(f"written to {target}")
