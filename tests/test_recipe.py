import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from coremerge.adapter import Adapter, Info
from coremerge.errors import ConfigError, SourceError
from coremerge.lowrank import LowRank
from coremerge.recipe import Recipe, RecipeFile, read_recipe, write_recipe


def read(tmp_path: Path, text: str) -> RecipeFile:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return read_recipe(path)


def test_equal_norms_belong_to_the_default_method() -> None:
    assert Recipe().norms == Recipe(norms=None).norms == Recipe(steps=["isotropize"]).norms == "equal"
    assert Recipe(method="whiten").norms == "own"
    assert Recipe(method="tsv", norms="equal").norms == "equal"
    assert Recipe(parameters=None, steps=None) == Recipe()
    with pytest.raises(ConfigError, match=r"norms = \"alike\""):
        Recipe(norms="alike")


@pytest.mark.parametrize(
    ("given", "name"),
    [("bf16", "bfloat16"), ("fp16", "float16"), ("half", "float16"), ("torch.float32", "float32"), (None, None)],
)
def test_dtypes_have_their_usual_names(given: object, name: str | None) -> None:
    assert Recipe(dtype=given).dtype == name


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"methd": "tsv"}, 'methd = "tsv": .*A recipe takes: space, method'),
        ({"method": "tvs"}, "no method 'tvs'. Did you mean 'tsv'"),
        ({"space": "cor"}, "no space 'cor'. Did you mean 'core'"),
        ({"steps": ["flatten"]}, "no step 'flatten'"),
        ({"steps": ["truncate"]}, "step 'truncate' needs 'rank'"),
        ({"steps": ["truncate:rank=0"]}, "greater than or equal to 1"),
        ({"steps": "isotropize"}, 'steps = "isotropize"'),
        ({"method": "ties", "parameters": {"drop_rate": 0.1}}, "method 'ties' has no parameter 'drop_rate'"),
        ({"method": "dare", "parameters": {"drop_rate": 1}}, "less than 1"),
        ({"method": "cart", "parameters": {"scale": "inf"}}, "finite"),
        ({"space": "core:rtol=0"}, "greater than 0"),
        ({"space": "core:rtol=0.1,rtol=0.2"}, "a parameter is there twice"),
        ({"space": "core:basis=other"}, "'stacked' or 'balanced'"),
        ({"basis": "other"}, 'basis = "other"'),
        ({"scale": "much"}, 'scale = "much"'),
        ({"scale": float("nan")}, "scale"),
        ({"rank": 0}, "rank = 0"),
        ({"rank": "full"}, 'rank = "full"'),
        ({"dtype": "int8"}, 'dtype = "int8"'),
        ({"weights": "0.5,0.5"}, "weights"),
        ({"weights": {"a": {"m": "x"}}}, "weights"),
        ({"seed": 0.5}, "seed = 0.5"),
    ],
)
def test_what_means_nothing_is_refused(values: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Recipe(**values)


def test_a_recipe_cannot_be_changed_from_outside() -> None:
    parameters = {"density": 0.3}
    recipe = Recipe(method="ties", parameters=parameters)
    parameters["density"] = 0.9
    assert recipe.parameters == {"density": 0.3}
    with pytest.raises(ValueError, match="frozen"):
        recipe.method = "sum"


@pytest.mark.parametrize(
    ("recipe", "singular"),
    [
        (Recipe(), False),
        (Recipe(method="sum", steps=["balance", "isotropize"]), False),
        (Recipe(method="ties"), True),
        (Recipe(method="dare", steps=["isotropize"]), True),
        (Recipe(space="core:singular=true"), True),
    ],
)
def test_singular_bases_are_for_methods_that_see_them(recipe: Recipe, singular: bool) -> None:
    updates = [LowRank(torch.randn(9, 2).double(), torch.randn(2, 7).double()) for _ in range(2)]
    (first, second) = (core.left for core in recipe.parts().space(updates).cores)
    gram = torch.cat([first, second], 1)
    gram = gram @ gram.T  # diagonal in the singular basis of the stack
    assert bool(((gram - gram.diag().diag()).abs() < 1e-9).all()) == singular


def test_the_basis_is_that_of_the_core_space_only() -> None:
    assert Recipe(space="full", basis="balanced").parts()
    assert Recipe(space="core:basis=balanced").parts()


def test_steps_are_split_in_before_and_after() -> None:
    parts = Recipe(steps=["isotropize", "balance", {"truncate": {"rank": 2}}]).parts()
    assert (len(parts.before), len(parts.after)) == (1, 2)


MERGEKIT = """
merge_method: dare_ties
base_model: meta-llama/Meta-Llama-3-8B
models:
  - model: org/one@main
    parameters: {weight: 0.5}
  - model: ./two
  - three
parameters:
  density: 0.4
  drop_rate: 0.3
  normalize: true
  lambda: 0.8
dtype: bfloat16
"""


def test_mergekits_spelling(tmp_path: Path) -> None:
    file = read(tmp_path, MERGEKIT)
    assert file.models == ("org/one@main", "./two", "three")
    assert file.base_model == "meta-llama/Meta-Llama-3-8B"
    assert file.recipe == Recipe(
        method="dare_ties",
        parameters={"density": 0.4, "drop_rate": 0.3},
        weights=[0.5, 1, 1],
        normalize=True,
        scale=0.8,
        dtype="bfloat16",
    )


@pytest.mark.parametrize(
    ("method", "ours", "normalize"),
    [
        ("task_arithmetic", "sum", False),
        ("linear", "sum", True),
        ("dare_linear", "dare", False),
        ("ties", "ties", False),
    ],
)
def test_mergekits_methods(tmp_path: Path, method: str, ours: str, normalize: bool) -> None:
    recipe = read(tmp_path, f"merge_method: {method}").recipe
    assert (recipe.method, recipe.normalize, recipe.steps) == (ours, normalize, [])
    assert not read(tmp_path, f"merge_method: {method}\nparameters: {{normalize: false}}").recipe.normalize


@pytest.mark.parametrize(
    ("method", "ours", "elect"), [("breadcrumbs_ties", "breadcrumbs", True), ("della_linear", "della", False)]
)
def test_mergekits_methods_that_are_ours_with_a_parameter(tmp_path: Path, method: str, ours: str, elect: bool) -> None:
    recipe = read(tmp_path, f"merge_method: {method}\nparameters: {{density: 0.6}}").recipe
    assert (recipe.method, recipe.parameters) == (ours, {"density": 0.6, "elect": elect})
    with pytest.raises(ConfigError, match="Say it once"):
        read(tmp_path, f"merge_method: {method}\nparameters: {{elect: {not elect}}}")


def test_our_keys_stand_beside_them(tmp_path: Path) -> None:
    text = (
        "method: ties\nspace: 'knots:scaled=false'\nsteps: [balance, {truncate: {rank: 3}}]\nbasis: balanced\n"
        "rank: 4\nscale: auto\nseed: 7\nout_dtype: fp16\nextras: drop\nallow_disjoint: true\n"
        "weights: {a: 0.5, b: {m: 2}}\n"
    )
    file = read(tmp_path, text)
    assert (file.models, file.base_model) == ((), None)
    assert file.recipe == Recipe(
        method="ties", space="knots:scaled=false", steps=["balance", {"truncate": {"rank": 3}}], basis="balanced",
        rank=4, scale="auto", seed=7, dtype="float16", extras="drop", allow_disjoint=True,
        weights={"a": 0.5, "b": {"m": 2}},
    )  # fmt: skip


def test_an_empty_mapping_is_the_default(tmp_path: Path) -> None:
    assert read(tmp_path, "{}") == RecipeFile(Recipe())
    assert read(tmp_path, "models: [a, b]").recipe == Recipe()


@pytest.mark.parametrize("truth", ["true", "false", "yes", "no", "on", "True"])
@pytest.mark.parametrize(
    "text", ["scale: %s", "rank: %s", "seed: %s", "weights: {a: %s}", "weights: {a: {m: [1, %s]}}", "weights: [1, %s]"]
)
def test_truths_are_no_numbers(tmp_path: Path, text: str, truth: str) -> None:
    key = text.partition(":")[0]
    with pytest.raises(ConfigError, match=rf'recipe\.yaml: {key} = "?{truth}"?: .*(number|integer)'):
        read(tmp_path, text % truth)


@pytest.mark.parametrize(
    "text",
    [
        "merge_method: ties\nparameters: {density: %s}",
        "merge_method: cart\nparameters: {rank: %s}",
        "steps: [{truncate: {rank: %s}}]",
        "steps: ['truncate:rank=%s']",
        "space: {core: {rtol: %s}}",
        "models: [{model: a, parameters: {weight: %s}}]",
    ],
)
@pytest.mark.parametrize("truth", ["true", "yes"])
def test_truths_are_no_numbers_among_parameters(tmp_path: Path, text: str, truth: str) -> None:
    with pytest.raises(ConfigError, match=r"valid (number|integer)|no numbers"):
        read(tmp_path, text % truth)


@pytest.mark.parametrize(("said", "meant"), [("1", True), ("0", False), ("yes", True), ("no", False), ("true", True)])
def test_a_truth_may_be_written_as_1_or_0(tmp_path: Path, said: str, meant: bool) -> None:
    assert read(tmp_path, f"parameters: {{normalize: {said}}}").recipe.normalize is meant
    with pytest.raises(ConfigError, match="normalize = 2"):
        read(tmp_path, "normalize: 2")


@pytest.mark.parametrize("name", ["no", "on", "yes", "true", "16", "1e3", "0x10", "12:30", "'null'", "a=1"])
def test_names_keep_their_text(tmp_path: Path, name: str) -> None:
    plain = name.strip("'")
    found = read(tmp_path, f"models: [{name}, {{model: {name}}}]\nbase_model: {name}\nextras: {name}")
    assert found == RecipeFile(Recipe(extras=plain), (plain, plain), plain)
    assert read(tmp_path, f"weights: {{{name}: 2, b: {{{name}: 1}}}}").recipe.weights == {plain: 2, "b": {plain: 1}}
    assert read(tmp_path, write_recipe(Recipe(extras=plain), (plain,), plain)).models == (plain,)


def test_a_model_without_a_name_is_refused(tmp_path: Path) -> None:
    for text in ("models: [null]", "models: [{model: null}]", "models: [{model: }]"):
        with pytest.raises(ConfigError, match="Quote a name such as 'null'"):
            read(tmp_path, text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("merge_method: ties\nmethod: tsv", "merge_method = \"ties\": method is 'tsv' in the same file. Say it once"),
        ("scale: 1\nparameters: {lambda: 2}", "parameters.lambda = 2: scale is 1"),
        ("normalize: true\nparameters: {normalize: false}", "parameters.normalize = false: normalize is True"),
        ("weights: [1]\nmodels: [{model: a, parameters: {weight: 2}}]", "models.parameters.weight"),
    ],
)
def test_what_is_said_twice_is_said_alike(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, text)
    assert read(tmp_path, "scale: 2\nparameters: {lambda: 2}\ndtype: float32\nout_dtype: bfloat16").recipe.scale == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a", "a recipe is a mapping"),
        ("", "a recipe is a mapping"),
        ("a: [", "not YAML"),
        ("merge_methode: ties", "merge_methode: an unknown key. Known: merge_method, models"),
        ("models: a", 'models = "a": must be a list'),
        ("models: [{name: a}]", "each entry is a 'model'"),
        ("models: [{model: a, weight: 1}]", "each entry is a 'model'"),
        ("models: [{model: a, parameters: {density: 1}}]", "no parameter 'density'"),
        ("models: [{model: a, parameters: [1]}]", "must be a mapping"),
        ("models: [{model: a, parameters: {weight: x}}]", "weights"),
        ("parameters: [1]", "parameters = \\[1\\]: must be a mapping"),
        ("merge_method: slerp", "no method 'slerp'"),
        ("merge_method: ties\nparameters: {gamma: 1}", "has no parameter 'gamma'"),
        ("parameters: {lambda: x}", 'scale = "x"'),
        ("1: 2", "1: an unknown key"),
    ],
)
def test_a_wrong_file_is_named_with_what_is_wrong(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"recipe.yaml: .*{message}"):
        read(tmp_path, text)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"none\.yaml: cannot be read: No such file or directory$"):
        read_recipe(tmp_path / "none.yaml")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(ConfigError, match="not YAML"):
        read_recipe(tmp_path / "binary")


