"""Keep the leading components of the merged core."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from coremerge.lowrank import thin_svd
from coremerge.steps import STEPS, After, Step


@STEPS.register("truncate", unitary=True)
def truncate(rank: Annotated[int, Field(ge=1)]) -> Step:
    """After merging: the best approximation of rank ``rank`` (Eckart–Young).

    The place in the list matters: before ``isotropize`` it chooses what is flattened. To choose the size of the
    output, ``--rank`` is the option.
    """
    return After(lambda core: thin_svd(core).truncate(rank))
