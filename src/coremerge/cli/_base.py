"""The option that says what a base model runs in, the same wherever one is run."""

from __future__ import annotations

from typing import Annotated

import typer

BaseDtype = Annotated[
    str,
    typer.Option(
        "--base-dtype",
        help="Of the base model: auto, float32, bfloat16, float16. auto: as its files; of float16, float32 on a CPU.",
        metavar="DTYPE",
    ),
]