@pytest.mark.parametrize(
    ("recipe", "models", "base"),
    [
        (Recipe(), (), None),
        (Recipe(weights=[1, 2]), ("a", "b"), "base"),
        (Recipe(weights=[1, 2], normalize=True), (), None),
        (Recipe(weights={"a": 1, "b": {"m": 0.5}}), ("a", "b"), None),
        (Recipe(method="ties", parameters={"density": 0.3}, scale=2.0, space="full", rank=3, seed=4), ("é",), "b"),
        (Recipe(method="dare", steps=["balance", {"truncate": {"rank": 3}}], dtype="fp16", rank="exact"), ("a",), None),
        (Recipe(space={"knots": {"scaled": False}}, basis="balanced", extras="drop", allow_disjoint=True), (), None),
        (Recipe(method="cart", parameters={"rank": 3, "scale": 0.5}, scale=-1, normalize=True), ("a",), None),
        (Recipe(method="tsv"), (), None),
        (Recipe(method="sum", weights=[0.5]), ("a",), None),
    ],
)
def test_what_is_written_reads_back(tmp_path: Path, recipe: Recipe, models: tuple[str, ...], base: str | None) -> None:
    file = read(tmp_path, write_recipe(recipe, models, base))
    assert (file.models, file.base_model) == (models, base)
    assert file.recipe == recipe


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ({"method": "tsv", "parameters": {"rank": "4.0"}}, {"parameters": {"rank": 4}}),
        ({"method": "tsv", "parameters": {"rank": "None", "pad": "yes"}}, {"parameters": {"rank": None, "pad": True}}),
        ({"method": "ties", "parameters": {"density": "0.5"}}, {"parameters": {"density": 0.5}}),
        ({"steps": ["isotropize:span=no"]}, {"steps": ["isotropize:span=false"]}),
        ({"steps": [{"isotropize": {"span": 0}}]}, {"steps": [{"isotropize": {"span": False}}]}),
        ({"steps": ["truncate:rank=3", {"balance": None}]}, {"steps": ["truncate:rank=3", {"balance": None}]}),
        ({"space": "knots:scaled=off"}, {"space": "knots:scaled=false"}),
    ],
)
def test_values_are_kept_as_validated(given: dict, kept: dict) -> None:
    recipe = Recipe(**given)
    said = recipe.model_dump(mode="json")
    assert {key: said[key] for key in kept} == kept
    assert str(said) == str(Recipe(**said).model_dump(mode="json"))


