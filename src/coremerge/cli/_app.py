"""The commands under one roof.

Only typer is imported here; torch and its friends come when a command needs them, so that ``--help`` is quick.
"""

from __future__ import annotations

from typing import Annotated

import typer

from coremerge import __version__
from coremerge.cli._output import guarded
from coremerge.cli.batch import batch
from coremerge.cli.demo import demo
from coremerge.cli.evaluate import evaluate
from coremerge.cli.fit import fit
from coremerge.cli.inspect import inspect
from coremerge.cli.learn_weights import learn_weights
from coremerge.cli.merge import merge
from coremerge.cli.methods import methods
from coremerge.cli.report import report
from coremerge.cli.search import search

app = typer.Typer(
    name="coremerge",
    help="Merge low-rank adapters: any LoRA-like adapters in, one adapter out, exact scales, no base model needed.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": [], "max_content_width": 100},  # its own --help is below
)
for command in (merge, batch, inspect, fit, learn_weights, evaluate, search, report, methods, demo):
    app.command(
        command.__name__.replace("_", "-"),
        no_args_is_help=command in (merge, batch, inspect, fit, learn_weights, evaluate, search, report),
        context_settings={"help_option_names": ["--help", "-h"], "max_content_width": 100},
    )(guarded(command))


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"coremerge {__version__}")
        raise typer.Exit


def _show_help(context: typer.Context, asked: bool) -> None:
    """In place of typer's own: that one imports pydantic even for the help of a command (0.1 s)."""
    if asked:
        typer.echo(context.get_help())
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and stop.")
    ] = False,
    asked: Annotated[
        bool, typer.Option("--help", "-h", callback=_show_help, is_eager=True, help="Show this message and exit.")
    ] = False,
) -> None:
    pass
