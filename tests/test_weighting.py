import pytest
import torch

from coremerge.adapter import Adapter
from coremerge.errors import ConfigError
from coremerge.weighting import weight_table
from laws import close, lowrank, named, run

HOLDERS = {"m": ("a", "b"), "n": ("a",)}
NAMES = ["a", "b"]


@pytest.mark.parametrize(
    ("weights", "table"),
    [
        (None, {"a": {"m": 1, "n": 1}, "b": {"m": 1}}),
        ([0.5, -2], {"a": {"m": 0.5, "n": 0.5}, "b": {"m": -2}}),
        ((0, 1), {"a": {"m": 0, "n": 0}, "b": {"m": 1}}),
        ({"b": 3}, {"a": {"m": 1, "n": 1}, "b": {"m": 3}}),
        ({"a": {"n": 4.0}, "b": 3}, {"a": {"m": 1, "n": 4}, "b": {"m": 3}}),
    ],
)
def test_lists_mappings_and_tables(weights: object, table: dict) -> None:
    assert weight_table(weights, HOLDERS, NAMES) == table  # type: ignore[arg-type]


def test_normalised_weights_sum_to_one_over_the_holders_of_each_module() -> None:
    assert weight_table([1, 3], HOLDERS, NAMES, normalize=True) == {"a": {"m": 0.25, "n": 1}, "b": {"m": 0.75}}
    assert weight_table([-1, 3], HOLDERS, NAMES, normalize=True)["a"]["m"] == -0.5


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1], "1 weights for 2 adapters"),
        ([1, 2, 3], "3 weights for 2 adapters"),
        ({"c": 1}, "no adapter of that name. Adapters: a, b"),
        ({"b": {"n": 1}}, "'b' has no such module. Its modules, as they are called in the merge: m$"),
        ({"b": {"o": 1}}, "'b' has no such module"),
        ([1, float("nan")], "finite"),
        ({"a": {"m": float("inf")}}, "finite"),
    ],
)
def test_weights_that_mean_nothing_are_refused(weights: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        weight_table(weights, HOLDERS, NAMES)  # type: ignore[arg-type]


def test_weights_that_sum_to_zero_cannot_be_normalised() -> None:
    with pytest.raises(ConfigError, match="sum to zero"):
        weight_table([1, -1], HOLDERS, NAMES, normalize=True)


def test_a_weight_multiplies_its_update() -> None:
    a, b = lowrank(6, 5, 2), lowrank(6, 5, 3, seed=1)
    for method, space in (("sum", "core"), ("tsv", "core"), ("cart", "knots"), ("ties", "full"), ("dare_ties", "full")):
        weighted = run(named([a, b]), method=method, space=space, weights=[2, -0.5]).adapter["layer"].dense()
        close(weighted, run(named([2 * a, -0.5 * b]), method=method, space=space).adapter["layer"].dense())
    table = {"a": {"m": 2.0}, "b": {"n": -3.0}}
    pair = {k: Adapter.from_updates({"m": u, "n": u}) for k, u in (("a", a), ("b", a))}
    result = run(pair, method="sum", weights=table).adapter
    close(result["m"].dense(), 3 * a.dense())
    close(result["n"].dense(), -2 * a.dense())


def test_normalised_weights_reach_the_merge() -> None:
    a, b = lowrank(6, 5, 2), lowrank(6, 5, 3, seed=1)
    merged = run(named([a, b]), method="sum", weights=[1, 3], normalize=True).adapter["layer"].dense()
    close(merged, 0.25 * a.dense() + 0.75 * b.dense())


@pytest.mark.parametrize("space", ["core", "core:basis=balanced", "knots", "full"])
def test_equal_weights_scale_homogeneous_methods(space: str) -> None:
    pair = named([lowrank(6, 5, 2), lowrank(6, 5, 3, seed=1)])
    for method in ("sum", "mean", "ties", "dare", "dare_ties", "tsv", "cart"):
        plain = run(pair, method=method, space=space).adapter["layer"].dense()
        close(run(pair, method=method, space=space, weights=[3, 3]).adapter["layer"].dense(), 3 * plain)
        close(run(pair, method=method, space=space, weights=[-1, -1]).adapter["layer"].dense(), -plain)


class TestComponents:
    """Weights per rank component act on the factors, before anything else."""

    FINE = (1.0, 0.5, -2.0)

    def adapters(self) -> dict[str, Adapter]:
        return named([lowrank(6, 5, 3), lowrank(6, 5, 2, seed=1)])

    def test_they_weight_the_components(self) -> None:
        adapters = self.adapters()
        first, second = adapters
        module = next(iter(adapters[first]))
        left, right = adapters[first][module].left, adapters[first][module].right
        result = run(adapters, method="sum", scale=1.0, weights={first: {module: self.FINE}, second: 3})
        expected = left @ torch.diag(torch.tensor(self.FINE).double()) @ right + 3 * adapters[second][module].dense()
        close(result.adapter[module].dense(), expected)

    @pytest.mark.parametrize("values", [(1.0, 2.0), (1.0, 2.0, float("nan"))])
    def test_their_number_is_the_rank_and_they_are_finite(self, values: tuple) -> None:
        adapters = self.adapters()
        first = next(iter(adapters))
        with pytest.raises(ConfigError, match=f"weights.{first}"):
            run(adapters, method="sum", weights={first: {next(iter(adapters[first])): values}})

    def test_a_module_that_is_not_there(self) -> None:
        adapters = self.adapters()
        first = next(iter(adapters))
        with pytest.raises(ConfigError, match="no such module"):
            run(adapters, method="sum", weights={first: {"nothing": (1.0,)}})

    def test_trained_biases_get_their_mean(self) -> None:
        update = lowrank(6, 5, 3)
        given = Adapter.from_updates({"m": update}, biases={"m": torch.ones(6).double()})
        result = run([given], method="sum", scale=1.0, weights={"adapter": {"m": (1.0, 2.0, 6.0)}})
        close(result.adapter.biases["m"], 3 * torch.ones(6).double())


def test_a_sequence_of_adapters_under_other_names_is_matched_by_order() -> None:
    a, b = lowrank(6, 5, 3), lowrank(6, 5, 2, seed=1)
    adapters = [Adapter.from_updates({"m": update}, name=name) for update, name in ((a, "x"), (b, "y"))]
    wanted = 2 * a.dense() + 3 * b.dense()
    for weights in ({"math": 2, "code": {"m": 3}}, {"y": 3, "x": 2}):
        close(run(adapters, method="sum", scale=1.0, weights=weights).adapter["m"].dense(), wanted)
    with pytest.raises(ConfigError, match="no adapter of that name"):
        run({"x": adapters[0], "y": adapters[1]}, method="sum", weights={"math": 2, "code": 3})
    with pytest.raises(ConfigError, match="no adapter of that name"):
        run(adapters, method="sum", weights={"x": 2, "code": 3})
