"""Learning merge weights: objectives against their formulas, the descent, and what it leaves behind."""

from __future__ import annotations

from functools import partial

import pytest
import torch

import kinds
from coremerge import Recipe, load, merge
from coremerge.adapter import Adapter
from coremerge.errors import ConfigError, InputError, UnsupportedError
from coremerge.learning import PRESETS, Settings, learn_weights, measure_null_space, null_space_ratio, read_weights
from coremerge.learning.blocks import choose_modules, measured_of
from coremerge.learning.forward import MergedModel
from coremerge.learning.objectives import Entropy, Match, NullSpace, alone
from coremerge.learning.result import as_tuple
from coremerge.lowrank import LowRank
from families import batches, make_adapter, make_model
from tolerances import DOUBLE, LAYERS, SINGLE


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    return {"a": make_adapter("bert", folder / "a", 1), "b": make_adapter("bert", folder / "b", 2, rank=5)}


@pytest.fixture
def model():
    return make_model("bert")


@pytest.fixture
def data():
    return {"a": batches("bert", 2, seed=1), "b": batches("bert", 3, seed=2)}


def constant(value):
    return lambda target: torch.full((len(target.owner),), value)


def everything(adapters):
    return {name: list(adapter) for name, adapter in adapters.items()}


def inputs(model, merged_adapter, batch):
    """Each module's inputs in the model with an update merged into its weights: no hooks on the way."""
    found, hooks = {}, []
    model = make_model("bert")
    for name, update in merged_adapter.items():
        module = model.get_submodule(name)
        with torch.no_grad():
            module.weight += update.dense().float()
        hooks.append(module.register_forward_hook(lambda _, args, __, name=name: found.update({name: args[0]})))
    with torch.no_grad():
        found["end"] = model.bert(**batch).last_hidden_state
    return found


def plain_sum(adapters, weight):
    return merge(adapters, Recipe(method="sum", scale=1.0, weights=[weight] * len(adapters))).adapter


class TestObjectives:
    def test_the_null_space_ratio(self, model, adapters):
        batch = batches("bert")[0]
        names = [name for name in adapters["a"] if ".layer.3." in name]
        with NullSpace(MergedModel(model, adapters), {"b": names})("b", batch, constant(0.4)) as loss:
            found = loss.item()
        seen = inputs(model, plain_sum(adapters, 0.4), batch)
        ratios = [null_space_ratio(seen[name], adapters["b"][name].right, batch["attention_mask"]) for name in names]
        assert found == pytest.approx(torch.stack(ratios).mean().item(), abs=SINGLE)

    def test_its_distance_to_the_adapters_own(self, model, adapters):
        batch = batches("bert")[0]
        with NullSpace(MergedModel(model, adapters), everything(adapters), own=True)("b", batch, alone("b")) as loss:
            assert loss.item() == 0
        with NullSpace(MergedModel(model, adapters), everything(adapters), own=True)("b", batch, constant(0.4)) as loss:
            found = loss.item()
        merged, own = inputs(model, plain_sum(adapters, 0.4), batch), inputs(model, adapters["b"], batch)
        rights, mask = {name: adapters["b"][name].right for name in adapters["b"]}, batch["attention_mask"]
        apart = [null_space_ratio(merged[n], a, mask) - null_space_ratio(own[n], a, mask) for n, a in rights.items()]
        assert found == pytest.approx(torch.stack(apart).abs().mean().item(), abs=SINGLE)

    def test_the_adapters_own_ratio_is_taken_once_a_batch(self, model, adapters):
        passes = []
        model.bert.register_forward_pre_hook(lambda *_: passes.append(1))
        objective = NullSpace(MergedModel(model, adapters), everything(adapters), own=True)
        for batch, expected in zip([*batches("bert", 2)] * 2, (2, 4, 5, 6), strict=True):
            with objective("b", batch, constant(0.4)):
                assert len(passes) == expected

    def test_matching(self, model, adapters):
        batch = batches("bert")[0]
        merged = MergedModel(model, adapters)
        with Match(merged, list(adapters["a"]))("a", batch, constant(0.4)) as loss:
            found = loss.item()
        seen, own = inputs(model, plain_sum(adapters, 0.4), batch), inputs(model, adapters["a"], batch)
        mask = batch["attention_mask"].unsqueeze(-1)
        apart = [((seen[n] - own[n]).square() * mask).sum() / (own[n].square() * mask).sum() for n in seen]
        assert found == pytest.approx(torch.stack(apart).mean().item(), rel=1e-4)  # squares of differences in float32
        with Match(merged, list(adapters["a"]))("a", batch, alone("a")) as loss:
            assert loss.item() == pytest.approx(0, abs=DOUBLE)

    def test_entropy(self, model, adapters):
        logits = torch.tensor([[0.0, 0.0], [100.0, 0.0]])
        objective = Entropy(MergedModel(model, adapters), {"a": lambda output, batch: logits})
        with objective("a", batches("bert")[0], constant(0.4)) as loss:
            assert loss.item() == pytest.approx(0.5 * torch.tensor(2.0).log().item())
        with pytest.raises(ConfigError, match="needs heads"):
            Entropy(objective.merged, {})

    @pytest.mark.parametrize("objective", ["match", "nsc", "nsc-own"])
    def test_gradients_are_those_of_differences(self, model, adapters, data, objective):
        """A first step of plain descent would go along the gradient: here against differences of the loss."""
        model = model.double()
        exact = {name: adapter.load() for name, adapter in adapters.items()}
        merged = MergedModel(model, exact)
        kinds = {"match": Match(merged, list(merged.targets)), "nsc": NullSpace(merged, everything(exact))}
        chosen = kinds.get(objective) or NullSpace(merged, everything(exact), own=True)
        name = next(iter(merged.targets))

        def loss_at(value):
            value = torch.as_tensor(value, dtype=torch.float64)

            def coefficients(target):
                return value.expand(len(target.owner)) if target.name == name else constant(0.3)(target)

            with chosen("a", data["a"][0], coefficients) as loss:
                if value.requires_grad:
                    loss.backward()
                return loss.detach().double()

        at = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
        loss_at(at)
        step = 1e-2
        slope = (loss_at(0.3 + step) - loss_at(0.3 - step)) / (2 * step)
        assert at.grad.item() == pytest.approx(slope.item(), rel=2e-2, abs=SINGLE)  # differences over a step of 1e-2


