import json

import pytest
import torch
from hypothesis import given

import oracles
from coremerge.adapter import Adapter, Info, Module
from coremerge.errors import MismatchError, TensorError
from coremerge.lowrank import LowRank, total
from coremerge.merging import merge
from coremerge.methods import METHODS, Method
from coremerge.plan import make_plan
from coremerge.recipe import Recipe
from laws import adapter_sets, close, dense, largest, lowrank, merged, named, normal, one, orthogonal, regauged, run
from tolerances import DIGITS, DOUBLE

PAIR = [lowrank(9, 7, r, seed=r) for r in (2, 3)]
TSV_ISO = {"method": "tsv", "steps": ["isotropize"]}


def padded(adapters: list[Adapter], name: str) -> list[torch.Tensor]:
    """Every adapter's update of the module, zero where it has none."""
    shape = next(a[name].shape for a in adapters if name in a)
    return [a[name].dense() if name in a else torch.zeros(shape).double() for a in adapters]


@given(adapter_sets())
def test_whole_adapters_merge_module_by_module(adapters: list[Adapter]) -> None:
    for recipe, oracle in (
        ({"method": "sum", "allow_disjoint": True}, oracles.sum_),
        ({"method": "mean", "space": "knots", "allow_disjoint": True}, oracles.mean),
        ({"method": "ties", "parameters": {"density": 0.2}, "space": "full", "allow_disjoint": True}, oracles.ties),
        ({"method": "cart", "allow_disjoint": True}, oracles.cart),
    ):
        result = run(adapters, **recipe)
        assert list(result.adapter) == sorted({name for a in adapters for name in a})
        for name, update in result.adapter.items():
            size = max(largest([a[name]]) for a in adapters if name in a)
            close(update.dense(), oracle(padded(adapters, name)), size * 4, tol=1e-6)


@given(adapter_sets())
def test_the_published_default_is_the_oracle_on_whole_adapters(adapters: list[Adapter]) -> None:
    result = run(adapters, allow_disjoint=True, **TSV_ISO)
    for name, update in result.adapter.items():
        expected = oracles.isotropize(oracles.tsv(padded(adapters, name)))
        size = max(largest([a[name]]) for a in adapters if name in a)
        ranks = sum(a.modules[name].rank for a in adapters if name in a)
        assert update.rank <= ranks
        close(update.dense(), expected, size * 4, tol=1e-5)


def test_the_published_pairs_of_method_and_space_are_one_call() -> None:
    xs = [u.dense() for u in PAIR]
    close(merged(PAIR, **TSV_ISO), oracles.isotropize(oracles.tsv(xs)))
    u, s, vs = oracles.knots_space(xs)
    cores = [s[:, None] * v for v in vs]
    close(merged(PAIR, space="knots", method="ties", steps=["isotropize"]), u @ oracles.isotropize(oracles.ties(cores)))
    close(merged(PAIR, space="full", method="ties", steps=["isotropize"]), oracles.isotropize(oracles.ties(xs)))


# One overall scale.


@pytest.mark.parametrize("recipe", [{"method": "sum"}, {"method": "mean"}, {"method": "ties"}, TSV_ISO])
def test_auto_scale_is_the_oracle(recipe: dict) -> None:
    adapters = [
        Adapter.from_updates(
            {"m": lowrank(6, 5, 2, seed=s), "n": 30 * lowrank(4, 9, 3, seed=s + 9)} | extra, name=f"a{s}"
        )
        for s, extra in ((0, {}), (1, {"o": lowrank(4, 4, 1)}), (2, {"z": 0 * lowrank(3, 3, 1)}))
    ]
    plain = dense(run(adapters, **recipe).adapter)
    auto = run(adapters, scale="auto", **recipe)
    names = ["m", "n", "o"]  # nobody has an update at z
    expected = oracles.auto_scale([plain[n] for n in names], [padded(adapters, n) for n in names])
    assert auto.report.scale == pytest.approx(expected)
    close(auto.adapter["n"].dense(), expected * plain["n"])


