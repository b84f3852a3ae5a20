import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from coremerge.errors import TensorError
from coremerge.lowrank import LowRank, ThinSVD, dense, svds, thin_svd, total
from laws import close, largest, lowrank, normal, regauged, stacks


@given(stacks(tasks=(2, 2)), st.floats(-3, 3))
def test_the_algebra_is_that_of_matrices(pair: list[LowRank], c: float) -> None:
    a, b = pair
    x, y, size = a.dense(), b.dense(), largest(pair)
    close((a + b).dense(), x + y, size)
    close((a - b).dense(), x - y, size)
    close((c * a).dense(), c * x, size * 3)
    close((a * c).dense(), c * x, size * 3)
    close((-a).dense(), -x, size)
    close(a.mT.dense(), x.T, size)
    close(total([a, b, a]).dense(), 2 * x + y, size)
    assert (a + b).rank == a.rank + b.rank
    close(a.inner(b), (x * y).sum(), size**2 * x.numel())
    close(a.norm(), x.norm(), size * x.numel() ** 0.5, tol=1e-7)


@given(stacks(tasks=(1, 1)))
def test_svd_is_that_of_the_product(single: list[LowRank]) -> None:
    (a,) = single
    x, svd, size = a.dense(), a.svd, largest(single)
    k = min(a.rank, *a.shape)
    assert svd.values.shape == (k,)
    assert svd.shape == a.shape
    close(svd.values, torch.linalg.svdvals(x)[:k], size)
    close(svd.dense(), x, size)
    close(svd.left.mT @ svd.left, torch.eye(k, dtype=torch.float64), 1.0)
    close(svd.right @ svd.right.mT, torch.eye(k, dtype=torch.float64), 1.0)
    assert a.svd is svd
    assert svd.svd is svd


@given(stacks(tasks=(1, 1)))
def test_balanced_factors_depend_on_the_product_alone(single: list[LowRank]) -> None:
    (a,) = single
    one, other, size = a.balanced(), regauged(a).balanced(), largest(single)
    close(one.dense(), a.dense(), size)
    close(one.left.mT @ one.left, one.right @ one.right.mT, size * 12)  # both are S
    values = a.svd.values
    assume(not values.numel() or bool((values[:-1] - values[1:] > 1e-3 * values[0]).all()))
    close(one.left.abs(), other.left.abs(), size**0.5, tol=1e-6)  # each vector up to its sign


@given(stacks(tasks=(1, 1)), st.integers(1, 6))
def test_truncation_is_eckart_young(single: list[LowRank], k: int) -> None:
    (a,) = single
    cut, values = a.truncate(k), torch.linalg.svdvals(a.dense())
    assert cut.rank == min(k, a.rank, *a.shape)
    close((a.dense() - cut.dense()).norm(), values[k:].norm(), largest(single) * 12)


def test_components_come_in_descending_order_whatever_the_order_given() -> None:
    svd, shuffle = lowrank(7, 5, 4).svd, torch.tensor([2, 0, 3, 1])
    mixed = ThinSVD(svd.left[:, shuffle], svd.values[shuffle], svd.right[shuffle])
    assert mixed.rank() == 4
    best = mixed.truncate(2)
    assert torch.equal(best.values, svd.values[:2])
    assert torch.equal(best.left, svd.left[:, :2])
    assert torch.equal(best.right, svd.right[:2])
    batch = ThinSVD(*(torch.stack([x, y]) for x, y in zip(parts(svd), parts(mixed), strict=True)))
    close(batch.truncate(3).dense()[0], batch.truncate(3).dense()[1])


def parts(svd: ThinSVD) -> tuple[torch.Tensor, ...]:
    return svd.left, svd.values, svd.right


def test_cut_keeps_what_counts() -> None:
    u = lowrank(6, 5, 1)
    svd = (u + 1e-12 * lowrank(6, 5, 1, seed=1)).svd
    assert (svd.cut().values.shape[0], svd.cut(rtol=1e-15).values.shape[0]) == (1, 2)


def test_zeros_have_rank_zero() -> None:
    zero = LowRank.zeros(4, 3)
    assert zero.rank == zero.svd.rank() == 0
    assert zero.norm() == 0
    close((zero + lowrank(4, 3, 2)).dense(), lowrank(4, 3, 2).dense())
    close(zero.balanced().truncate(2).dense(), torch.zeros(4, 3).double(), 1.0)


def test_batches_are_worked_on_together() -> None:
    draw = normal()
    batch = LowRank(draw(3, 6, 2), draw(3, 2, 5))
    assert batch.shape == (6, 5)
    for i in range(3):
        single = LowRank(batch.left[i], batch.right[i])
        close(batch.truncate(1).dense()[i], single.truncate(1).dense())
        close(batch.norm()[i], single.norm())
        close((2 * batch + batch).balanced().dense()[i], 3 * single.dense())


def test_dtype_and_device_follow() -> None:
    half = lowrank(3, 2, 1).to(torch.float32)
    assert half.dtype == torch.float32
    assert half.to("cpu").dtype == torch.float32
    assert half.to(torch.device("cpu")).left.device.type == "cpu"


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (torch.ones(3, 2), torch.ones(3, 2)),
        (torch.ones(3), torch.ones(1, 2)),
        (torch.ones(2, 3, 1), torch.ones(1, 2)),
        (torch.ones(2, 3, 1), torch.ones(3, 1, 2)),
    ],
)
def test_factors_that_do_not_multiply_are_refused(left: torch.Tensor, right: torch.Tensor) -> None:
    with pytest.raises(TensorError, match="do not multiply"):
        LowRank(left, right)


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float64), (torch.int64, torch.int64)])
def test_factors_of_other_dtypes_are_refused(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    with pytest.raises(TensorError, match="one floating dtype"):
        LowRank(torch.ones(3, 1, dtype=dtypes[0]), torch.ones(1, 2, dtype=dtypes[1]))


def test_it_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        lowrank(3, 2, 1).left = torch.ones(3, 1)  # type: ignore[misc]


@given(stacks(tasks=(1, 1)))
def test_any_kind_of_matrix_decomposes(single: list[LowRank]) -> None:
    (a,) = single
    for kind in (a, a.svd, a.dense()):
        close(thin_svd(kind).dense(), a.dense(), largest(single))
        close(dense(kind), a.dense(), largest(single))


def test_svds_are_those_of_each() -> None:
    alike, unlike = [lowrank(6, 5, 2, seed=s) for s in range(3)], [lowrank(6, 5, r) for r in (1, 2)]
    for matrices in (alike, unlike, alike[:1]):
        for svd, matrix in zip(svds(matrices), matrices, strict=True):
            assert matrix.svd is svd
            close(svd.dense(), matrix.dense())
