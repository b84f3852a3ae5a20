"""``python -m coremerge.bases NAME``: the folder of a base model, made if it is not there yet."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from coremerge.cli._output import guarded, say


def main(
    name: Annotated[str, typer.Argument(help="The converter, such as dinov2.")],
    projector: Annotated[Path | None, typer.Option(help="A file with the projector, for llava.")] = None,
) -> None:
    """Print the folder of a base model, made if it is not there yet."""
    from coremerge.bases.make import make

    say(str(make(name, projector=projector)))


if __name__ == "__main__":
    typer.run(guarded(main))
