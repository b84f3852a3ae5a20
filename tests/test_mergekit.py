"""mergekit's own recipes: what it means by them is what is merged here."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from coremerge.adapter import Adapter
from coremerge.errors import ConfigError
from coremerge.lowrank import LowRank
from coremerge.merging import merge
from coremerge.recipe import Recipe, RecipeFile, read_recipe, write_recipe
from laws import close, lowrank

STANDARD = """
models:
  - model: base
    # no parameters necessary for base model
  - model: one
    parameters:
      density: [1, 0.7, 0.1] # density gradient
      weight: 1.0
  - model: two
    parameters:
      density: 0.5
      weight: [0, 0.3, 0.7, 1] # weight gradient
  - model: three
    parameters:
      density: 0.33
      weight:
        - filter: mlp
          value: 0.5
        - value: 0
merge_method: ties
base_model: base
parameters:
  normalize: true
  int8_mask: true
dtype: float16
tokenizer_source: union
"""
"""mergekit's own example of gradients."""


def read(tmp_path: Path, text: str) -> RecipeFile:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return read_recipe(path)


def adapters(count: int = 3, layers: int = 4) -> dict[str, Adapter]:
    names = [f"model.layers.{i}.{part}" for i in range(layers) for part in ("self_attn.q_proj", "mlp.up_proj")]
    return {
        f"a{t}": Adapter.from_updates(
            {name: lowrank(8, 6, 2, seed=100 * t + i) for i, name in enumerate([*names, "lm_head"])}, name=f"a{t}"
        )
        for t in range(count)
    }


def test_a_standard_recipe_is_read(tmp_path: Path) -> None:
    file = read(tmp_path, STANDARD)
    assert file.models == ("one", "two", "three") and file.base_model == "base"
    assert file.recipe.parameters == {"density": ((1.0, 0.7, 0.1), 0.5, 0.33)}
    assert file.recipe.dtype == "float16" and file.recipe.normalize
    assert [note.partition(" ")[0] for note in file.notes] == ["base", "tokenizer_source", "int8_mask"]
    merged = merge(list(adapters().values()), file.recipe, threads=1)
    weights = merged.plan.weights
    assert weights["a0"]["lm_head"] == 1.0
    for layer, weight in enumerate((0, 0.3, 0.7, 1)):
        assert weights["a1"][f"model.layers.{layer}.mlp.up_proj"] == pytest.approx(weight / _sum(weight, 0.5))
        assert weights["a1"][f"model.layers.{layer}.self_attn.q_proj"] == pytest.approx(weight / _sum(weight, 0))


def _sum(second: float, third: float) -> float:
    return 1 + second + third


def test_a_gradient_of_density_is_that_of_each_layer(tmp_path: Path) -> None:
    """Each module as if its own densities were said for all."""
    given = adapters()
    recipe = {"method": "ties", "scale": 1.0}
    layered = [[1.0, 0.7, 0.1], 0.5, [{"filter": "mlp", "value": 0.8}, {"value": 0.3}]]
    found = merge(given, Recipe(**recipe, parameters={"density": layered}), threads=2, batch=4).adapter
    for name, first in (
        ("model.layers.2.mlp.up_proj", 0.5),
        ("model.layers.3.self_attn.q_proj", 0.1),
        ("lm_head", 1.0),
    ):
        third = 0.8 if "mlp" in name else 0.3
        plain = merge(given, Recipe(**recipe, parameters={"density": [first, 0.5, third]}), threads=1).adapter
        close(found[name].dense(), plain[name].dense())


def test_a_gradient_for_all_models_stands_at_the_top(tmp_path: Path) -> None:
    file = read(tmp_path, "merge_method: ties\nmodels: [a, b]\nparameters: {density: [1, 0.5], weight: [0, 1]}\n")
    assert file.recipe.parameters == {"density": ((1.0, 0.5), (1.0, 0.5))}
    assert file.recipe.weights == [(0.0, 1.0), (0.0, 1.0)]


@pytest.mark.parametrize("name", ["model.layers.0.mlp.up_proj", "model.layers.2.self_attn.q_proj", "lm_head"])
@pytest.mark.parametrize(
    "setting",
    [
        [0, 0.5, 1],
        [1, 0.2],
        [0.7],
        [{"filter": "self_attn", "value": [0, 1]}, {"filter": "lm_head", "value": 3}, {"value": 0.25}],
        [{"filter": "*", "value": 2}, {"value": 1}],
    ],
    ids=str,
)
def test_gradients_and_filters_are_mergekits(setting: list, name: str) -> None:
    config = pytest.importorskip("mergekit.config")
    listed = [config.ConditionalParameter(**x) if isinstance(x, dict) else x for x in setting]
    place = int(name.split(".")[2]) / 3 if "layers" in name else 0
    expected = config.evaluate_setting(f"{name}.weight", listed, place, validate=float)
    plan = merge(adapters(1), Recipe(method="sum", weights={"a0": setting}), threads=1).plan
    assert plan.weights["a0"][name] == pytest.approx(expected)


