"""Slow, dense, float64 oracles, written from the formulas (docs: the page of maths) and not from the package's code."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

CUT = 1e-8


def rank(x: Tensor) -> int:
    s = torch.linalg.svdvals(x)
    return int((s > CUT * s[0]).sum()) if s.numel() else 0


def thin(x: Tensor, k: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """SVD cut at the numerical rank, or at ``k``."""
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    k = rank(x) if k is None else k
    return u[:, :k], s[:k], vh[:k]


def polar(x: Tensor) -> Tensor:
    """P Qᵀ of X = P S Qᵀ."""
    p, _, qh = thin(x)
    return p @ qh


def core_space(lefts: Sequence[Tensor], rights: Sequence[Tensor]) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Definition 1: U, V from SVDs of the stacked factors; M_t = Uᵀ left_t right_t V."""
    u = thin(torch.cat(list(lefts), 1))[0]
    v = thin(torch.cat(list(rights), 0))[2].T
    return u, v, [(u.T @ left) @ (right @ v) for left, right in zip(lefts, rights, strict=True)]


def balanced(x: Tensor) -> tuple[Tensor, Tensor]:
    """U√S and √S Vᵀ."""
    u, s, vh = thin(x)
    return u * s.sqrt(), s.sqrt()[:, None] * vh


def knots_space(deltas: Sequence[Tensor]) -> tuple[Tensor, Tensor, list[Tensor]]:
    """[Δ_1 … Δ_T] = U S [V_1 … V_T], a dense SVD of m × Tn."""
    u, s, vh = thin(torch.cat(list(deltas), 1))
    return u, s, list(vh.split(deltas[0].shape[1], dim=1))


def ctm_space(deltas: Sequence[Tensor], k: int = 16, share: float = 0.25) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Tucker-2 of updates rescaled towards their mean norm, by alternating SVDs of their unfoldings; P, Q, Pᵀ Δ_t Q."""
    norms = torch.stack([x.norm() for x in deltas])
    scaled = [x / n * (share * n + (1 - share) * norms.mean()) for x, n in zip(deltas, norms, strict=True) if n > 0]
    if not scaled:
        scaled = list(deltas)
    left, right = thin(torch.cat(scaled, 1))[0], thin(torch.cat(scaled, 0))[2].T
    left, right, kept = left[:, :k], right[:, :k], 0.0
    for _ in range(1000):
        left = torch.linalg.svd(torch.cat([x @ right for x in scaled], 1))[0][:, : left.shape[1]]
        right = torch.linalg.svd(torch.cat([left.T @ x for x in scaled], 0))[2].T[:, : right.shape[1]]
        before, kept = kept, sum(float((left.T @ x @ right).square().sum()) for x in scaled)
        if kept - before <= 1e-6 * kept:
            break
    return left, right, [left.T @ x @ right for x in deltas]


def sum_(xs: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(xs)).sum(0)


def mean(xs: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(xs)).mean(0)


def ties(xs: Sequence[Tensor], density: float = 0.2, reduce: str = "mean") -> Tensor:
    """Trim to the largest ``density`` of the entries, elect the sign of the sum, average those that agree."""
    trimmed = []
    for x in xs:
        keep = max(1, round(density * x.numel()))
        kept = torch.zeros_like(x).flatten()
        top = x.abs().flatten().argsort(descending=True)[:keep]
        kept[top] = x.flatten()[top]
        trimmed.append(kept.reshape(x.shape))
    out = torch.zeros_like(xs[0])
    for i in range(out.shape[0]):
        for j in range(out.shape[1]):
            elected = sum(x[i, j].item() for x in trimmed)
            agree = [x[i, j].item() for x in trimmed if x[i, j].item() * elected > 0]
            out[i, j] = sum(agree) / (len(agree) if reduce == "mean" and agree else 1)
    return out


def dropped(xs: Sequence[Tensor], masks: Sequence[Tensor], drop_rate: float = 0.5) -> list[Tensor]:
    """Each entry that its mask keeps, over 1 − drop_rate."""
    return [x * mask / (1 - drop_rate) for x, mask in zip(xs, masks, strict=True)]


def dare(xs: Sequence[Tensor], uniforms: Sequence[Tensor], drop_rate: float = 0.5) -> Tensor:
    """The sum of what is kept, where the uniform numbers are at least drop_rate."""
    return sum_(dropped(xs, [(u >= drop_rate).double() for u in uniforms], drop_rate))


def dare_ties(xs: Sequence[Tensor], uniforms: Sequence[Tensor], drop_rate: float = 0.5, density: float = 0.2) -> Tensor:
    """TIES of what DARE keeps."""
    return ties(dropped(xs, [(u >= drop_rate).double() for u in uniforms], drop_rate), density)


def tsv(xs: Sequence[Tensor], k: int | None = None) -> Tensor:
    """polar([U_1 … U_T]) · diag(S_1 … S_T) · polar([V_1 … V_T])ᵀ."""
    us, ss, vhs = zip(*(thin(x, k) for x in xs), strict=True)
    return polar(torch.cat(us, 1)) @ torch.diag(torch.cat(ss)) @ polar(torch.cat(vhs, 0))


def cart(xs: Sequence[Tensor], k: int = 8, scale: float = 1.0) -> Tensor:
    """mean + scale · Σ_t truncate_k(X_t − mean)."""
    centre = mean(xs)
    result = centre.clone()
    for x in xs:
        u, s, vh = torch.linalg.svd(x - centre, full_matrices=False)
        result += scale * u[:, :k] @ torch.diag(s[:k]) @ vh[:k]
    return result


def magnitude(xs: Sequence[Tensor], density: float = 0.5) -> Tensor:
    """The sum of each task's largest entries."""
    total = torch.zeros(xs[0].shape, dtype=xs[0].dtype)
    for x in xs:
        order = x.abs().flatten().argsort(descending=True)[: max(1, round(density * x.numel()))]
        total.flatten()[order] += x.flatten()[order]
    return total


