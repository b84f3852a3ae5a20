"""The textbook ways to merge one module, from the dense m × n updates, in float32 as their authors' code does."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def svd(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Thin SVD."""
    return torch.linalg.svd(x, full_matrices=False)  # type: ignore[no-any-return]


def tsv(updates: Sequence[Tensor]) -> Tensor:
    """TSV-Merge, all in full: T + 2 SVDs. Each task keeps min(m, n)/T of its singular vectors (arXiv 2412.00081)."""
    kept = min(updates[0].shape) // len(updates)
    parts = [svd(update) for update in updates]
    left = orthogonal(torch.cat([u[:, :kept] for u, _, _ in parts], 1))
    right = orthogonal(torch.cat([vh[:kept] for _, _, vh in parts], 0))
    return (left * torch.cat([s[:kept] for _, s, _ in parts])) @ right


def iso_c(updates: Sequence[Tensor]) -> Tensor:
    """Iso-C, one SVD of the sum: all its singular values at their mean (arXiv 2502.04959)."""
    u, s, vh = svd(torch.stack(list(updates)).sum(0))
    return s.mean() * (u @ vh)


def orthogonal(x: Tensor) -> Tensor:
    """The nearest orthogonal matrix (Procrustes), by an SVD."""
    u, _, vh = svd(x)
    return u @ vh


def knots_basis(updates: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """The SVD of [Δ_1 … Δ_T] (m × Tn) that KnOTS starts from (arXiv 2410.19735); merging then costs little more."""
    return svd(torch.cat(list(updates), 1))
