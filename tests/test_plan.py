import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from coremerge.adapter import Adapter, Info, Module
from coremerge.errors import ConfigError, InputError, MismatchError
from coremerge.formats.into import ENTRIES
from coremerge.lowrank import LowRank
from coremerge.pipeline import prepare
from coremerge.plan import IMPORT_BYTES, Plan, make_plan, name_adapters
from coremerge.recipe import Recipe
from laws import lowrank, normal, one
from tiny import make_adapter, make_base


def adapter(shapes: Mapping[str, tuple[int, int, int]], name: str = "a", **info: object) -> Adapter:
    return Adapter.from_updates({k: lowrank(*v) for k, v in shapes.items()}, name=name, info=Info(**info))  # type: ignore[arg-type]


def plan(*adapters: Adapter, **recipe: object) -> Plan:
    return make_plan(adapters, Recipe(**recipe))


A = adapter({"m": (6, 5, 2), "n": (8, 4, 1)}, "a")
B = adapter({"m": (6, 5, 3)}, "b")


def test_it_lays_out_modules_ranks_and_weights() -> None:
    p = plan(A, B, weights=[1, 2])
    assert list(p.adapters) == ["a", "b"]
    assert {k: (v.module.shape, dict(v.ranks), v.module.rank) for k, v in p.modules.items()} == {
        "m": ((6, 5), {"a": 2, "b": 3}, 5),
        "n": ((8, 4), {"a": 1}, 1),
    }
    assert p.weights == {"a": {"m": 1, "n": 1}, "b": {"m": 2}}
    assert p.rank == 5


def test_nothing_is_read() -> None:
    def fail(name: str) -> None:
        raise AssertionError(name)

    lazy = Adapter({"m": Module((6, 5), 2)}, fail)  # type: ignore[arg-type]
    assert plan(lazy, lazy).rank == 4


def test_labels_that_coincide_are_numbered() -> None:
    assert list(name_adapters([A, A, B, A.renamed("a-2")])) == ["a", "a-2", "b", "a-2-2"]
    assert list(name_adapters({"x": A, "y": A})) == ["x", "y"]


@pytest.mark.parametrize(
    ("sources", "names"),
    [
        (["runs/math/c-9", "runs/code/c-9"], ["math/c-9", "code/c-9"]),
        (["runs/math/c-9/adapter_model.safetensors", "c-9"], ["math/c-9", "c-9"]),
        (["org/c-9@v2", "other/c-9:c-9"], ["org/c-9", "other/c-9"]),
        (["runs/math/c-9", "runs/math/c-9", "c-9"], ["math/c-9", "math/c-9-2", "c-9"]),
        (["c-9", "c-9"], ["c-9", "c-9-2"]),
    ],
)
def test_labels_that_coincide_say_where_they_are(sources: list[str], names: list[str]) -> None:
    given = [adapter({"m": (6, 5, 2)}, "c-9", source=source) for source in sources]
    assert list(name_adapters(given)) == names


@pytest.mark.parametrize("nothing", [[], {}])
def test_no_adapters_are_refused(nothing: object) -> None:
    with pytest.raises(InputError, match="no adapters given"):
        make_plan(nothing, Recipe())  # type: ignore[arg-type]


def test_an_adapter_without_modules_is_refused() -> None:
    with pytest.raises(MismatchError, match="b: has no adapted module"):
        plan(A, adapter({}, "b"))
    with pytest.raises(MismatchError, match="some/where: has no adapted module"):
        plan(adapter({}, "b", source="some/where"))


def test_other_shapes_are_refused() -> None:
    with pytest.raises(MismatchError, match=r"some/where: module m: shape \(6, 5\) in a, \(7, 5\) in b.*same base"):
        plan(A, adapter({"m": (7, 5, 1)}, "b", source="some/where"))