def breadcrumbs(xs: Sequence[Tensor], density: float = 0.9, gamma: float = 0.01) -> Tensor:
    """The sum of each task's entries between its largest and its smallest ones."""
    total = torch.zeros(xs[0].shape, dtype=xs[0].dtype)
    for x in xs:
        keep = max(1, round(density * x.numel()))
        top = min(round(gamma * x.numel()), x.numel() - keep)
        order = x.abs().flatten().argsort(descending=True)[top : top + keep]
        total.flatten()[order] += x.flatten()[order]
    return total


def della(xs: Sequence[Tensor], uniforms: Sequence[Tensor], density: float = 0.5, epsilon: float = 0.1) -> Tensor:
    """Row by row, kept by rank, over the probability; then TIES without its trimming."""
    kept = []
    for x, u in zip(xs, uniforms, strict=True):
        y = torch.zeros_like(x)
        for i, row in enumerate(x):
            for place, j in enumerate(sorted(range(len(row)), key=lambda j: abs(row[j].item()))):
                p = density - epsilon + 2 * epsilon * place / (len(row) - 1) if len(row) > 1 else density
                y[i, j] = row[j] / p if u[i, j] < p else 0.0
        kept.append(y)
    return ties(kept, density=1.0)


def dc(xs: Sequence[Tensor], smoothing: str = "average", rho: float = 5.0, density: float = 0.001) -> Tensor:
    """Smooth, see all in polar factors of both stacks, keep the largest entries, TIES's mean, diagonal blocks alone."""
    parts = [thin(x) for x in xs]
    left, right = polar(torch.cat([u for u, _, _ in parts], 1)), polar(torch.cat([vh for _, _, vh in parts], 0))
    ms, mask = [], torch.zeros(left.shape[1], left.shape[1], dtype=torch.float64)
    for u, s, vh in parts:
        r = len(s)
        ratio = 1.0 if smoothing == "average" or not r else min(rho, float(s[0] / s[-1]))
        line = torch.linspace(ratio, 1.0, r, dtype=torch.float64)
        m = left.T @ u @ torch.diag(s if smoothing == "own" else s.sum() * line / line.sum()) @ vh @ right.T
        kept = m.abs().flatten().sort(descending=True).values[: max(1, r, int(density * m.numel()))]
        ms.append(torch.where(m.abs() >= kept[-1] * (1 - 1e-7) if len(kept) else m != 0, m, 0.0))
        at = len(mask) - sum(len(own[1]) for own in parts[len(ms) - 1 :])
        mask[at : at + r, at : at + r] = 1
    ms = [torch.where(m.abs() > 1e-7, m, 0.0) for m in ms]
    return left @ (mask * ties(ms, density=1.0)) @ right if left.shape[1] else torch.zeros_like(xs[0])


