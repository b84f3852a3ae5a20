"""The null-space ratio of any model's activations, adapter by adapter."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from coremerge.adapter import Adapter
from coremerge.learning.backbone import Batch, frozen, inputs_of, sides_apart, token_mask
from coremerge.learning.forward import Coefficients, MergedModel, Target
from coremerge.learning.ratio import MeanRatios, row_basis

Table = dict[str, dict[str, dict[str, float]]]
"""task → adapter → module → mean ω."""


def measure_null_space(
    model: nn.Module,
    adapters: Mapping[str, Adapter],
    data: Mapping[str, Iterable[Batch]],
    *,
    weights: Mapping[str, float | Mapping[str, float | tuple[float, ...]]] | None = None,
) -> Table:
    """The mean null-space ratio of every adapter at every module, on every task's inputs.

    Args:
        model: as :func:`~coremerge.learning.learn_weights` takes it; it is not changed.
        adapters: name → adapter.
        data: task → batches; tasks need not be named after adapters.
        weights: adapter → weight, or → module → weight, that the model carries meanwhile; by default it carries none:
            these are the base model's own activations. ``{"math": 1}`` is the model with that adapter alone.

    Returns:
        task → adapter → module → ω, averaged over the tokens that count; modules that none reaches are absent.
    """
    with frozen(model), torch.no_grad():
        merged = MergedModel(model, adapters)
        bases = {n: {k: row_basis(adapters[k].read(n).right) for k in t.adapters} for n, t in merged.targets.items()}
        held = _constant(weights or {})
        found = {}
        for task, batches in data.items():
            with inputs_of(task):
                found[task] = _measured(merged, bases, batches, held)
        return found


def _measured(
    merged: MergedModel, bases: Mapping[str, Mapping[str, Tensor]], batches: Iterable[Batch], held: Coefficients
) -> dict[str, dict[str, float]]:
    means = MeanRatios()
    for batch in map(sides_apart, batches):

        def watch(target: Target, x: Tensor, batch: Batch = batch) -> None:
            mask = token_mask(batch, x)
            for key, basis in bases[target.name].items():
                means.add((key, target.name), x, basis, mask)

        with merged.run(batch, held, watch):
            pass
    found = {key: {name: means.get((key, name)) for name in bases} for key in merged.adapters}
    return {key: {name: mean for name, mean in row.items() if mean is not None} for key, row in found.items()}


def _constant(weights: Mapping[str, float | Mapping[str, float | tuple[float, ...]]]) -> Coefficients:
    def of(target: Target) -> Tensor:
        values = torch.zeros(len(target.owner))
        for k, key in enumerate(target.adapters):
            said = weights.get(key, 0.0)
            value = said.get(target.name, 1.0) if isinstance(said, Mapping) else said
            values[target.owner.cpu() == k] = torch.as_tensor(value, dtype=values.dtype)
        return values

    return of