def test_other_kinds_and_kernels_are_refused() -> None:
    def conv(kind: str, kernel: tuple[int, ...]) -> Adapter:
        return Adapter.from_updates({"m": lowrank(4, 12, 1)}, kinds={"m": Module((4, 12), 1, kind, kernel)})  # type: ignore[arg-type]

    with pytest.raises(MismatchError, match="kind conv1d in adapter, linear"):
        plan(conv("conv1d", (3,)), conv("linear", ()))
    with pytest.raises(MismatchError, match=r"kernel \(3,\) in adapter, \(4,\)"):
        plan(conv("conv1d", (3,)), conv("conv1d", (4,)))
    assert plan(conv("conv1d", (3,)), conv("conv1d", (3,))).modules["m"].module.kernel == (3,)


def test_updates_of_other_vocabularies_are_refused_by_name() -> None:
    def tokens(count: int, name: str, kind: str = "linear") -> Adapter:
        shape = (4, count) if kind == "embedding" else (count, 4)
        layer = "model.embed_tokens" if kind == "embedding" else "lm_head"
        kinds = {layer: Module(shape, 1, kind)}  # type: ignore[arg-type]
        return Adapter.from_updates({layer: lowrank(*shape, 1)}, name=name, kinds=kinds)

    for kind in ("linear", "embedding"):
        with pytest.raises(MismatchError, match=r"40.* in a, .*43.* in b.*vocabularies differ.*one tokenizer"):
            plan(tokens(40, "a", kind), tokens(43, "b", kind))


def test_other_layers_are_refused() -> None:
    layers = {"layer_replication": ((0, 2), (1, 2))}
    with pytest.raises(MismatchError, match="layer_replication differs"):
        plan(B, adapter({"m": (6, 5, 1)}, "c", **layers))
    same = plan(adapter({"m": (6, 5, 1)}, "c", **layers), adapter({"m": (6, 5, 1)}, "d", **layers))
    assert same.info.layer_replication == ((0, 2), (1, 2))


def test_any_adapter_that_says_true_makes_fan_in_fan_out_true() -> None:
    true = adapter({"m": (6, 5, 1)}, "c", fan_in_fan_out=True)
    said = "written true"
    for given, expected in (((B, true), True), ((true, B), True), ((true, true), True), ((B, B), False)):
        made = plan(*given)
        assert made.info.fan_in_fan_out is expected
        assert (said in " ".join(made.warnings)) == (B in given and expected)


def test_adapters_without_a_common_module_are_refused_unless_allowed() -> None:
    other = adapter({"x": (6, 5, 1)}, "b")
    with pytest.raises(MismatchError, match=r"no module in common \(a: m; b: x\).*--allow-disjoint"):
        plan(A, other)
    assert list(plan(A, other, allow_disjoint=True).modules) == ["m", "n", "x"]
    assert list(plan(A).modules) == ["m", "n"]


@pytest.mark.parametrize(
    ("recipe", "rank"),
    [
        ({"space": "core", "method": "ties"}, 5),
        ({"space": "knots", "method": "ties"}, 5),
        ({"space": "full", "method": "tsv"}, 5),
        ({"space": "full", "method": "ties"}, 6),
        ({"space": "full", "method": "sum", "steps": ["isotropize:span=false"]}, 6),
        ({"space": "full", "method": "tsv", "parameters": {"rank": 4, "pad": True}}, 5),
        ({"space": "full", "method": "ties", "rank": 4}, 4),
        ({"rank": 3}, 3),
        ({"rank": 99}, 5),
        ({"rank": "exact"}, 5),
    ],
)
def test_the_rank_is_the_most_there_can_be(recipe: dict, rank: int) -> None:
    assert plan(adapter({"m": (6, 7, 2)}), adapter({"m": (6, 7, 3)}), **recipe).rank == rank


def test_no_rank_is_above_that_of_the_shape() -> None:
    for space in ("core", "knots", "full"):
        assert plan(adapter({"m": (6, 7, 5)}), adapter({"m": (6, 7, 5)}), space=space).rank == 6


def test_output_bytes_are_those_of_factors_of_uniform_rank() -> None:
    p = plan(A, B, dtype="float16")
    assert p.output_bytes == 2 * 5 * (6 + 5 + 8 + 4)
    assert plan(A, B, rank=2).output_bytes == 8 * 2 * (6 + 5 + 8 + 4)


