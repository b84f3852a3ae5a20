import pytest
import torch
from hypothesis import given

from coremerge import linalg
from coremerge.linalg import RaggedRankError, column_basis, numerical_rank, polar, product_svd, qr, svd
from laws import LowRank, close, normal, stacks

EYE = torch.eye(12, dtype=torch.float64)


@given(stacks())
def test_a_column_basis_is_orthonormal_and_spans_its_stack(updates: list[LowRank]) -> None:
    stack = torch.cat([u.left for u in updates], 1)
    if stack.shape[1] == 0:
        return
    basis, values = column_basis(stack), torch.linalg.svdvals(stack)
    p = int((values > 1e-8 * values[0]).sum())
    assert basis.rank == p
    vectors = stack @ basis.transform
    close(vectors.T @ vectors, EYE[:p, :p] if p <= 12 else torch.eye(p).double(), 1.0, tol=1e-6)
    close(vectors @ basis.coordinates, stack, stack.abs().max().item() or 1.0)
    close(basis.coordinates @ basis.coordinates.T, torch.diag(values[:p].square()), values[:1].square().item() or 1.0)


@pytest.mark.parametrize("smallest", [1.0, 1e-2, 1e-5, 1e-7, 1e-9])
def test_the_basis_of_an_ill_conditioned_stack_is_as_good(smallest: float) -> None:
    draw = normal()
    stack = (
        linalg.qr(draw(40, 5))[0] * torch.tensor([1, 0.9, 0.8, 0.7, smallest], dtype=torch.float64) @ qr(draw(5, 5))[0]
    )
    basis = column_basis(stack)
    assert basis.rank == (5 if smallest > linalg.RTOL else 4)
    vectors = stack @ basis.transform
    close(vectors.T @ vectors, EYE[: basis.rank, : basis.rank], 1.0, tol=1e-7)
    close(vectors @ basis.coordinates, stack, 1.0, tol=2e-9)


@given(stacks())
def test_any_basis_is_orthonormal_and_spans_the_stack(updates: list[LowRank]) -> None:
    stack = torch.cat([u.left for u in updates], 1)
    basis, reference = column_basis(stack, singular=False), column_basis(stack)
    assert basis.rank == reference.rank
    vectors = stack @ basis.transform
    close(vectors.T @ vectors, torch.eye(basis.rank).double(), 1.0, tol=1e-6)
    close(vectors @ basis.coordinates, stack, stack.abs().max().item() if stack.numel() else 1.0)


def test_any_basis_is_triangular_where_the_stack_is_well_conditioned() -> None:
    stack = normal()(3, 40, 5)
    coordinates = column_basis(stack, singular=False).coordinates
    assert torch.equal(coordinates, coordinates.triu())
    close(coordinates.mT @ coordinates, stack.mT @ stack, 40.0)
    stack[1, :, 4] = stack[1, :, 0] + 1e-5 * stack[1, :, 4]
    vectors = stack @ column_basis(stack, singular=False).transform  # one of a batch is ill-conditioned: all by QR
    close(vectors.mT @ vectors, torch.eye(5).double().expand(3, 5, 5), 1.0, tol=1e-9)


def test_a_zero_column_has_coordinates_of_exactly_zero() -> None:
    draw = normal()
    stack = torch.cat([draw(9, 3), torch.zeros(9, 2), draw(9, 1)], 1)
    for x in (stack, stack[:4]):
        assert torch.equal(column_basis(x).coordinates[:, 3:5], torch.zeros(column_basis(x).rank, 2).double())


@pytest.mark.parametrize("shape", [(4, 0), (0, 4), (2, 4, 0)])
def test_a_basis_of_nothing_is_empty(shape: tuple[int, ...]) -> None:
    basis = column_basis(torch.zeros(shape))
    assert basis.rank == 0
    assert basis.transform.shape == (*shape[:-2], shape[-1], 0)
    assert basis.coordinates.shape == (*shape[:-2], 0, shape[-1])


def test_the_rank_counts_what_exceeds_its_share_of_the_largest() -> None:
    values = torch.tensor([2.0, 1e-3, 2e-9], dtype=torch.float64)
    assert numerical_rank(values) == 2
    assert numerical_rank(values, rtol=1e-2) == 1
    assert numerical_rank(values, rtol=1e-12) == 3
    assert numerical_rank(values, largest=torch.tensor(1e6).double()) == 1
    assert numerical_rank(torch.zeros(3)) == 0
    assert numerical_rank(torch.zeros(0)) == 0
    assert numerical_rank(torch.zeros(2, 0)) == 0


