"""What adds nothing to a merge is told; a result of nothing but zeros is refused, unless it was asked for by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from coremerge.errors import InputError

if TYPE_CHECKING:
    from coremerge.outcome import ModuleReport, Report
    from coremerge.plan import Plan

CANCELLED = 1e-12
"""A merge whose norm is below this share of its inputs' is rounding error: nothing is left of it."""


def planned_zeros(plan: Plan) -> Iterator[str]:
    """A warning for each adapter that adds nothing by its weights or its config, and for a scale of 0."""
    for key, adapter in plan.adapters.items():
        if not any(plan.weights[key].values()):
            yield f"{key} has weight 0: it adds nothing to the merge"
        elif not any(module.scale for module in adapter.modules.values()):
            yield f"{key} adds nothing to the merge: its scale (lora_alpha / r) is 0 in all of its modules"
    if plan.recipe.scale == 0:
        yield "the scale is 0: the result is zero in all modules"


def found_zeros(plan: Plan, modules: Mapping[str, ModuleReport]) -> Iterator[str]:
    """A warning for each adapter whose factors are zero, and one for modules of which the method leaves nothing."""
    for key, adapter in plan.adapters.items():
        counted = any(plan.weights[key].values()) and any(module.scale for module in adapter.modules.values())
        if counted and all(key in modules[name].zero for name in adapter):
            yield (
                f"{key} adds nothing to the merge: lora_A or lora_B is zero in all of its {len(adapter)} modules, as"
                " before any training"
            )
    least = CANCELLED * heaviest(plan)
    empty = [name for name, module in modules.items() if _has_inputs(plan, name, module) and _is_nothing(module, least)]
    if empty:
        yield f"nothing is left of the adapters in {len(empty)} of {len(modules)} modules"


def check_not_all_zeros(plan: Plan, report: Report) -> None:
    """Refuse a merge that is zero in all modules, though neither the scale nor all weights are 0, and has nothing else.

    Raises:
        InputError: nothing is left.
    """
    asked = plan.recipe.scale == 0 or not any(any(weights.values()) for weights in plan.weights.values())
    others = any(extra.load for extra in plan.extras.values()) or any(a.biases for a in plan.adapters.values())
    least = CANCELLED * heaviest(plan)
    if asked or others or not all(_is_nothing(module, least) for module in report.modules.values()):
        return
    count = len(report.modules)
    if not any(_has_inputs(plan, name, module) for name, module in report.modules.items()):
        raise InputError(
            f"nothing to merge: the adapters ({', '.join(plan.adapters)}) are zero in all of {count} modules",
            remedy="Check that they were trained, lora_alpha in their configs, and the weights; --scale 0 writes zeros",
        )
    raise InputError(
        f"nothing is left: the merge of {', '.join(plan.adapters)} is zero in all of {count} modules",
        remedy=f"Check the weights, and the parameters of {plan.resolved.method}; --scale 0 writes zeros",
    )


def _has_inputs(plan: Plan, name: str, module: ModuleReport) -> bool:
    """Whether an adapter that counts is not zero there."""
    return any(plan.weights[key][name] and key not in module.zero for key in module.ranks)


def _is_nothing(module: ModuleReport, least: float) -> bool:
    """Whether a merge's norm is at most the share ``least`` of its inputs'."""
    return module.norm <= least * module.input_norm


def heaviest(plan: Plan) -> float:
    """The largest weight: what has cancelled out next to it has no size of its own."""
    return max((abs(weight) for modules in plan.weights.values() for weight in modules.values()), default=1.0)