@pytest.mark.parametrize(
    "given",
    [
        {"method": "tsv", "parameters": {"rank": "4.5"}},
        {"method": "tsv", "parameters": {"rank": True}},
        {"method": "tsv", "parameters": {"rank": "no"}},
        {"steps": [{"truncate": {"rank": "None"}}]},
        {"steps": ["isotropize:span=maybe"]},
        {"space": "knots:scaled=2"},
    ],
)
def test_values_that_cannot_be_validated_are_refused(given: dict) -> None:
    with pytest.raises(ConfigError, match="not a value that"):
        Recipe(**given)


@pytest.mark.parametrize("span", ["no", "0", "off", "false", "False", 0, False])
def test_dense_work_is_told_by_validated_values(span: object) -> None:
    flat = Recipe(space="full", method="sum", steps=[{"isotropize": {"span": span}}]).resolve()
    assert flat.dense and flat.is_full and flat.rank([2, 3], (40, 30)) == 30
    assert flat == Recipe(space="full", method="sum", steps=[f"isotropize:span={span}"]).resolve()


@pytest.mark.parametrize("pad", ["yes", "1", "on", "true", "T", 1, True])
def test_padding_is_told_by_validated_values(pad: object) -> None:
    padded = Recipe(space="full", method="tsv", parameters={"rank": 4, "pad": pad}).resolve()
    assert padded.dense and padded.rank([8, 3], (40, 30)) == 7