def test_a_batch_of_different_ranks_is_said_to_be_ragged() -> None:
    with pytest.raises(RaggedRankError):
        numerical_rank(torch.tensor([[1.0, 1.0], [1.0, 0.0]]))
    assert numerical_rank(torch.tensor([[1.0, 0.0], [5.0, 0.0]])) == 1


@pytest.mark.parametrize("shape", [(5, 0), (0, 5), (3, 5, 0), (6, 4), (4, 6), (2, 4, 6)])
def test_svd_multiplies_back(shape: tuple[int, ...]) -> None:
    x = normal()(*shape)
    left, values, right = svd(x)
    close((left * values.unsqueeze(-2)) @ right, x, 1.0) if x.numel() else None
    assert values.shape == (*shape[:-2], min(shape[-2:]))


@pytest.mark.parametrize(("m", "r", "n"), [(9, 3, 7), (3, 5, 9), (9, 5, 3), (2, 6, 3), (4, 4, 4)])
def test_the_svd_of_a_product_never_needs_the_product(m: int, r: int, n: int) -> None:
    draw = normal()
    left, right = draw(2, m, r), draw(2, r, n)
    u, values, vh = product_svd(left, right)
    close((u * values.unsqueeze(-2)) @ vh, left @ right)
    close(values[..., : min(m, r, n)], torch.linalg.svdvals(left @ right)[..., : min(m, r, n)])


@pytest.mark.parametrize("shape", [(9, 4), (4, 4), (4, 9), (3, 9, 4)])
def test_a_polar_factor_is_the_nearest_isometry(shape: tuple[int, ...]) -> None:
    x = normal()(*shape)
    factor, orthonormal = polar(x)
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    close(factor, u @ vh)
    assert orthonormal == (shape[-1] <= shape[-2])


def test_the_polar_factor_of_a_deficient_matrix_stays_in_its_span() -> None:
    draw = normal()
    x = draw(8, 2) @ draw(2, 5)
    factor, orthonormal = polar(x)
    assert not orthonormal
    close(torch.linalg.svdvals(factor), torch.tensor([1.0, 1, 0, 0, 0]).double())
    u = torch.linalg.svd(x)[0][:, :2]
    close(u @ (u.T @ factor), factor)
    same, orthonormal = polar(torch.diag(torch.tensor([1.0, 1e-6]).double()))  # too ill-conditioned for a Gram matrix
    close(same, EYE[:2, :2])
    assert orthonormal


def test_the_polar_factor_of_nothing() -> None:
    assert polar(torch.zeros(4, 0))[1]
    assert not polar(torch.zeros(0, 4))[1]
    assert polar(torch.zeros(4, 3))[0].abs().max() == 0


def test_qr_multiplies_back() -> None:
    x = normal()(7, 3)
    q, r = qr(x)
    close(q @ r, x)


def test_no_other_module_calls_torch_linalg() -> None:
    from pathlib import Path

    package = Path(linalg.__file__).parent
    maths = [*package.glob("*.py"), *(f for d in ("spaces", "methods", "steps") for f in (package / d).glob("*.py"))]
    assert {f.name for f in maths if "torch.linalg." in f.read_text(encoding="utf-8")} <= {"linalg.py"}


@pytest.mark.parametrize("failures", [0, 1, 2])
@pytest.mark.parametrize("shape", [(6, 4), (3, 5, 5)])
def test_an_svd_that_fails_is_tried_another_way(
    shape: tuple[int, ...], failures: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As LAPACK's may for many equal singular values."""
    real, calls = torch.linalg.svd, []

    def failing(x: torch.Tensor, **settings: bool) -> tuple[torch.Tensor, ...]:
        calls.append(x)
        if len(calls) <= failures:
            raise linalg.LinAlgError("did not converge")
        return real(x, **settings)

    monkeypatch.setattr(torch.linalg, "svd", failing)
    x = normal()(*shape)
    left, values, right = svd(x)
    assert len(calls) == failures + 1
    close((left * values.unsqueeze(-2)) @ right, x, 1.0)
    close(left.mT @ left, torch.eye(values.shape[-1]).double().expand(*shape[:-2], -1, -1), 1.0)
    close(values, torch.linalg.svdvals(x), 1.0)


def test_an_svd_that_fails_every_way_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def failing(x: torch.Tensor, **settings: bool) -> None:
        calls.append(x)
        raise linalg.LinAlgError("did not converge")

    monkeypatch.setattr(torch.linalg, "svd", failing)
    with pytest.raises(linalg.LinAlgError):
        svd(torch.eye(3))
    assert len(calls) == 3
    with pytest.raises(linalg.LinAlgError):
        svd(torch.full((3, 3), torch.nan))
    assert len(calls) == 4  # nothing helps there
