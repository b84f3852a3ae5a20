"""WUDI in closed form: the update that is nearest to each task's on that task's own rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from coremerge.lowrank import LowRank
from coremerge.methods import METHODS, Method, Site


@METHODS.register("wudi", unitary=True, source="WUDI-Merging, arXiv 2503.08099; solved here, not descended to")
def wudi() -> Method:
    """The X of least norm that minimises Σ_t ‖(X − X_t) X_tᵀ‖² / ‖X_t‖².

    X = (Σ c_t X_t X_tᵀ X_t)(Σ c_t X_tᵀ X_t)⁺ with c_t = 1/‖X_t‖²: each task's own rows stand for its inputs. The
    pseudo-inverse is that of the stack of √c_t X_t, over its numerical rank.
    """

    def merge(cores: Sequence[LowRank], site: Site) -> LowRank:
        parts = [core.svd.significant() for core in cores]
        rows, targets, errors = [], [], []
        for part in parts:
            values = part.values / part.values.square().sum(-1, keepdim=True).sqrt().clamp_min(_LEAST)
            rows.append(values.unsqueeze(-1) * part.right)
            targets.append(part.left * (values * part.values).unsqueeze(-2))
            errors.append(torch.zeros_like(values) if part.noise is None else part.noise / part.values)
        stack = torch.cat(rows, -2)
        ones = torch.eye(stack.shape[-2], dtype=stack.dtype, device=stack.device).expand(*stack.shape[:-1], -1)
        found = LowRank(ones, stack, torch.cat(errors, -1).double()).svd.significant()
        inverse = found.values.reciprocal().unsqueeze(-2)
        return LowRank(torch.cat(targets, -1) @ (found.left * inverse), found.right)

    return merge


_LEAST = 1e-300
"""In place of the norm of nothing, which has no rows."""
