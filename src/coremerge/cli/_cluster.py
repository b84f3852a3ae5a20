"""Options of all commands that can do their work on a cluster: see :func:`coremerge.cli._options.executor`."""

from __future__ import annotations

from typing import Annotated

import typer

ExecutorName = Annotated[
    str, typer.Option(help="Who does the work: local, this process, or ray, a cluster.", metavar="NAME")
]
Address = Annotated[
    str | None,
    typer.Option(help="Of the Ray cluster; default: the one at hand, else one on this machine.", metavar="HOST:PORT"),
]
Gpus = Annotated[int, typer.Option(min=1, help="Of each copy of the model on a cluster, with --device auto or cuda.")]