COPIES: dict[str, Callable[[Recipe], Recipe]] = {
    "dict": lambda recipe: Recipe(**dict(recipe)),
    "model_copy": lambda recipe: recipe.model_copy(update={"weights": [1.0]}),
    "but": lambda recipe: recipe.but(weights=[1.0], seed=3),
    "pickle": lambda recipe: pickle.loads(pickle.dumps(recipe)),
    "deepcopy": copy.deepcopy,
    "twice": lambda recipe: Recipe(**dict(pickle.loads(pickle.dumps(recipe)))),
}


@pytest.mark.parametrize("again", COPIES.values(), ids=COPIES)
def test_copies_are_of_the_same_method_and_norms(again: Callable[[Recipe], Recipe]) -> None:
    ties = Recipe(method="ties", parameters={"density": 0.5})
    for recipe in (Recipe(), Recipe(norms="own"), Recipe(method="sum"), ties):
        one = again(recipe)
        same = (recipe.method, recipe.parameters, recipe.steps, recipe.norms)
        assert (one.method, one.parameters, one.steps, one.norms) == same


def test_what_the_method_leaves_to_the_adapters_is_settled_by_them() -> None:
    decoder = {"a": Adapter.from_updates({}, info=Info(task_type="CAUSAL_LM"))}
    encoder = {"a": Adapter.from_updates({}, info=Info(task_type="FEATURE_EXTRACTION"))}
    for adapters, value in ((decoder, 0.97), (encoder, 0.0)):
        recipe, said = Recipe().settled(adapters)
        assert recipe.parameters == {"even": value} and said["even"].startswith(f"{value}, as ")
        assert recipe.norms == "equal" and recipe.settled(adapters) == (recipe, {})
    named = Recipe(parameters={"even": 0.5})
    assert named.settled(decoder) == (named, {})
    assert Recipe(method="ties").settled(decoder) == (Recipe(method="ties"), {})