def test_auto_scale_leaves_a_single_adapter_as_it_is() -> None:
    result = run([one(PAIR[0])], method="sum", scale="auto")
    assert result.report.scale == pytest.approx(1.0, rel=DIGITS)
    close(result.adapter["layer"].dense(), PAIR[0].dense(), tol=DIGITS)
    halved = run([one(PAIR[0])], method="sum", scale="auto", weights=[0.5])
    close(halved.adapter["layer"].dense(), PAIR[0].dense())


def test_auto_scale_does_not_see_the_scale_of_the_method() -> None:
    one_, other = (run(named(PAIR), method="ties", scale="auto", parameters={"reduce": r}) for r in ("mean", "sum"))
    assert one_.report.scale * one_.report.modules["layer"].norm == pytest.approx(
        other.report.scale * other.report.modules["layer"].norm
    )


def test_auto_scale_weakens_what_is_flat_and_what_adds_up() -> None:
    same = run(named([PAIR[0]] * 4), method="sum", scale="auto")
    assert same.report.scale == pytest.approx(0.25)
    flat = run([one(PAIR[0])], method="sum", steps=["isotropize"], scale="auto").report
    assert flat.scale * flat.modules["layer"].norm < flat.modules["layer"].input_norm


def test_auto_scale_does_not_blow_up_rounding_error() -> None:
    for recipe in ({"method": "sum"}, TSV_ISO, {"method": "cart"}):
        result = run(named([PAIR[0], PAIR[0]]), scale="auto", weights=[1, -1], **recipe)
        assert result.report.scale == 1.0
        assert result.adapter["layer"].dense().abs().max() < 1e-10
    nothing = run(named([0 * PAIR[0], 0 * PAIR[0]]), scale="auto", **TSV_ISO)
    assert nothing.report.scale == 1.0
    assert nothing.adapter["layer"].rank == 0


@pytest.mark.parametrize("scale", [0.0, 1.0, -2.0, 0.3])
def test_the_scale_is_applied_once(scale: float) -> None:
    result = run(named(PAIR), method="sum", scale=scale)
    close(result.adapter["layer"].dense(), scale * (PAIR[0].dense() + PAIR[1].dense()), 10)
    assert result.report.scale == scale


# Where the scale sits in the factors, and how updates are split, does not matter.


@pytest.mark.parametrize(
    "recipe", [{"method": "sum"}, TSV_ISO, {"method": "cart"}, {"method": "ties", "basis": "balanced"}]
)
def test_the_convention_of_alpha_and_r_does_not_matter(recipe: dict) -> None:
    scales = (2.0, 0.125)
    on_left = named([LowRank(s * u.left, u.right) for s, u in zip(scales, PAIR, strict=True)])
    on_right = named([LowRank(u.left, s * u.right) for s, u in zip(scales, PAIR, strict=True)])
    on_both = named([LowRank(s**0.5 * u.left, s**0.5 * u.right) for s, u in zip(scales, PAIR, strict=True)])
    results = [run(given, scale="auto", **recipe).adapter["layer"].dense() for given in (on_left, on_right, on_both)]
    close(results[0], results[1])
    close(results[0], results[2])


def test_updates_with_equal_singular_values_lift_exactly_in_the_balanced_basis() -> None:
    """Their singular vectors are arbitrary: the lift must not depend on finding the same ones twice."""
    flat = [LowRank(orthogonal(40, s)[:, :8], orthogonal(30, s + 5)[:8]) for s in (0, 1)]
    expected = flat[0].dense() + flat[1].dense()
    for recipe in ({"basis": "balanced"}, {"steps": ["balance"]}):
        close(merged(flat, method="sum", **recipe), expected)
    result = run(named(flat), method="sum", basis="balanced")
    shaken = {k: one(regauged(u, seed=i)) for i, (k, u) in enumerate(zip(("a0", "a1"), flat, strict=True))}
    close(result.adapter["layer"].dense(), run(shaken, method="sum", basis="balanced").adapter["layer"].dense())


# Ranks and what a cut loses.


