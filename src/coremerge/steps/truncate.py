"""Keep the leading components of the merged core."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from coremerge.lowrank import thin_svd
from coremerge.registry import directions
from coremerge.steps import STEPS, After, Step


@STEPS.register(
    "truncate",
    unitary=True,
    keeps=lambda values: values["rank"],
    cuts=lambda values: [f"keeps at most {directions(values['rank'])} of the merged update"],
)
def truncate(rank: Annotated[int, Field(ge=1)]) -> Step:
    """After merging: the best approximation of rank ``rank`` (Eckart–Young).

    The place in the list matters: before ``isotropize`` it chooses what is flattened. To choose the size of the
    output, ``--rank`` is the option.
    """
    return After(lambda core: thin_svd(core).truncate(rank))
