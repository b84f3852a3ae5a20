import pytest
import torch
from torch import Tensor

from coremerge.adapter import Adapter, Info
from coremerge.errors import ConfigError, MismatchError
from coremerge.extras import TOKEN_ROWS, Extra, plan_extras
from laws import lowrank, run

HEAD = "classifier.weight"
ROWS = "model.embed" + TOKEN_ROWS


def holding(name: str, extras: dict[str, Tensor], tokens: tuple[int, ...] = ()) -> Adapter:
    info = Info(modules_to_save=("classifier",), token_indices={"embed": tokens} if tokens else {})
    return Adapter.from_updates({"m": lowrank(4, 3, 1)}, name=name, extras=extras, info=info)


def heads(*values: float, dtype: torch.dtype = torch.float32) -> dict[str, Adapter]:
    return {f"a{i}": holding(f"a{i}", {HEAD: torch.full((2, 2), v, dtype=dtype)}) for i, v in enumerate(values)}


def rows(**given: dict[int, float]) -> dict[str, Adapter]:
    return {
        key: holding(key, {ROWS: torch.stack([torch.full((3,), v) for v in table.values()])}, tuple(table))
        for key, table in given.items()
    }


def loaded(extra: Extra) -> Tensor:
    assert extra.load is not None
    return extra.load()


def test_what_one_adapter_has_is_carried_over() -> None:
    for policy in (None, "average", "drop", "a0"):
        adapters = heads(1.0) | {"b": holding("b", {})}
        (extra,) = plan_extras(adapters, policy).values()
        assert (extra.name, extra.holders, extra.decision) == (HEAD, ("a0",), "carried over from a0")
        assert torch.equal(loaded(extra), torch.ones(2, 2))


def test_equal_copies_are_carried_over() -> None:
    for policy in (None, "average", "drop"):
        (extra,) = plan_extras(heads(1.0, 1.0), policy).values()
        assert extra.decision == "carried over: equal in all that have it"
        assert torch.equal(loaded(extra), torch.ones(2, 2))


def test_different_copies_are_refused_until_the_person_says() -> None:
    with pytest.raises(MismatchError, match=r"classifier.weight: trained whole by a0, a1.*--extras a0.*average.*drop"):
        plan_extras(heads(1.0, 2.0), None)


@pytest.mark.parametrize(("policy", "value"), [("average", 2.0), ("a0", 1.0), ("a1", 3.0)])
def test_different_copies_are_averaged_or_taken(policy: str, value: float) -> None:
    (extra,) = plan_extras(heads(1.0, 3.0, dtype=torch.bfloat16), policy).values()
    assert torch.equal(loaded(extra), torch.full((2, 2), value, dtype=torch.bfloat16))
    assert extra.decision.endswith("as asked")


def test_dropping_is_listed() -> None:
    (extra,) = plan_extras(heads(1.0, 3.0), "drop").values()
    assert (extra.load, extra.decision) == (None, "dropped, as asked")


def test_taking_from_one_that_lacks_it_is_refused() -> None:
    with pytest.raises(MismatchError, match="'b' does not have it"):
        plan_extras(heads(1.0, 3.0) | {"b": holding("b", {})}, "b")


def test_copies_of_different_shapes_cannot_be_averaged() -> None:
    adapters = {k: holding(k, {HEAD: torch.ones(n, 2)}) for k, n in (("a", 2), ("b", 3))}
    with pytest.raises(MismatchError, match=r"different shapes.*--extras a\) or drop"):
        plan_extras(adapters, "average")
    (extra,) = plan_extras(adapters, "b").values()
    assert loaded(extra).shape == (3, 2)


def test_a_policy_that_names_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"neither 'average' nor 'drop' nor an adapter. Adapters: a0"):
        plan_extras(heads(1.0), "everything")


def test_token_rows_are_joined() -> None:
    (extra,) = plan_extras(rows(a={7: 1.0, 3: 2.0}, b={3: 2.0, 5: 4.0}), None).values()
    assert extra.tokens == (3, 5, 7)
    assert loaded(extra)[:, 0].tolist() == [2, 4, 1]
    assert extra.decision == "token rows joined"


def test_rows_of_one_adapter_keep_their_order() -> None:
    (extra,) = plan_extras(rows(a={7: 1.0, 3: 2.0}), None).values()
    assert extra.tokens == (7, 3)
    assert loaded(extra)[:, 0].tolist() == [1, 2]