@pytest.mark.parametrize("recipe", [{"method": "sum"}, TSV_ISO, {"method": "ties", "space": "full"}])
@pytest.mark.parametrize("rank", [1, 3, 5, 99])
def test_the_cut_is_the_best_of_its_rank_and_reports_the_energy_lost(recipe: dict, rank: int) -> None:
    exact, cut = run(named(PAIR), rank="exact", **recipe), run(named(PAIR), rank=rank, **recipe)
    whole, part = exact.adapter["layer"].dense(), cut.adapter["layer"].dense()
    values = torch.linalg.svdvals(whole)
    lost = values[rank:].square().sum() / values.square().sum()
    report = cut.report.modules["layer"]
    assert (report.lost, cut.report.lost) == (pytest.approx(lost.item()), pytest.approx(lost.item()))
    assert ((whole - part).norm() / whole.norm()).square().item() == pytest.approx(lost.item(), abs=DIGITS)
    assert report.rank == cut.adapter["layer"].rank == min(rank, report.merged_rank)
    assert cut.adapter.modules["layer"].rank == cut.report.rank == report.rank
    assert report.merged_rank == exact.report.rank == oracles.rank(whole)


def test_the_energy_lost_in_all_is_weighted_by_energy() -> None:
    adapters = [
        Adapter.from_updates({"m": lowrank(6, 5, 2, seed=s), "n": 9 * lowrank(4, 9, 3, seed=s)}) for s in (0, 1)
    ]
    report = run(adapters, method="sum", rank=1).report
    energy = sum(m.energy for m in report.modules.values())
    assert report.lost == pytest.approx(sum(m.lost * m.energy for m in report.modules.values()) / energy)
    assert report.lost != pytest.approx(sum(m.lost for m in report.modules.values()) / 2)


def test_a_flat_spectrum_cut_short_is_warned_of() -> None:
    def warned(**recipe: object) -> bool:
        return any("flat spectrum" in w for w in run(named(PAIR), **recipe).report.warnings)

    assert warned(rank=2, **TSV_ISO)
    assert not warned(rank=5, **TSV_ISO)
    assert not warned(**TSV_ISO)
    assert not warned(method="sum", rank=4)


def test_a_cut_of_what_no_step_made_flat_is_not_blamed_on_a_flat_spectrum() -> None:
    default = {"method": "tsv", "steps": None, "rank": 1}
    alone, summed = run(named(PAIR[:1]), **default).report, run(named(PAIR), method="sum", rank=1).report
    assert alone.alone == 1
    for report in (alone, summed):
        (said,) = report.warnings
        assert said.startswith("the cut to rank 1 loses") and said.endswith("; give a higher --rank")
    named_step = run(named(PAIR[:1]), method="sum", steps=["isotropize"], rank=1).report
    assert named_step.warnings[-1].endswith(
        "a flat spectrum does not truncate well; give a higher --rank, or leave out isotropize"
    )


@pytest.mark.parametrize("space", ["core", "core:basis=balanced", "knots"])
@pytest.mark.parametrize("method", ["sum", "ties", "dare", "tsv", "cart"])
def test_no_result_has_a_higher_rank_than_all_inputs_together(space: str, method: str) -> None:
    updates = [lowrank(40, 30, r, seed=r) for r in (2, 3)]
    assert run(named(updates), space=space, method=method, steps=["isotropize"]).report.rank <= 5


# The report.


def test_the_report_tells_norms_and_ranks() -> None:
    zero = 0 * lowrank(9, 7, 1)
    result = run({**named(PAIR), "zero": one(zero)}, method="sum")
    report, norms = result.report.modules["layer"], [torch.linalg.matrix_norm(u.dense(), 2).item() for u in PAIR]
    summed = PAIR[0].dense() + PAIR[1].dense()
    assert report.input_norm == pytest.approx(sum(norms) / 2)
    assert report.input_frobenius == pytest.approx(sum(u.norm().item() for u in PAIR) / 2)
    assert report.norm == pytest.approx(torch.linalg.matrix_norm(summed, 2).item())
    assert report.energy == pytest.approx(summed.square().sum().item())
    assert (report.shape, dict(report.ranks)) == ((9, 7), {"a0": 2, "a1": 3, "zero": 1})
    told = json.loads(json.dumps(result.report.to_dict()))
    assert told["modules"]["layer"]["ranks"] == {"a0": 2, "a1": 3, "zero": 1}
    assert (told["scale"], told["rank"], told["energy_lost"]) == (1.0, 5, 0.0)
    assert told["seconds"] >= 0