def test_the_peak_grows_with_threads_and_with_dense_work() -> None:
    big = {"m": (2000, 3000, 8)}
    big |= {f"m{i}": big["m"] for i in range(40)}
    core, full = (plan(adapter(big), adapter(big), method="ties", space=s) for s in ("core", "full"))
    assert IMPORT_BYTES < core.peak_bytes(1) < core.peak_bytes(4)
    assert full.peak_bytes(1) > core.peak_bytes(1) + 2 * 8 * 2000 * 3000
    assert core.peak_bytes() >= core.peak_bytes(1)
    assert core.peak_bytes(1) - IMPORT_BYTES > 8 * 2 * 8 * 5000  # the factors


def test_threads_within_an_amount_of_memory() -> None:
    shapes = {f"m{i}": (2000, 3000, 8) for i in range(40)}
    big = plan(adapter(shapes), adapter(shapes))
    assert big.threads_within(big.peak_bytes(3), 8) == 3
    assert big.threads_within(10**15, 8) == 8
    assert big.peak_bytes(2, batch=1) <= big.peak_bytes(2) <= big.peak_bytes(2, batch=4)
    with pytest.raises(ConfigError, match=r"max_memory = .*too little: with one thread it needs up to"):
        big.threads_within(big.peak_bytes(1) - 1)


def test_threads_without_work_take_no_memory() -> None:
    two = plan(adapter({"m": (2000, 3000, 8), "n": (20, 30, 8)}), adapter({"m": (2000, 3000, 8)}), rank=8)
    assert two.peak_bytes(2) == two.peak_bytes(64)
    assert two.peak_bytes(2) < 2 * two.peak_bytes(1) - IMPORT_BYTES


def test_the_dtype_is_the_inputs_own_or_as_asked() -> None:
    half = Adapter.from_updates({"m": lowrank(6, 5, 1).to(torch.float16)})
    assert plan(half, half).dtype == torch.float16
    assert plan(half, B).dtype == torch.float32
    assert plan(half, dtype="bf16").dtype == torch.bfloat16


def test_what_the_files_say_is_kept_where_they_agree() -> None:
    def say(**info: object) -> Adapter:
        return adapter({"m": (6, 5, 1)}, **info)

    both = plan(say(base_model="x", task_type="T", base_revision="1"), say(task_type="T", base_revision="2")).info
    assert (both.type, both.base_model, both.task_type, both.base_revision) == ("LORA", "x", "T", None)
    assert plan(say(), say(base_model="y")).info.base_model == "y"
    assert plan(say(), say(task_type="T")).info.task_type is None


def test_warnings_name_what_a_person_should_know() -> None:
    def warnings(*adapters: Adapter, **recipe: object) -> str:
        return "\n".join(plan(*adapters, **recipe).warnings)

    assert warnings(B, B) == ""
    assert "b lacks 1 of 2 modules" in warnings(A, B)
    named = [adapter({"m": (6, 5, 1)}, k, base_model=f"base/{k}") for k in "xy"]
    assert "different base models (base/x, base/y)" in warnings(*named)
    biased = Adapter.from_updates({"m": lowrank(6, 5, 1)}, biases={"m": torch.ones(6)})
    assert "vLLM refuses adapters with lora_bias" in warnings(biased)
    wide = Adapter({"m": Module((5000, 5000), 300)}, lambda _: lowrank(1, 1, 1))
    assert "rank 600 is above 512" in warnings(wide, wide, method="sum")
    assert "all entries of updates as large as 5000 × 5000" in warnings(wide, wide, method="ties", space="full")
    assert "all entries" not in warnings(wide, wide, method="tsv", space="full")


