"""Operations that TSV + Iso-C takes on one module, counted for three ways to do it.

Flops as Golub and Van Loan count them (Matrix Computations, 4th ed., §8.3 and §8.6): a thin SVD of m × n, m ≥ n, with
both sides, 6mn² + 20n³; all eigenvectors of a symmetric n × n matrix, 9n³; a product of m × k and k × n, 2mkn.
"""

from __future__ import annotations


def thin_svd(m: int, n: int) -> int:
    """Of an m × n matrix, whichever side is longer."""
    m, n = max(m, n), min(m, n)
    return 6 * m * n**2 + 20 * n**3


def dense(m: int, n: int, adapters: int, rank: int) -> int:
    """TSV on m × n matrices, as published: an SVD of each, one of each stack of singular vectors, one of the result."""
    build = 2 * m * n * adapters * rank
    whole = min(m, n)
    stacks = thin_svd(m, whole) + thin_svd(n, whole) + 2 * m * whole * whole + 2 * n * whole * whole
    return build + adapters * thin_svd(m, n) + stacks + 2 * m * whole * n + thin_svd(m, n)


def knots(m: int, n: int, adapters: int, rank: int) -> int:
    """KnOTS's basis, the SVD of [Δ_1 … Δ_T], and the same merge on its factors of rank R."""
    total = min(adapters * rank, m)
    build = 2 * m * n * adapters * rank
    return build + thin_svd(m, adapters * n) + 4 * thin_svd(total, n)


def core(m: int, n: int, adapters: int, rank: int) -> int:
    """Gram matrices of both stacks and their eigenvectors, cores, polar factors, the SVD of the result, the lift."""
    total = adapters * rank
    grams, lift = 2 * (m + n) * total**2, 2 * (m + n) * total**2
    cores = 2 * 2 * total**2 * rank * adapters
    return grams + 2 * 9 * total**3 + cores + 3 * thin_svd(total, total) + lift