def test_weights_do_not_change_the_inputs_norm() -> None:
    one_, other = (run(named(PAIR), method="sum", weights=w).report.modules["layer"] for w in ([1, 1], [5, -3]))
    assert one_.input_norm == pytest.approx(other.input_norm)
    assert one_.norm != pytest.approx(other.norm)


def test_the_plans_warnings_are_in_the_report() -> None:
    adapters = [
        Adapter.from_updates({"m": PAIR[0], "n": PAIR[0]}, name="a"),
        Adapter.from_updates({"m": PAIR[1]}, name="b"),
    ]
    result = run(adapters, method="sum")
    assert result.report.warnings == result.plan.warnings != ()


def test_progress_is_told() -> None:
    steps = []
    adapter = Adapter.from_updates({f"m{i}": lowrank(3, 3, 1) for i in range(4)})
    merge([adapter, adapter], batch=1, progress=lambda done, all_: steps.append((done, all_)))
    assert steps == [(1, 4), (2, 4), (3, 4), (4, 4)]
    steps.clear()
    merge([adapter, adapter], batch=3, progress=lambda done, all_: steps.append((done, all_)))
    assert steps == [(3, 4), (4, 4)]


def test_the_defaults_are_those_of_the_recipe() -> None:
    defaults, named_ = merge(named(PAIR)), merge(named(PAIR), Recipe())
    assert torch.equal(defaults.adapter["layer"].dense(), named_.adapter["layer"].dense())


# The merged adapter.


def test_the_result_is_an_adapter_of_the_inputs_kinds_and_dtype() -> None:
    kinds = {"c": Module((4, 12), 1, "conv1d", (3,))}
    half = [
        Adapter.from_updates({"c": lowrank(4, 12, r).to(torch.bfloat16)}, kinds=kinds, info=Info(base_model="b"))
        for r in (1, 2)
    ]
    adapter = run(half, method="sum").adapter
    assert (adapter.name, adapter.dtype, adapter.info.base_model) == ("merged", torch.bfloat16, "b")
    assert adapter.modules["c"] == Module((4, 12), 3, "conv1d", (3,), 1.0, torch.bfloat16)
    assert adapter["c"].dtype == torch.float64
    assert run(half, method="sum", dtype="float32").adapter.dtype == torch.float32


def test_factors_are_read_when_asked_for_and_loading_is_independent_of_the_inputs() -> None:
    reads = []

    def read(name: str) -> LowRank:
        reads.append(name)
        return PAIR[0]

    lazy = Adapter({"layer": Module((9, 7), 2)}, read)
    result = run([lazy, one(PAIR[1])], method="sum")
    assert reads == ["layer"]
    loaded = result.adapter.load()
    assert reads == ["layer"] * 2
    close(loaded["layer"].dense(), PAIR[0].dense() + PAIR[1].dense())
    assert reads == ["layer"] * 2


def test_a_merge_of_merges_is_the_merge_of_all() -> None:
    first = run(named(PAIR), method="sum").adapter
    both = run({"first": first, "more": one(lowrank(9, 7, 1))}, method="sum").adapter
    close(both["layer"].dense(), PAIR[0].dense() + PAIR[1].dense() + lowrank(9, 7, 1).dense())


@pytest.mark.parametrize(("method", "share"), [("sum", 1.0), ("tsv", 1.0), ("mean", 0.5)])
def test_biases_are_weighted_sums(method: str, share: float) -> None:
    def biased(value: float, *modules: str) -> Adapter:
        biases = {m: torch.full((4,), value, dtype=torch.float16) for m in modules}
        return Adapter.from_updates({"m": lowrank(4, 3, 1), "n": lowrank(4, 3, 1)}, biases=biases)

    pair = {"a": biased(1.0, "m"), "b": biased(3.0, "m", "n")}
    result = run(pair, method=method, weights={"b": {"m": -2.0, "n": 4.0}}, scale=0.5).adapter
    assert dict(result.biases).keys() == {"m", "n"}
    close(result.biases["m"], torch.full((4,), 0.5 * share * (1 - 6)).double())
    close(result.biases["n"], torch.full((4,), 0.5 * share * 12).double())
    assert "m" not in run(named(PAIR), method="sum").adapter.biases