class TestDescent:
    def test_matching_finds_the_weights_that_made_the_target(self, model, adapters, data):
        """Adapter b is nothing: a alone is matched exactly by weight 1."""
        nothing = {n: LowRank(0 * u.left, u.right) for n, u in adapters["b"].items()}
        given = {"a": adapters["a"], "b": Adapter.from_updates(nothing)}
        weights = learn_weights(model, given, {"a": data["a"]}, objective="match", steps=150, start=0.5, rate=3e-2)
        assert weights.objective[-1].item() < 0.02 * weights.objective[0].item()
        assert torch.tensor(list(weights["a"].values())).sub(1).abs().mean() < 0.1

    @pytest.mark.parametrize("preset", list(PRESETS))
    @pytest.mark.parametrize("per", ["adapter", "module", "component"])
    def test_it_goes_down(self, model, adapters, data, preset, per):
        weights = learn_weights(model, adapters, data, preset=preset, per=per, steps=12, rate=1e-2)
        first, last = (weights.objective[at].mean() for at in (slice(0, 6), slice(-6, None)))
        assert last < first
        shape = {"adapter": 2, "module": 2 * 12, "component": 12 * (3 + 5)}[per]
        assert weights.path.shape == (13, shape)
        assert weights.settings["per"] == per and weights.tasks == ("a", "b")

    def test_the_result_is_a_recipes_weights(self, model, adapters, data, tmp_path):
        for per in ("adapter", "module", "component"):
            weights = learn_weights(model, adapters, data, per=per, steps=3)
            batch = batches("bert")[0]
            by_hand = merge(adapters, Recipe(method="sum", scale=1.0, weights=weights)).adapter
            by_order = merge(list(adapters.values()), Recipe(method="sum", scale=1.0, weights=weights)).adapter
            for name in by_hand:
                torch.testing.assert_close(by_hand[name].dense(), by_order[name].dense())
            seen = inputs(model, by_hand, batch)["end"]
            merged = MergedModel(model, adapters)
            held = {
                name: torch.cat([torch.as_tensor(weights[key][name]).expand(u.rank) for key, u in pair.items()])
                for name in merged.targets
                for pair in [{key: adapters[key][name] for key in adapters}]
            }
            with torch.no_grad(), merged.run(batch, lambda target, held=held: held[target.name]) as run:
                torch.testing.assert_close(run.hidden, seen, **LAYERS)
        by_hand.save(tmp_path / "out")
        assert len(load(tmp_path / "out")) == 12

    def test_the_order_of_adapters_does_not_matter(self, model, adapters, data):
        one = learn_weights(model, adapters, data, steps=4)
        other = learn_weights(model, dict(reversed(adapters.items())), data, steps=4)
        for key in adapters:
            assert one[key] == pytest.approx(other[key], abs=SINGLE)

    def test_the_same_again(self, model, adapters, data):
        one, two = (learn_weights(model, adapters, data, steps=3) for _ in range(2))
        assert one.table == two.table and torch.equal(one.path, two.path)

    def test_it_can_be_stopped_and_taken_up_again(self, model, adapters, data, tmp_path):
        whole = learn_weights(model, adapters, data, steps=7)
        half = learn_weights(model, adapters, data, steps=4)
        half.save(tmp_path / "half.safetensors")
        resumed = learn_weights(model, adapters, data, steps=7, resume=read_weights(tmp_path / "half.safetensors"))
        assert torch.equal(resumed.path, whole.path)
        assert torch.equal(resumed.objective, whole.objective)
        with pytest.raises(ConfigError, match="resume"):
            learn_weights(model, adapters, {"a": data["a"]}, resume=half)

    def test_settings_hold_it(self, model, adapters, data):
        free = learn_weights(model, adapters, data, steps=10, rate=0.1, objective="match", bounds=None)
        pulled = learn_weights(model, adapters, data, steps=10, rate=0.1, objective="match", bounds=None, pull=100.0)
        bound = learn_weights(model, adapters, data, steps=10, rate=0.1, bounds=(0.9, 1.05))
        assert (pulled.flat() - 1).abs().max() < (free.flat() - 1).abs().max()
        assert bound.flat().min() >= 0.9 - 1e-6 and bound.flat().max() <= 1.05 + 1e-6
        stopped = learn_weights(model, adapters, data, steps=60, rate=0.3, objective="match", bounds=None, patience=3)
        assert stopped.steps < 60

    @pytest.mark.parametrize("per", ["adapter", "module", "component"])
    def test_a_fixed_total(self, model, adapters, data, per):
        found = learn_weights(
            model, adapters, data, steps=5, rate=0.1, per=per, start=0.5, bounds=None, fixed_total=True
        )
        if per == "adapter":
            assert found.path.mean(-1).tolist() == pytest.approx([0.5] * 6)
        for module in adapters["a"]:
            values = [torch.tensor(found[name][module]).reshape(-1) for name in found]
            assert torch.cat(values).mean().item() == pytest.approx(0.5, abs=1e-6)  # a mean of a few in float32
        assert not torch.equal(found.path[0], found.path[-1])

    def test_preferences_count(self, model, adapters, data):
        for_a = learn_weights(model, adapters, data, objective="match", steps=30, rate=3e-2, preferences={"b": 0.0})
        for_b = learn_weights(model, adapters, data, objective="match", steps=30, rate=3e-2, preferences={"a": 0.0})
        assert for_a.objective[-6:, 0].mean() < for_b.objective[-6:, 0].mean()
        assert for_b.objective[-6:, 1].mean() < for_a.objective[-6:, 1].mean()

    def test_entropy_is_for_tasks_with_a_head(self, model, adapters, data):
        heads = {"a": lambda output, batch: model.classifier(output.pooler_output)}
        weights = learn_weights(model, adapters, data, objective="entropy", heads=heads, steps=3)
        assert weights.tasks == ("a",)

    def test_what_is_not_measured_stays_at_the_start(self, model, adapters, data):
        weights = learn_weights(model, adapters, data, preset="vision", steps=2)
        last = "bert.encoder.layer.3.attention.output.dense"
        start = weights.path[0, 0].item()
        assert weights["a"][last] == weights["b"][last] == start
        first = ", ".join(weights.notes)
        assert first == (
            f"2 of 24 coefficients have no influence on what is measured and stayed at the start, {start:.4g}: {last}"
        )

    @pytest.mark.parametrize("per", ["adapter", "module", "component"])
    @pytest.mark.parametrize(
        "changes",
        [{"decay": 0.5}, {"decay": 0.5, "fixed_total": True}, {"bounds": (0.0, 0.4)}, {"decay": 0.5, "pull": 3.0}],
    )
    def test_what_is_said_to_have_stayed_at_the_start_has(self, model, adapters, data, per, changes):
        """Under weight decay, too; and what moved for another's sake is not said to have stayed."""
        few = Adapter.from_updates({n: LowRank(0 * u.left, u.right) for n, u in adapters["b"].items()})
        given = {"a": adapters["a"], "b": few}
        settings = {"per": per, "rate": 0.1, "start": 0.5, "objective": "match", **changes}
        weights = learn_weights(model, given, {"a": data["a"]}, steps=3, **settings)
        stayed = sum(v == 0.5 for row in weights.table.values() for value in row.values() for v in as_tuple(value))
        said = [int(note.split(" of ")[0]) for note in weights.notes if "stayed at the start, 0.5" in note]
        moved = [note for note in weights.notes if "moved only as bounds or the fixed total ask" in note]
        if per == "adapter":
            assert all(note.endswith(": b") for note in weights.notes)
        else:
            assert said == ([stayed] if stayed else []) and (said or moved)
        assert bool(moved) == (bool(changes.keys() & {"fixed_total", "bounds"}))

    def test_what_has_no_influence_is_known_after_a_resume(self, model, adapters, data, tmp_path):
        few = Adapter.from_updates({n: LowRank(0 * u.left, u.right) for n, u in adapters["b"].items()})
        given = {"a": adapters["a"], "b": few}
        half = learn_weights(model, given, {"a": data["a"]}, objective="match", steps=2, start=0.5)
        half.save(tmp_path / "half.safetensors")
        again = read_weights(tmp_path / "half.safetensors")
        for steps in (2, 3):
            rest = learn_weights(
                model, given, {"a": data["a"]}, objective="match", steps=steps, resume=again, start=0.9
            )
            assert rest.notes == half.notes and "12 of 24 coefficients" in rest.notes[0]
            assert " (b)" in rest.notes[0] and "(a" not in rest.notes[0]

    def test_nothing_has_influence(self):
        """The only layer's inputs come before any adapter."""
        kind = kinds.KINDS["whisper_classes"]
        model = kinds.make(kind)
        adapters = {
            key: Adapter.from_updates({n: u for n, u in one.items() if ".0." in n})
            for key, one in kinds.adapters_of(model).items()
        }
        weights = learn_weights(model, adapters, {key: [kinds.batch_of(kind)] for key in "ab"}, steps=2, start=0.7)
        assert "4 of 4 coefficients have no influence on what is measured and stayed" in weights.notes[0]
        assert weights.flat().tolist() == pytest.approx([0.7] * 4)

    @pytest.mark.parametrize("name", ["gemma4", "gemma3n", "whisper", "speecht5", "wav2vec2", "sapiens2"])
    @pytest.mark.parametrize("objective", ["match", "nsc-own"])
    def test_every_kind_of_model_learns(self, name, objective):
        kind = kinds.KINDS[name]
        model = kinds.make(kind)
        adapters = kinds.adapters_of(model, kind.targets)
        data = {key: [kinds.batch_of(kind, seed)] for seed, key in enumerate("ab")}
        weights = learn_weights(model, adapters, data, objective=objective, steps=3)
        assert not torch.equal(weights.path[0], weights.path[-1]) and set(weights["a"]) == set(adapters["a"])
        assert set(measure_null_space(model, adapters, data)["a"]["b"]) == set(adapters["a"])

    def test_modules_that_a_model_has_no_use_for_stay_at_the_start(self):
        kind = kinds.SHARING["gemma3n"]
        model = kinds.make(kind)
        donor = kinds.adapters_of(model, ("k_proj",))["a"]["model.layers.1.self_attn.k_proj"]
        unused = {f"model.layers.{i}.self_attn.k_proj": donor for i in (2, 3)}
        adapters = {
            key: Adapter.from_updates({**dict(one.items()), **unused}, name=key)
            for key, one in kinds.adapters_of(model, kind.targets).items()
        }
        weights = learn_weights(model, adapters, {key: [kinds.batch_of(kind)] for key in "ab"}, steps=2, start=0.5)
        assert "model.layers.[2-3].self_attn.k_proj" in weights.notes[0]
        assert {weights[key][name] for key in "ab" for name in unused} == {0.5}

    def test_experts_whose_routing_changes_are_refused(self):
        class Routed(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.first, self.expert = torch.nn.Linear(6, 6), torch.nn.Linear(6, 6)

            def forward(self, x):
                x = self.first(x)
                return self.expert(x[x[:, 0] > 0])

        torch.manual_seed(0)
        updates = {key: {n: LowRank(torch.randn(6, 1), torch.randn(1, 6)) for n in ("first", "expert")} for key in "ab"}
        adapters = {key: Adapter.from_updates(held) for key, held in updates.items()}
        with pytest.raises(UnsupportedError, match="another way"):
            learn_weights(Routed(), adapters, {key: [{"x": torch.randn(40, 6)}] for key in "ab"}, objective="match")

    def test_a_models_own_exception_names_the_layer_and_the_task(self, model, adapters, data):
        long = {"input_ids": torch.ones(1, 40, dtype=torch.long)}
        for run in (partial(learn_weights, steps=1), measure_null_space):
            with pytest.raises(InputError, match="on the inputs of b the base model stops here with") as raised:
                run(model, adapters, {"a": data["a"], "b": [long]})
            assert raised.value.key.startswith("bert.embeddings") and raised.value.__cause__ is not None

    def test_progress_and_half_precision(self, model, adapters, data):
        told = []
        weights = learn_weights(
            model,
            adapters,
            data,
            steps=2,
            autocast=torch.bfloat16,
            checkpointing=True,
            progress=lambda *a: told.append(a),
        )
        assert [(done, count) for done, count, _ in told] == [(1, 2), (2, 2)] and set(told[0][2]) == {"a", "b"}
        assert bool(weights.flat().isfinite().all())

    def test_labels_are_not_read(self, model, adapters, data):
        for batch in data["a"]:
            batch["labels"] = object()
        learn_weights(model, adapters, data, steps=1)

    def test_adapters_that_lack_modules(self, model, adapters, data):
        few = Adapter.from_updates({name: adapters["b"][name] for name in list(adapters["b"])[:4]})
        weights = learn_weights(model, {"a": adapters["a"], "b": few}, data, steps=2, per="component")
        assert len(weights["a"]) == 12 and len(weights["b"]) == 4

    @pytest.mark.parametrize(
        ("changes", "error", "message"),
        [
            ({"data": {"c": []}}, ConfigError, 'data = "c": no adapter of that name. Adapters: a, b'),
            ({"data": {"a": []}}, InputError, "a: no inputs"),
            ({"data": {}}, ConfigError, "no task to learn from"),
            ({"preferences": {"c": 1.0}}, ConfigError, "preferences"),
            ({"preferences": {"a": -1.0}}, ConfigError, "no task to learn from"),
            ({"preset": "audio"}, ConfigError, "no such preset"),
            ({"preset": Settings("max")}, ConfigError, "no such objective"),
            ({"objective": "max"}, ConfigError, "no such objective"),
            ({"stepz": 3}, ConfigError, "no such setting"),
            ({"modules": "*.nothing"}, ConfigError, "measures none"),
        ],
    )
    def test_refusals(self, model, adapters, data, changes, error, message):  # noqa: PLR0917
        given = {"data": data, "steps": 1, **changes}
        with pytest.raises(error, match=message):
            learn_weights(model, adapters, given.pop("data"), **given)

    def test_inputs_that_are_not_numbers(self, model, adapters, data):
        with torch.no_grad():
            model.bert.embeddings.word_embeddings.weight.fill_(torch.nan)
        with pytest.raises(InputError, match="a: the objective is not finite"):
            learn_weights(model, adapters, data, steps=1)

    def test_inputs_that_reach_nothing(self, adapters, tmp_path):
        text = {"t": make_adapter("llava", tmp_path / "t", 1)}
        vision = Adapter.from_updates({n: u for n, u in text["t"].items() if "vision" in n})
        ids = {"input_ids": torch.ones(1, 4, dtype=torch.long)}
        with pytest.raises(InputError, match="t: the inputs reach no module"):
            learn_weights(make_model("llava"), {"t": vision}, {"t": [ids]}, preset="vision", modules="all", steps=1)

    def test_it_stops_where_progress_says_so(self, model, adapters, data):
        assert learn_weights(model, adapters, data, progress=lambda done, *_: done < 3).steps == 3

    @pytest.mark.parametrize(("objective", "rate"), [(None, 1e-2), ("match", 2e-2), ("nsc", 3e-4), ("nsc-own", 1e-2)])
    def test_an_objective_comes_with_its_settings(self, model, adapters, data, objective, rate):
        settings = learn_weights(model, adapters, data, objective=objective, steps=1).settings
        assert (settings["rate"] == rate and settings["objective"] == objective) or objective is None

    def test_settings_of_ones_own(self, model, adapters, data):
        assert learn_weights(model, adapters, data, preset=Settings(steps=2)).steps == 2


class TestModules:
    def test_the_last_quarter_is_counted(self, model, adapters):
        merged = MergedModel(model, adapters)
        chosen = choose_modules(merged, "last-quarter")
        assert {name.split(".")[3] for name in chosen} == {"3"} and len(chosen) == 3
        assert choose_modules(merged, "all") == list(merged.targets)
        assert len(choose_modules(merged, "*.query, *.value")) == 8

    @pytest.mark.parametrize(("family", "stacks"), [("t5", 2), ("llava", 2), ("gpt2", 1), ("vit", 1)])
    def test_in_every_family_and_stack(self, family, stacks, tmp_path):
        merged = MergedModel(make_model(family), {"a": make_adapter(family, tmp_path / "a", 1)})
        assert 4 * len(choose_modules(merged, "last-quarter")) == len(merged.targets)

    def test_an_adapter_without_late_blocks_is_measured_in_its_own(self, model, adapters, data, tmp_path):
        early = make_adapter("bert", tmp_path / "early", 3, layers_to_transform=[0, 1])
        both = {"a": adapters["a"], "b": early}
        found = measured_of(MergedModel(model, both), "last-quarter")
        assert {adapter: {name.split(".")[3] for name in names} for adapter, names in found.items()} == {
            "a": {"3"},
            "b": {"1"},
        }
        assert measured_of(MergedModel(model, both), "*.3.*")["b"] == []
        assert {name.split(".")[3] for name in measured_of(MergedModel(model, {"b": early}), "last-quarter")["b"]} == {
            "1"
        }
        with pytest.raises(ConfigError, match="measures none"):
            measured_of(MergedModel(model, {"b": early}), "*.3.*")
        assert learn_weights(model, both, data, objective="nsc", steps=1).steps == 1
        with pytest.raises(InputError, match="b: the inputs reach no module that is measured"):
            learn_weights(model, both, data, objective="nsc", modules="*.3.*", steps=1)


class TestMeasure:
    def test_it_is_the_ratio_of_the_models_own_activations(self, model, adapters):
        data = {"text": batches("bert", 2)}
        table = measure_null_space(model, adapters, data)
        assert set(table) == {"text"} and set(table["text"]) == {"a", "b"} and len(table["text"]["a"]) == 12
        nothing = plain_sum(adapters, 0.0)
        parts = [(inputs(model, nothing, batch), batch["attention_mask"]) for batch in data["text"]]
        name = "bert.encoder.layer.2.attention.self.query"
        sums = sum(
            (null_space_ratio(seen[name], adapters["b"][name].right) * mask).sum() for seen, mask in parts
        ) / sum(mask.sum() for _, mask in parts)
        assert table["text"]["b"][name] == pytest.approx(sums.item(), abs=SINGLE)

    def test_in_a_merged_model(self, model, adapters):
        data = {"a": batches("bert", 1)}
        free = measure_null_space(model, adapters, data)["a"]["a"]
        held = measure_null_space(model, adapters, data, weights={"a": 1.0})["a"]["a"]
        first = "bert.encoder.layer.0.attention.self.query"
        last = "bert.encoder.layer.3.attention.self.query"
        assert free[first] == held[first] and free[last] != held[last]
        same = measure_null_space(model, adapters, data, weights={"a": dict.fromkeys(adapters["a"], 1.0)})["a"]["a"]
        assert same == held


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_a_model_spread_by_accelerate(adapters, data, place, tmp_path):
    """As with several devices: hooks of accelerate move every part's inputs, or fetch its weights, as it runs."""
    from accelerate import dispatch_model

    parts = dict.fromkeys(("bert.embeddings", "bert.pooler", "dropout", "classifier"), "cpu")
    parts |= {f"bert.encoder.layer.{i}": place if i % 2 else "cpu" for i in range(4)}
    spread = dispatch_model(make_model("bert"), parts, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
    for objective in ("nsc-own", "match"):
        found = learn_weights(spread, adapters, data, objective=objective, steps=3)
        expected = learn_weights(make_model("bert"), adapters, data, objective=objective, steps=3)
        torch.testing.assert_close(found.path, expected.path)
        assert not torch.equal(found.path[0], found.path[-1])


def test_the_callers_random_numbers_are_left_alone(adapters, data):
    torch.manual_seed(5)
    model, before = make_model("bert"), torch.get_rng_state()
    learn_weights(model, adapters, data, steps=1)
    assert torch.equal(torch.get_rng_state(), before)