def pcb(xs: Sequence[Tensor], density: float = 0.1) -> Tensor:
    """exp(T norm(x)²) · x · Σ x, its top share, min–max over what is kept; the mean of x by these weights."""
    whole, count = sum_(xs), sum(bool(x.norm() > 0) for x in xs)
    top, bottom = torch.zeros_like(whole), torch.zeros_like(whole)
    for x in (x for x in xs if x.norm() > 0):
        score = torch.exp(count * (x / x.abs().max()) ** 2) * x * whole
        ordered = [*score.flatten().sort(descending=True).values.tolist(), 0.0]
        least = max(0.0, ordered[max(1, round(density * x.numel()))]) if density < 1 else 0.0
        weight = (score - least).clamp(min=0) / (ordered[0] - least)
        top, bottom = top + weight * x, bottom + weight
    return torch.where(bottom > 0, top / bottom, 0.0)


def sce(xs: Sequence[Tensor], select_topk: float = 1.0) -> Tensor:
    """The entries of largest variance; of those each task's share of squares; the mean by it of the majority's sign."""
    stack = torch.stack(list(xs))
    if select_topk < 1 and len(xs) > 1:
        variance = ((stack - stack.mean(0)) ** 2).mean(0)
        there = variance > CUT**2 * variance.max()
        keep = max(1, int(select_topk * int(there.sum())))
        stack = stack * (there & (variance >= variance.flatten().sort(descending=True).values[keep - 1]))
    shares = stack.square().sum((1, 2), keepdim=True)
    weights = shares * (stack.sign() == stack.sum(0).sign()) * (stack != 0)
    total = weights.sum(0)
    return torch.where(total > 0, (weights * stack).sum(0) / total, 0.0)