@pytest.mark.parametrize(("policy", "row"), [("a", 1.0), ("b", 2.0), ("average", 1.5)])
def test_clashing_rows_go_by_the_policy_and_the_others_stay(policy: str, row: float) -> None:
    (extra,) = plan_extras(rows(a={3: 1.0}, b={3: 2.0, 5: 4.0}), policy).values()
    assert extra.tokens == (3, 5)
    assert loaded(extra)[:, 0].tolist() == [row, 4]
    assert "as asked" in extra.decision


def test_clashing_rows_are_refused_or_dropped() -> None:
    clash = rows(a={3: 1.0}, b={3: 2.0})
    with pytest.raises(MismatchError, match="trained whole by a, b"):
        plan_extras(clash, None)
    (extra,) = plan_extras(clash, "drop").values()
    assert extra.load is None


def test_rows_without_ids_are_a_whole_tensor() -> None:
    bare = {"b": holding("b", {ROWS: torch.ones(1, 3)})}
    (extra,) = plan_extras(bare, None).values()
    assert extra.tokens == ()
    with pytest.raises(MismatchError, match="trained whole by a, b"):
        plan_extras(rows(a={3: 1.0, 4: 2.0}) | bare, None)


def test_the_merged_adapter_carries_what_was_decided() -> None:
    adapters = rows(a={3: 1.0}, b={5: 2.0})
    result = run(adapters, method="sum").adapter
    assert result.info.token_indices == {"embed": (3, 5)}
    assert list(result.extras) == [ROWS]
    assert result.extras[ROWS][:, 0].tolist() == [1, 2]

    result = run(heads(1.0, 2.0), method="sum", extras="a1").adapter
    assert result.info.modules_to_save == ("classifier",)
    assert torch.equal(result.extras[HEAD], torch.full((2, 2), 2.0))

    dropped = run(heads(1.0, 2.0), method="sum", extras="drop")
    assert dict(dropped.adapter.extras) == {}
    assert dropped.adapter.info.modules_to_save == ()
    assert f"{HEAD}: dropped, as asked" in dropped.report.warnings
    assert run(rows(a={3: 1.0}, b={3: 2.0}), method="sum", extras="drop").adapter.info.token_indices == {}


TABLE = "model.embed_tokens.weight"


def tables(**sizes: int) -> dict[str, Adapter]:
    """Tables of which each goes on where a shorter one ends."""
    whole = torch.arange(100.0)[:, None] * torch.ones(3)
    return {key: holding(key, {TABLE: whole[:size].clone()}) for key, size in sizes.items()}


@pytest.mark.parametrize("policy", [None, "average", "drop"])
def test_a_vocabulary_that_only_grew_is_carried_over_whole(policy: str | None) -> None:
    (extra,) = plan_extras(tables(a=40, b=43, c=40), policy).values()
    assert extra.decision == "carried over from b: the others are its first rows"
    assert torch.equal(loaded(extra), tables(b=43)["b"].extras[TABLE])


def test_a_table_that_is_asked_for_is_taken() -> None:
    (extra,) = plan_extras(tables(a=40, b=43), "a").values()
    assert (extra.decision, len(loaded(extra))) == ("taken from a, as asked", 40)


@pytest.mark.parametrize("policy", [None, "average"])
def test_tables_of_vocabularies_that_grew_apart_are_refused_by_name(policy: str | None) -> None:
    adapters = tables(a=40, b=43)
    adapters["a"] = holding("a", {TABLE: -adapters["a"].extras[TABLE]})
    match = r"different vocabularies: 40 tokens in a, 43 tokens in b.*take one table \(--extras b\).*then lost"
    with pytest.raises(MismatchError, match=match) as raised:
        plan_extras(adapters, policy)
    assert "drop" not in str(raised.value)


@pytest.mark.parametrize("name", [TABLE, "lm_head.weight", "proj_out.weight", "transformer.wte.weight"])
def test_dropping_a_vocabulary_is_no_remedy(name: str) -> None:
    adapters = {key: holding(key, {name: torch.full((4, 2), value)}) for key, value in {"a": 1.0, "b": 2.0}.items()}
    with pytest.raises(MismatchError, match=r"--extras a\) or --extras average; both need one tokenizer") as raised:
        plan_extras(adapters, None)
    assert "drop" not in str(raised.value)
    (extra,) = plan_extras(adapters, "drop").values()
    assert extra.load is None


def test_numbers_without_a_shape_are_no_tables() -> None:
    adapters = {
        key: holding(key, {"lm_head.scale": torch.tensor(value)}) for key, value in {"a": 1.0, "b": 2.0}.items()
    }
    with pytest.raises(MismatchError, match="trained whole by a, b"):
        plan_extras(adapters, None)