def test_one_layer_is_the_last(tmp_path: Path) -> None:
    plan = merge(adapters(1, layers=1), Recipe(method="sum", weights=[[0, 1]]), threads=1).plan
    assert plan.weights["a0"] == {
        "lm_head": 0.0, "model.layers.0.mlp.up_proj": 1.0, "model.layers.0.self_attn.q_proj": 1.0,
    }  # fmt: skip


def test_a_module_that_no_condition_fits_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"none of its conditions fits lm_head\.weight"):
        merge(adapters(1), Recipe(weights=[[{"filter": "layers", "value": 1}]]))


@pytest.mark.parametrize("method", ["linear", "task_arithmetic"])
def test_strengths_stay_what_they_are(tmp_path: Path, method: str) -> None:
    models = "models: [{model: a, parameters: {weight: 2}}, {model: b, parameters: {weight: 2}}]\n"
    given = dict(zip("ab", adapters(2).values(), strict=True))
    file = read(tmp_path, f"merge_method: {method}\n{models}")
    assert file.recipe.scale == 1.0 and "scale is 1" in file.notes[0]
    share = 0.5 if method == "linear" else 2.0
    merged = merge(given, file.recipe, threads=1).adapter
    for name, update in merged.items():
        close(update.dense(), share * (given["a"][name].dense() + given["b"][name].dense()))
    for more in ("scale: auto", "scale: 0.3", "parameters: {lambda: 0.3}"):
        other = read(tmp_path, f"merge_method: {method}\n{models}{more}\n")
        assert other.recipe.scale == ("auto" if "auto" in more else 0.3) and not other.notes


@pytest.mark.parametrize(("method", "ours"), [("dare_linear", "dare"), ("dare_ties", "dare_ties")])
def test_the_density_of_dare_is_what_it_keeps(tmp_path: Path, method: str, ours: str) -> None:
    file = read(tmp_path, f"merge_method: {method}\nparameters: {{density: 0.7, rescale: true}}\n")
    expected = {"drop_rate": 0.3, "density": 1.0} if method == "dare_ties" else {"drop_rate": 0.3}
    assert (file.recipe.method, file.recipe.parameters) == (ours, expected)
    each = [f"{{model: {name}, parameters: {{density: {kept}, weight: 1}}}}" for name, kept in (("a", 0.7), ("b", 0.4))]
    file = read(tmp_path, f"merge_method: {method}\nmodels: [{', '.join(each)}]\n")
    assert file.recipe.parameters["drop_rate"] == (0.3, 0.6)
    with pytest.raises(ConfigError, match="rescale"):
        read(tmp_path, f"merge_method: {method}\nparameters: {{rescale: false}}\n")


def test_our_own_recipes_are_read_as_they_were_written(tmp_path: Path) -> None:
    for recipe in (
        Recipe(method="dare_ties", parameters={"density": 0.3}),
        Recipe(method="ties", parameters={"density": [0.3, 0.5]}, weights=[1.0, [0.0, 1.0]]),
        Recipe(method="sum", weights=[[{"filter": "mlp", "value": 0.5}, {"value": 1.0}], 2.0]),
        Recipe(method="ties", parameters={"density": [[1.0, 0.5], [{"filter": "mlp", "value": 0.5}, {"value": 1.0}]]}),
        Recipe(),
    ):
        again = read(tmp_path, write_recipe(recipe, ["a", "b"])).recipe
        assert again.resolve().method.values == recipe.resolve().method.values
        assert (again.weights, again.norms, again.scale) == (recipe.weights, recipe.norms, recipe.scale)


@pytest.mark.parametrize("method", ["ties", "magnitude", "breadcrumbs", "della", "dare_ties"])
def test_a_density_for_each_adapter_is_that_of_each(method: str) -> None:
    given = adapters(2)
    each = {"density": [0.6, 0.4]}
    both = [
        merge(given, Recipe(method=method, parameters=p, scale=1), threads=1).adapter for p in (each, {"density": 0.6})
    ]
    same = merge(given, Recipe(method=method, parameters={"density": [0.6, 0.6]}, scale=1), threads=1).adapter
    for name in same:
        close(same[name].dense(), both[1][name].dense())
    assert any((both[0][name].dense() - both[1][name].dense()).norm() > 1e-3 for name in same)
    alone = {"a0": given["a0"], "a1": Adapter.from_updates({n: LowRank.zeros(8, 6) for n in given["a1"]}, name="a1")}
    if method == "magnitude":
        kept = merge(alone, Recipe(method=method, parameters=each, scale=1, space="full"), threads=1).adapter
        assert all(int((kept[n].dense().abs() > 1e-9).sum()) == round(0.6 * 48) for n in kept)
    with pytest.raises(ConfigError, match="2 values for 3 adapters"):
        merge(adapters(3), Recipe(method=method, parameters=each))


def test_what_some_models_say_and_others_do_not(tmp_path: Path) -> None:
    text = "merge_method: ties\nmodels: [{model: a, parameters: {density: 0.5}}, b]\n"
    with pytest.raises(ConfigError, match=r"models\.parameters\.density.*some models have it"):
        read(tmp_path, text)
    file = read(tmp_path, f"{text}parameters: {{density: 0.2, weight: 0.5}}\n")
    assert file.recipe.parameters == {"density": (0.5, 0.2)}
    assert file.recipe.weights == [0.5, 0.5]