def test_biases_follow_any_linear_method(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(METHODS, "entries", dict(METHODS.entries))

    @METHODS.register("first_less_others", unitary=True, linear=True, source="none")
    def first_less_others(share: float = 0.25) -> Method:
        return lambda cores, site: total([cores[0], *(core * -share for core in cores[1:])])

    def biased(value: float) -> Adapter:
        return Adapter.from_updates({"m": lowrank(4, 3, 1)}, biases={"m": torch.full((4,), value)})

    recipe = {"method": "first_less_others", "parameters": {"share": "0.5"}, "weights": [2.0, 1.0, 1.0]}
    result = run([biased(1.0), biased(3.0), one(lowrank(4, 3, 1))], **recipe)
    close(result.adapter.biases["m"], torch.full((4,), 2.0 - 0.5 * 3).double())


# The dtypes of reading and lifting.


def stored(update: LowRank, dtype: torch.dtype, name: str = "stored") -> Adapter:
    """As from a file of ``dtype``: read in float32, which holds it exactly."""
    short = update.to(torch.float32)
    module = Module(update.shape, update.rank, dtype=dtype)
    return Adapter(
        {"layer": module}, lambda _: short.to(torch.float64), read=lambda _, d: short.to(d or torch.float32), name=name
    )


SPACES = [{"space": "core"}, {"basis": "balanced"}, {"space": "knots"}, {"space": "full"}, {"steps": ["balance"]}]


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("recipe", SPACES)
def test_inputs_read_in_float32_merge_in_float64(recipe: dict, batch: int) -> None:
    short = [stored(u, torch.float16) for u in PAIR]
    assert short[0].read("layer").dtype == torch.float32
    recipe = {"method": "tsv", "scale": 1.0} | recipe
    result = merge(short, Recipe(**recipe), batch=batch).adapter["layer"]
    assert result.dtype == torch.float64
    close(result.dense(), run([a.load() for a in short], **recipe).adapter["layer"].dense(), tol=DIGITS)
    mixed = merge([short[0], one(PAIR[1])], Recipe(**recipe), batch=batch).adapter["layer"]
    close(mixed.dense(), run([short[0].load(), one(PAIR[1])], **recipe).adapter["layer"].dense(), tol=DIGITS)


@pytest.mark.parametrize("weights", [[1, 1], [1, -1]])
@pytest.mark.parametrize("recipe", SPACES)
def test_a_lift_in_float32_costs_less_than_rounding_the_result(recipe: dict, weights: list[float]) -> None:
    """With weights 1, −1 the sum of two that nearly agree cancels, which float32 would not survive."""
    dtype = torch.float16
    a = lowrank(60, 50, 4)
    near = LowRank(a.left + 1e-5 * lowrank(60, 50, 4, seed=1).left, a.right + 1e-5 * lowrank(60, 50, 4, seed=2).right)
    adapters = [stored(u, dtype, f"a{i}") for i, u in enumerate((a, near))]
    adapter = run(adapters, method="sum", weights=weights, **recipe).adapter
    exact, short = adapter["layer"].dense(), adapter.read("layer", torch.float32)
    assert short.dtype == torch.float32
    assert (short.to(torch.float64).dense() - exact).norm() < torch.finfo(dtype).eps / 4 * exact.norm()
    assert torch.equal(adapter.read("layer", torch.float64).left, adapter["layer"].left)


# Threads, batches and failures.


def many(count: int = 10) -> list[Adapter]:
    draw = normal(3)
    shapes = [(6, 5), (8, 4)]
    return [
        Adapter.from_updates(
            {f"m{i}": LowRank(draw(shapes[i % 2][0], r), draw(r, shapes[i % 2][1])) for i in range(count)}, name=f"a{r}"
        )
        for r in (1, 2, 2)
    ]


@pytest.mark.parametrize("batch", [2, 3, 8, 100])
@pytest.mark.parametrize("recipe", [TSV_ISO, {"method": "dare_ties"}, {"method": "cart", "space": "knots"}])
def test_batches_give_the_same_merge(batch: int, recipe: dict) -> None:
    weights = {"a1": {f"m{i}": 0.1 * i for i in range(10)}, "a2": -2.0}
    settings = Recipe(scale="auto", weights=weights, rank=3, **recipe)
    alone, together = merge(many(), settings, threads=1), merge(many(), settings, threads=2, batch=batch)
    assert together.report.scale == pytest.approx(alone.report.scale)
    for name in alone.adapter:
        close(together.adapter[name].dense(), alone.adapter[name].dense(), tol=DOUBLE)
        ours, theirs = vars(together.report.modules[name]), vars(alone.report.modules[name])
        assert {k: v for k, v in ours.items() if not isinstance(v, float)} == {
            k: v for k, v in theirs.items() if not isinstance(v, float)
        }
        assert [v for v in ours.values() if isinstance(v, float)] == pytest.approx(
            [v for v in theirs.values() if isinstance(v, float)], rel=DOUBLE, abs=DIGITS
        )  # norms and energies of any size; a share that is lost may be nothing


def test_well_conditioned_batches_agree_to_the_last_digits() -> None:
    def updates(seed: int) -> dict[str, LowRank]:
        return {f"m{i}": LowRank(orthogonal(12, seed + i)[:, :3] * 2, orthogonal(10, seed - i)[:3]) for i in range(8)}

    pair = [Adapter.from_updates(updates(100), name="a"), Adapter.from_updates(updates(200), name="b")]
    alone, together = (run(pair, **TSV_ISO), merge(pair, Recipe(scale=1.0, **TSV_ISO), batch=8))
    for name in alone.adapter:
        close(together.adapter[name].dense(), alone.adapter[name].dense(), tol=DIGITS)


@pytest.mark.parametrize(
    "recipe", [TSV_ISO, {"method": "ties"}, {"method": "tsv", "space": "knots"}, {"method": "sum"}]
)
def test_modules_of_different_numerical_ranks_leave_their_batch(recipe: dict) -> None:
    updates = {
        "m0": lowrank(6, 5, 2),
        "m1": LowRank(lowrank(6, 5, 2).left, torch.ones(2, 5).double()),
        "m2": 0 * lowrank(6, 5, 2),
    }
    pair = [
        Adapter.from_updates(updates, name="a"),
        Adapter.from_updates({k: lowrank(6, 5, 2, 9) for k in updates}, name="b"),
    ]
    alone, together = run(pair, **recipe), merge(pair, Recipe(**{"scale": 1.0, "steps": []} | recipe), batch=8)
    for name in alone.adapter:
        close(together.adapter[name].dense(), alone.adapter[name].dense())
        assert together.report.modules[name].merged_rank == alone.report.modules[name].merged_rank


@pytest.mark.parametrize("error", [KeyboardInterrupt, MismatchError])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_failure_in_one_module_ends_the_merge(error: type[BaseException], threads: int) -> None:
    reads = []

    def read(name: str) -> LowRank:
        reads.append(name)
        if name == "m01":
            raise error("stop")
        return lowrank(4, 3, 1)

    adapter = Adapter({f"m{i:02}": Module((4, 3), 1) for i in range(50)}, read)
    with pytest.raises(error, match="stop"):
        merge([adapter], threads=threads, batch=1)
    assert len(reads) < 10


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("recipe", [TSV_ISO, {"method": "sum", "space": "full"}, {"method": "ties", "space": "knots"}])
def test_numbers_that_are_not_finite_are_named(value: float, recipe: dict) -> None:
    bad = one(LowRank(torch.full((9, 2), value).double(), torch.ones(2, 7).double()))
    with pytest.raises(TensorError, match="a1: module layer has NaN or infinite values"):
        run({"a0": one(PAIR[0]), "a1": bad}, **recipe)


def test_a_plan_can_be_carried_out_twice() -> None:
    from coremerge.merging import execute

    plan = make_plan(named(PAIR), Recipe())
    assert torch.equal(execute(plan).adapter["layer"].left, execute(plan, device="cpu", batch=1).adapter["layer"].left)