def cts(xs: Sequence[Tensor], common: float = 0.8) -> Tensor:
    """The top of the sum, the top of each task's residual, polar factors of both sides; rank-counted Iso-CTS."""
    u, s, vh = thin(sum_(xs))
    d, t = len(s), max(1, sum(bool(x.norm() > 0) for x in xs))
    each = min(round((d - int(common * d)) / t), d // t)
    k = d - each * t
    us, ss, vhs = [u[:, :k]], [s[:k]], [vh[:k]]
    for x in xs:
        rest = x - u[:, :k] @ u[:, :k].T @ x
        left, values, right = torch.linalg.svd(rest, full_matrices=False)
        there = min(each, int((values > CUT * torch.linalg.svdvals(x)[0]).sum()))
        us, ss, vhs = [*us, left[:, :there]], [*ss, values[:there]], [*vhs, right[:there]]
    return polar(torch.cat(us, 1)) @ torch.diag(torch.cat(ss)) @ polar(torch.cat(vhs, 0))


def wudi(xs: Sequence[Tensor]) -> Tensor:
    """(Σ c X Xᵀ X)(Σ c Xᵀ X)⁺, c = 1/‖X‖², of the tasks that are not zero."""
    there = [x for x in xs if x.norm() > 0]
    if not there:
        return torch.zeros_like(xs[0])
    gram = sum(x.T @ x / x.norm() ** 2 for x in there)
    return sum(x @ x.T @ x / x.norm() ** 2 for x in there) @ torch.linalg.pinv(gram, rtol=CUT**1.5, hermitian=True)


def whiten(xs: Sequence[Tensor], ridge: float = 0.03, faint: float = 0.03) -> Tensor:
    """W(U) S W(V)ᵀ, W(U) = √(1 + ridge) B (BᵀB + ridge D)^-½, B = U √D, D = d(σ/σ_t) d(σ_t/σ₁), d = x²/(x² + f²)."""
    parts = [thin(x) for x in xs if x.norm() > 0]
    if not parts:
        return torch.zeros_like(xs[0])
    s = torch.cat([part[1] for part in parts])
    d = torch.cat([_say(own / own[0], faint) * _say(own[0] / s.max(), faint) for _, own, _ in parts])

    def white(vectors: Tensor) -> Tensor:
        b = vectors @ torch.diag(d**0.5)
        values, basis = torch.linalg.eigh(b.T @ b + ridge * torch.diag(d))
        return (1 + ridge) ** 0.5 * b @ basis @ torch.diag(values**-0.5) @ basis.T

    left, right = torch.cat([part[0] for part in parts], 1), torch.cat([part[2] for part in parts], 0).T
    return white(left) @ torch.diag(s) @ white(right).T


def _say(x: Tensor, faint: float) -> Tensor:
    return x**2 / (x**2 + faint**2)


def soften(x: Tensor, p: float = 0.5) -> Tensor:
    """P Sᵖ Qᵀ · tr S / tr Sᵖ over the numerical rank."""
    left, s, right = thin(x)
    return left @ torch.diag(s**p * s.sum() / (s**p).sum()) @ right if s.numel() else torch.zeros_like(x)


def star(x: Tensor, keep: float = 0.4) -> Tensor:
    """The fewest directions with the share ``keep`` of the nuclear norm, scaled to the whole of it."""
    left, s, right = thin(x)
    k = next((i + 1 for i in range(len(s)) if s[: i + 1].sum() >= keep * s.sum()), 0)
    return left[:, :k] @ torch.diag(s[:k] * s.sum() / s[:k].sum()) @ right[:k] if k else torch.zeros_like(x)


def lines(x: Tensor, layer: int | None = None, last: int = 1, alpha: float = 0.5, beta: float = 1.0) -> Tensor:
    """(α + β · l / (L − 1)) X; outside of layers α X."""
    return (alpha if layer is None else alpha + beta * layer / last) * x


def svc(x: Tensor, inputs: Sequence[Tensor], alpha: float | None = None, faint: float = 0.01) -> Tensor:
    """Σ γ σ u vᵀ, γ = Σ d_t / Σ d_t max(α, ⟨uᵀX, uᵀX_t⟩ / ‖uᵀX_t‖²), α = 1 / Σ d_t; d_t = 1 but for faint uᵀX_t."""
    u, s, vh = thin(x)
    out = torch.zeros_like(x)
    for r in range(len(s)):
        rows = [u[:, r] @ y for y in inputs if (u[:, r] @ y).norm() > 0]
        d = [(1 + faint**2) * float(_say(row.norm() / max(other.norm() for other in rows), faint)) for row in rows]
        least = alpha or 1 / max(1, sum(d))
        whole = sum(own * max(least, float(u[:, r] @ x @ row / (row @ row))) for own, row in zip(d, rows, strict=True))
        out += (sum(d) / whole if rows else 1.0) * s[r] * torch.outer(u[:, r], vh[r])
    return out


def isotropize(x: Tensor, span: bool = True) -> Tensor:
    """mean(S) · P Qᵀ over the numerical rank, or over all min(p, q) directions."""
    p, s, qh = thin(x) if span else torch.linalg.svd(x, full_matrices=False)
    return s.mean() * p @ qh if s.numel() else torch.zeros_like(x)


def truncate(x: Tensor, k: int) -> Tensor:
    """The best approximation of rank k."""
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    return u[:, :k] @ torch.diag(s[:k]) @ vh[:k]


def auto_scale(merged: Sequence[Tensor], inputs: Sequence[Sequence[Tensor]]) -> float:
    """λ with mean_l ‖λ merged‖₂ / mean_t ‖Δ_t‖₂ × mean_l ‖λ merged‖_F / mean_t ‖Δ_t‖_F = 1."""
    product = 1.0
    for order in (2, "fro"):
        ratios = []
        for result, deltas in zip(merged, inputs, strict=True):
            norms = [torch.linalg.matrix_norm(delta, order).item() for delta in deltas]
            norms = [x for x in norms if x > 0]
            ratios.append(torch.linalg.matrix_norm(result, order).item() / (sum(norms) / len(norms)))
        product *= sum(ratios) / len(ratios)
    return product**-0.5