def test_numbers_are_numbers_however_they_are_written(tmp_path: Path) -> None:
    for text in ("0.70", ".7", "7e-1", "0.7"):
        file = read(tmp_path, f"merge_method: dare_ties\nparameters: {{density: {text}}}\n")
        assert file.recipe.parameters["drop_rate"] == pytest.approx(0.3)


def test_what_no_condition_of_a_model_fits_is_what_is_said_for_all(tmp_path: Path) -> None:
    own = "{weight: {filter: mlp, value: 1}, density: {filter: mlp, value: 0.9}}"
    text = f"merge_method: ties\nmodels: [{{model: a, parameters: {own}}}]\nparameters: {{weight: 0.5, density: 0.3}}\n"
    file = read(tmp_path, text)
    plan = merge(adapters(1), file.recipe, threads=1).plan
    assert plan.weights["a0"]["lm_head"] == 0.5
    assert plan.weights["a0"]["model.layers.0.mlp.up_proj"] == 1
    (density,) = file.recipe.parameters["density"]
    assert [(one.filter, one.value) for one in density] == [("mlp", 0.9), (None, 0.3)]
    shared = read(tmp_path, "merge_method: ties\nmodels: [a]\nparameters: {density: {filter: '*', value: 0.4}}\n")
    assert shared.recipe.parameters["density"][0][0].value == 0.4


def test_a_linear_merge_beside_the_base_counts_its_weight(tmp_path: Path) -> None:
    models = "[{model: base, parameters: {weight: 1}}, {model: a, parameters: {weight: 3}}]"
    file = read(tmp_path, f"merge_method: linear\nbase_model: base\nmodels: {models}\n")
    given = adapters(1)
    merged = merge(given, file.recipe, threads=1).adapter
    close(merged["lm_head"].dense(), 0.75 * given["a0"]["lm_head"].dense())


def test_a_weight_for_all_that_are_not_named_is_a_factor(tmp_path: Path) -> None:
    file = read(tmp_path, "merge_method: task_arithmetic\nparameters: {weight: 0.5}\n")
    assert (file.recipe.scale, file.recipe.weights) == (0.5, None)
    assert read(tmp_path, "merge_method: ties\nparameters: {weight: 0.50}\n").recipe.scale == "auto"
    assert read(tmp_path, "merge_method: ties\nscale: 2\nparameters: {weight: 0.50}\n").recipe.scale == 1.0
    with pytest.raises(ConfigError, match="where no models are named"):
        read(tmp_path, "merge_method: ties\nparameters: {weight: [0, 1]}\n")


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"method": "sum", "weights": [[0.5, 0.5]]}, "1 weights for 2 adapters"),
        ({"method": "sum", "weights": [[0.5, 0.5], 1, 7]}, "3 weights for 2 adapters"),
        ({"method": "sum", "weights": [[], 1]}, "weights"),
        ({"method": "sum", "weights": [[{"value": []}], 1]}, "weights"),
        *(
            ({"method": "ties", "parameters": {"density": [[{"value": value}], 1]}}, "density")
            for value in (5, -1, 0, float("nan"), [])
        ),
        ({"method": "dare", "parameters": {"drop_rate": [[{"value": 1.0}], 0]}}, "drop_rate"),
        ({"method": "breadcrumbs", "parameters": {"gamma": [[{"value": 2}], 0]}}, "gamma"),
        ({"method": "ties", "parameters": {"density": [True, 0.5]}}, "density"),
        ({"method": "ties", "parameters": {"density": {0.1, 0.3}}}, "no order"),
    ],
    ids=str,
)
def test_what_means_nothing_is_refused(recipe: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        merge(adapters(2), Recipe(**recipe))


@pytest.mark.parametrize(("method", "right"), [("ties", "false"), ("dare_ties", "True"), ("della", "true")])
def test_rescaling_is_as_it_is_here(tmp_path: Path, method: str, right: str) -> None:
    wrong = "true" if right == "false" else "false"
    assert (
        "rescale" not in read(tmp_path, f"merge_method: {method}\nparameters: {{rescale: {right}}}\n").recipe.parameters
    )
    with pytest.raises(ConfigError, match="rescaled here"):
        read(tmp_path, f"merge_method: {method}\nparameters: {{rescale: {wrong}}}\n")


def test_slices_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="slices stack layers"):
        read(tmp_path, "merge_method: passthrough\nslices: []\n")


def test_a_random_method_draws_for_each_as_before() -> None:
    torch.manual_seed(0)
    given = adapters(2)
    one = merge(given, Recipe(method="dare", parameters={"drop_rate": [0.3, 0.3]}, scale=1), threads=1).adapter
    other = merge(given, Recipe(method="dare", parameters={"drop_rate": 0.3}, scale=1), threads=1).adapter
    for name in one:
        assert torch.equal(one[name].left, other[name].left)