@pytest.mark.parametrize(
    ("recipe", "why"),
    [
        ({"space": "full", "basis": "balanced"}, "basis balanced has no effect: the full space has no basis to choose"),
        ({"space": "knots:scaled=false", "basis": "balanced"}, "the knots space has no basis"),
        ({"space": "core:basis=stacked", "basis": "balanced"}, "the space says stacked"),
        ({"space": {"core": {"basis": "balanced"}}, "basis": "stacked"}, "the space says balanced"),
    ],
)
def test_a_basis_without_effect_is_said(recipe: dict, why: str) -> None:
    assert [w for w in plan(A, B, **recipe).warnings if why in w]
    for taken in ({}, {"basis": "balanced"}, {"space": "full"}, {"space": "core:basis=balanced"}):
        assert not [w for w in plan(A, B, **taken).warnings if "basis" in w]


def test_to_dict_is_json() -> None:
    extra = Adapter.from_updates({"m": lowrank(6, 5, 3)}, name="b", extras={"head.weight": torch.ones(1)})
    told = json.loads(json.dumps(plan(A, extra).to_dict()))
    assert [(a["name"], a["modules"], a["ranks"]) for a in told["adapters"]] == [("a", 2, [1, 2]), ("b", 1, [3])]
    assert told["modules"]["m"] == {"shape": [6, 5], "kind": "linear", "ranks": {"a": 2, "b": 3}, "rank": 5}
    assert told["extras"] == {"head.weight": {"from": ["b"], "decision": "carried over from b"}}
    assert (told["rank"], told["dtype"], told["output_bytes"]) == (5, "float64", 8 * 5 * 23)
    assert told["peak_bytes"] > told["output_bytes"]
    assert told["warnings"]


def test_one_adapter_is_enough() -> None:
    assert make_plan([one(lowrank(3, 3, 1))], Recipe()).rank == 1


def test_whole_tensors_and_the_base_that_is_written_count(tmp_path: Path) -> None:
    head = {"lm_head.weight": torch.zeros(64, 24)}
    plain, heavy = (
        prepare([make_adapter(tmp_path / f"{name}{i}", seed=i, extra=extra) for i in range(2)], Recipe(extras="drop"))
        for name, extra in (("plain", None), ("heavy", head))
    )
    assert heavy.peak_bytes(1) - plain.peak_bytes(1) >= 2 * 3 * 64 * 24 * 4
    into = prepare([tmp_path / "plain0"], Recipe(), into=make_base(tmp_path / "base"))
    alone = prepare([tmp_path / "plain0"], Recipe())
    assert into.peak_bytes(3) - alone.peak_bytes(3) == 3 * 24 * ENTRIES
    assert into.threads_within(into.peak_bytes(3), 8) == 3


TAKEN = """
import json, sys
from pathlib import Path
from coremerge.cli._process import settle
settle()
from coremerge.pipeline import prepare
from coremerge.recipe import Recipe

sources, out, recipe = json.loads(sys.argv[1])
prepared = prepare(sources, Recipe(**recipe))
rank = prepared.run(out, threads=1).saved.rank
try:
    lines = Path("/proc/self/status").read_text().splitlines()
    taken = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
except OSError:
    import resource
    taken = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
print(json.dumps([prepared.peak_bytes(1), taken, prepared.plan.rank, rank]))
"""


@pytest.mark.parametrize(
    "recipe",
    [
        {"space": "full", "method": "dare_ties"},
        {"space": "full", "method": "sum", "steps": ["isotropize:span=no"]},
        {"space": "full", "method": "tsv", "parameters": {"rank": 128, "pad": "yes"}},
        {"space": "knots", "method": "ties"},
        {},
    ],
    ids=str,
)
def test_the_memory_told_is_what_is_taken_or_at_most_half_as_much_again(tmp_path: Path, recipe: dict) -> None:
    sources = []
    for seed in range(3):
        draw = normal(seed)
        made = Adapter.from_updates({"m": LowRank(draw(1536, 12).float(), draw(12, 768).float())}, name=f"a{seed}")
        sources.append(str(made.save(tmp_path / f"a{seed}").path))
    words = [sys.executable, "-c", TAKEN, json.dumps([sources, str(tmp_path / "OUT"), recipe])]
    alone = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    told, taken, most, rank = json.loads(subprocess.run(words, capture_output=True, check=True, env=alone).stdout)
    assert taken <= told <= 1.5 * taken
    assert rank == most
