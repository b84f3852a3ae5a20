"""PCB: entries compete within their task and with those of others."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import oracles
from coremerge.methods import METHODS, Site
from laws import LowRank, close, largest, lowrank, make, merged, named, normal, run, stacks

GENERIC = ("plain", "same right", "same left", "duplicate")


@given(stacks(kinds=GENERIC, low=5), st.sampled_from([0.05, 0.2, 0.6, 1.0]))
def test_it_is_its_oracle_in_full_space(updates: list[LowRank], density: float) -> None:
    found = merged(updates, method="pcb", space="full", parameters={"density": density})
    close(found, oracles.pcb([u.dense() for u in updates], density), largest(updates), tol=1e-8)


def published(flat: torch.Tensor, ratio: float, clip: float) -> torch.Tensor:
    """The formulas of the published code; one entry more is kept, as here."""
    n, d = flat.shape

    def norm(x: torch.Tensor) -> torch.Tensor:
        low, high = x.min(1, keepdim=True).values, x.max(1, keepdim=True).values
        return (x - low) / (high - low)

    size = flat.abs()
    size = size.minimum(size.sort(1).values[:, int(d * (1 - clip) - 1)].unsqueeze(1))
    score = torch.exp(n * norm(size) ** 2) * torch.tanh(flat * flat.sum(0))
    least = score.sort(1).values[:, int(d * (1 - ratio)) - 1].unsqueeze(1)
    scale = norm(score.maximum(least))
    return (flat.sign() * size * scale).sum(0) / scale.sum(0).clamp(min=1e-12)


@pytest.mark.parametrize("clip", [0.0, 0.01])
@pytest.mark.parametrize("ratio", [0.05, 0.1, 0.3])
def test_it_is_the_published_code_at_the_sizes_of_adapters(ratio: float, clip: float) -> None:
    updates = [lowrank(40, 30, 3, seed=s) * 1e-3 for s in range(4)]
    flat = torch.stack([u.dense().flatten() for u in updates])
    found = merged(updates, method="pcb", space="full", parameters={"density": ratio, "clip": clip})
    close(found.flatten(), published(flat, ratio, clip), tol=1e-4)  # its norm begins at the smallest entry, not at 0


def test_entries_against_the_sum_lose() -> None:
    x = torch.tensor([[[4.0, 1.0, 3.0]], [[-1.0, 1.0, 3.0]]], dtype=torch.float64)
    one = [LowRank(row.mT, torch.ones(1, 1).double()) for row in x]
    found = METHODS.build("pcb:density=1")(one, Site())
    assert found[0, 0] == 4 and found[2, 0] == pytest.approx(3)


@pytest.mark.parametrize("factor", [1e-80, -1e80])
def test_it_does_not_depend_on_scale(factor: float) -> None:
    updates = [lowrank(9, 7, 2, seed=s) for s in range(3)]
    close(merged([u * factor for u in updates], method="pcb") / factor, merged(updates, method="pcb"), tol=1e-8)
    faint = [*updates[:2], updates[2] * 1e-120]
    assert bool(merged(faint, method="pcb").isfinite().all())


def test_one_adapter_and_copies_come_back() -> None:
    a = lowrank(8, 6, 2)
    close(merged([a], method="pcb"), a.dense())
    close(merged([a, a, a], method="pcb"), a.dense())
    assert run(named([a, a]), method="pcb").report.alone == 1
    few = merged([a], method="pcb", space="full", parameters={"density": 0.25})
    assert int((few != 0).sum()) >= 12 and int((few.abs() > 1e-9).sum()) == 12


def test_what_rounding_made_does_not_compete() -> None:
    deficient = make("deficient", 9, 7, 3, normal(11), [])
    updates = [lowrank(9, 7, 3, seed=1), deficient, lowrank(9, 7, 2, seed=2)]
    noisy = [updates[0], deficient + lowrank(9, 7, 1, seed=4) * 1e-17, updates[2]]
    how = {"method": "pcb", "space": "full", "steps": ["balance"], "parameters": {"density": 1}}
    close(merged(updates, **how), merged(noisy, **how), tol=1e-8)
    close(merged(updates, **how), oracles.pcb([u.dense() for u in updates], 1.0), tol=1e-8)
