import pytest
import torch

from coremerge.adapter import Adapter, Info, Lazy, Module
from coremerge.lowrank import LowRank
from laws import close, lowrank, normal


def some() -> Adapter:
    return Adapter.from_updates(
        {"b": lowrank(4, 3, 2).to(torch.bfloat16), "a": lowrank(5, 3, 1).to(torch.bfloat16)},
        name="some",
        kinds={"b": Module((4, 3), 9, "conv1d", (3,), scale=7.0)},
        biases={"a": torch.ones(5)},
        extras={"head.weight": torch.ones(2)},
        info=Info(source="here"),
    )


def test_it_is_a_mapping_of_sorted_names_to_float64_updates() -> None:
    adapter = some()
    assert list(adapter) == ["a", "b"]
    assert len(adapter) == 2
    assert "a" in adapter
    assert "c" not in adapter
    assert adapter["a"].dtype == torch.float64
    with pytest.raises(KeyError, match="c"):
        adapter["c"]
    assert repr(adapter) == "Adapter('some', 2 modules, ranks [1, 2])"


def test_modules_are_known_without_reading_factors() -> None:
    read = []
    adapter = Adapter({"a": Module((4, 3), 2)}, lambda name: read.append(name) or lowrank(4, 3, 2))
    assert adapter.modules["a"].parameters == 14
    assert adapter.dtype == torch.float32
    assert (adapter.name, adapter.info, dict(adapter.biases), dict(adapter.extras)) == ("adapter", Info(), {}, {})
    assert not read
    close(adapter["a"].dense(), lowrank(4, 3, 2).dense())
    assert read == ["a"]


def test_layers_that_are_not_linear_keep_their_kind() -> None:
    assert some().modules["b"] == Module((4, 3), 2, "conv1d", (3,), 1.0, torch.bfloat16)


def test_dtype_is_the_common_one() -> None:
    assert some().dtype == torch.bfloat16
    mixed = {"a": lowrank(4, 3, 2), "b": lowrank(4, 3, 2).to(torch.float16)}
    assert Adapter.from_updates(mixed).dtype == torch.float32


def test_a_loaded_adapter_is_the_same_and_reads_nothing_more() -> None:
    reads = []

    def read(name: str) -> LowRank:
        reads.append(name)
        return lowrank(4, 3, 2)

    extras = Lazy(("x",), lambda _: normal()(2))
    adapter = Adapter({"a": Module((4, 3), 2, scale=0.5, dtype=torch.float16)}, read, name="n", extras=extras)
    loaded = adapter.load()
    assert reads == ["a"]
    close(loaded["a"].dense(), lowrank(4, 3, 2).dense())
    assert loaded.modules == adapter.modules
    assert (loaded.name, loaded.dtype, loaded.info) == ("n", torch.float16, adapter.info)
    assert torch.equal(loaded.extras["x"], normal()(2))
    assert reads == ["a"]


def test_renaming_changes_the_name_only() -> None:
    adapter = some()
    other = adapter.renamed("other")
    assert (other.name, adapter.name) == ("other", "some")
    assert other.modules == adapter.modules
    assert (other.biases, other.extras, other.info) == (adapter.biases, adapter.extras, adapter.info)


def test_a_lazy_mapping_makes_values_when_asked() -> None:
    made = []
    lazy = Lazy({"a": 1, "b": 2}, lambda key: made.append(key) or key.upper())
    assert list(lazy) == ["a", "b"]
    assert len(lazy) == 2
    assert "a" in lazy
    assert "c" not in lazy
    assert made == []
    assert lazy["a"] == lazy["a"] == "A"
    assert made == ["a", "a"]
    with pytest.raises(KeyError):
        lazy["c"]


def test_the_public_surface_is_imported_when_used() -> None:
    import coremerge

    assert set(dir(coremerge)) == set(coremerge.__all__)
    assert coremerge.Adapter is Adapter
    with pytest.raises(AttributeError, match="nothing"):
        coremerge.nothing  # noqa: B018


@pytest.mark.parametrize(
    ("dtype", "scale", "exact"),
    [
        (torch.bfloat16, 1.0, torch.float32),
        (torch.float16, 0.0, torch.float32),
        (torch.float16, 2.0**16, torch.float64),
        (torch.float16, 1 / 3, torch.float64),
        (torch.bfloat16, 2047.0, torch.float32),
        (torch.bfloat16, 2049.0, torch.float64),
        (torch.float32, 1.0, torch.float64),
    ],
)
def test_float32_is_used_where_it_holds_the_scaled_factors_exactly(
    dtype: torch.dtype, scale: float, exact: torch.dtype
) -> None:
    module = Module((4, 3), 2, scale=scale, dtype=dtype)
    assert module.exact_dtype == exact
    if exact == torch.float32:
        x = normal()(1000).to(dtype)
        assert torch.equal((x.float() * scale).double(), x.double() * scale)


def test_reading_gives_the_dtype_that_is_asked_for() -> None:
    adapter = some()
    assert adapter.read("a").dtype == torch.float64
    assert adapter.read("a", torch.float32).dtype == torch.float32
    own = Adapter(
        {"a": Module((4, 3), 2)}, lambda _: lowrank(4, 3, 2), read=lambda _, d: lowrank(4, 3, 2).to(d or torch.float32)
    )
    assert own.read("a").dtype == torch.float32
    assert own.read("a", torch.float64).dtype == torch.float64
    assert own.renamed("b").read("a").dtype == torch.float32
    with pytest.raises(KeyError, match="c"):
        own.read("c")
