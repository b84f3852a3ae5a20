"""A first pass over all modules, for a method that has to know something of all of them before it merges one.

It sees the cores that the merge sees, in the same groups, and keeps of them what the method takes down: see
:class:`~coremerge.methods.Survey`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from coremerge.executors import local
from coremerge.merging import Group, Updates, groups_of, seen, site_of, together
from coremerge.plan import Plan
from coremerge.recipe import Parts
from coremerge.spaces import Coordinates

WAITING = 8
"""Of what is taken down of modules, so many pieces are added at once."""


def surveyed(plan: Plan, *, threads: int | None = None, device: str = "cpu", batch: int | None = None) -> Plan:
    """``plan`` with what its method has to know of all modules; as it is where that is nothing, or known already.

    All factors are read once. The result does not depend on ``threads``, nor on the order of the modules.

    Raises:
        TensorError: factors that are not finite, or of a size that cannot be computed with.
    """
    survey = plan.resolved.method.survey
    if survey is None or plan.known is not None:
        return plan
    parts = plan.recipe.parts()

    def work(names: Group, _: Updates, coordinates: Coordinates, alone: Parts | None) -> Any:
        return survey.look(seen(names, coordinates, plan), site_of(names, plan))

    def look(names: Group) -> Any:
        return together(work, names, plan, parts, join=survey.join, device=device)

    found: list[Any] = []
    for one in local.run(look, groups_of(plan, device, batch), threads):
        found.append(one)
        if len(found) > WAITING:
            found = [survey.join(found)]
    return replace(plan, known=survey.settle(survey.join(found)))
