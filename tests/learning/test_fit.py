"""Fitted cores against brute force: whole passes with dense weights, and one large least squares a module."""

from __future__ import annotations

import pytest
import torch

import kinds
from coremerge import Adapter, Recipe, load, merge
from coremerge.errors import ConfigError, InputError, MismatchError, UnsupportedError
from coremerge.learning import fit
from coremerge.learning.backbone import backbone_output, token_mask
from coremerge.learning.forward import find_modules
from coremerge.lowrank import LowRank
from families import FAMILIES, batches, make_adapter, make_model


def weight_of(module):
    return module.weight.T if type(module).__name__ == "Conv1D" else module.weight


def seen(family, updates, batch):
    """Inputs and outputs of every adapted module, tokens that count, with ``updates`` in the weights."""
    model = make_model(family).double()
    names = sorted(updates)
    paths, found, hooks = find_modules(model, names), {}, []
    for name in names:
        module = model.get_submodule(paths[name])
        if updates[name] is not None:
            with torch.no_grad():
                weight_of(module).add_(updates[name])

        def keep(module, args, output, name=name):
            x = args[0].reshape(-1, args[0].shape[-1])
            mask = token_mask(batch, args[0])
            rows = slice(None) if mask is None else mask.reshape(-1).bool()
            found[name] = x[rows], output.reshape(-1, output.shape[-1])[rows], len(found)

        hooks.append(module.register_forward_hook(keep))
    with torch.no_grad():
        backbone_output(model, {k: v.double() if v.is_floating_point() else v for k, v in batch.items()})
    return found


def root(matrix):
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T


def brute_force(family, adapters, data, ridge, *, beyond):
    """Name → the fitted update, by the formulas, with a prior of zero; ``beyond``: it reads all that inputs have."""
    names = sorted({name for adapter in adapters.values() for name in adapter})
    dense = {k: {n: a[n].dense() if n in a else None for n in names} for k, a in adapters.items()}
    own = {k: [seen(family, dense[k], batch) for batch in data[k]] for k in adapters}
    order = sorted(names, key=lambda n: own["a"][0][n][2])
    fitted = dict.fromkeys(names)
    for name in order:
        asked = {}
        for k in adapters:
            xs, zs, ys, plain = [], [], [], []
            for batch, alone in zip(data[k], own[k], strict=True):
                x_own, y_own, _ = alone[name]
                x_merged, y_merged, _ = seen(family, fitted, batch)[name]
                xs.append(x_own)
                zs.append(x_merged)
                ys.append(y_own - y_merged)
                plain.append(y_merged)
            asked[k] = dense[k][name], *map(torch.cat, (xs, zs, ys, plain))
        held = [a[name] for a in adapters.values() if name in a]
        fitted[name] = least_squares(held, asked, ridge, beyond=beyond)
    return fitted


def least_squares(held, asked, ridge, prior=None, *, beyond=False):
    """One module's update.

    Args:
        held: the adapters' updates.
        asked: task → its own update or None, inputs with that, inputs, what is to be added to outputs when merged, and
            these outputs.
        ridge: towards ``prior``, or zero.
        beyond: whether it reads all directions of the own inputs, too.
    """
    aside, soft, least = 0.1, 0.01, 0.2
    read = [x for _, x, *_ in asked.values()] if beyond else []
    left = torch.linalg.svd(torch.cat([u.left for u in held], 1), full_matrices=False)
    right = torch.linalg.svd(torch.cat([*(u.right for u in held), *read]), full_matrices=False)
    basis, across = left[0][:, left[1] > 1e-8 * left[1][0]], right[2][right[1] > 1e-8 * right[1][0]]
    p, q = basis.shape[1], len(across)
    weighed = {}
    for k, (own_update, x, merged, added, plain) in asked.items():
        y, metric = added @ basis, torch.eye(p, dtype=torch.float64)
        if own_update is not None:
            writes = x @ own_update.T @ basis
            values, vectors = torch.linalg.eigh(writes.T @ writes)
            values = values.clamp_min(0)
            own = (vectors * (values / (values + soft * values[-1]))) @ vectors.T
            metric = aside * metric + (1 - aside) * own
        half = root(metric)
        varies = (plain - plain.mean(0)) @ basis
        asks, gives = (torch.linalg.eigvalsh((v @ half).T @ (v @ half))[-1] / len(v) for v in (y, varies))
        weighed[k] = half, merged @ across.T, y, max(asks, least * gives)
    rows, wanted, moments = [], [], torch.zeros(q, q, dtype=torch.float64)
    for half, z, y, size in weighed.values():
        share = 1 / size / len(y)
        moments += share * z.T @ z
        # rows of the design for vec(M): half ⊗ z
        rows.append(share.sqrt() * torch.einsum("ij,tk->tijk", half, z).reshape(-1, p * q))
        wanted.append(share.sqrt() * (y @ half).reshape(-1))
    start = torch.zeros(p, q, dtype=torch.float64) if prior is None else basis.T @ prior @ across.T
    own = torch.linalg.svd(torch.cat([u.right for u in held]), full_matrices=False)
    reads = own[2][own[1] > 1e-8 * own[1][0]] @ across.T
    rho = ridge * (reads @ moments @ reads.T).diagonal().mean()
    design = torch.cat([*rows, rho.sqrt() * torch.eye(p * q, dtype=torch.float64)])
    solution = torch.linalg.lstsq(design, torch.cat([*wanted, rho.sqrt() * start.reshape(-1)])).solution
    return basis @ solution.reshape(p, q) @ across


def doubled(data):
    return {
        k: [{n: v.double() if v.is_floating_point() else v for n, v in b.items()} for b in d] for k, d in data.items()
    }


@pytest.fixture
def unchecked(monkeypatch):
    """Nothing is held against a fit: random adapters and inputs are too few to do well on held-out ones."""
    monkeypatch.setattr("coremerge.learning.fitting.relative", lambda *_: 0.0)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    return {"a": make_adapter("bert", folder / "a", 1), "b": make_adapter("bert", folder / "b", 2, rank=5)}


@pytest.fixture
def data():
    return doubled({"a": batches("bert", 3, seed=1), "b": batches("bert", 3, seed=2)})


@pytest.fixture
def model():
    return make_model("bert").double()


def close(one, other, share=1e-6):
    """To ``share`` of an update's norm: normal equations square the inputs' condition, and rounding grows with it."""
    return all(
        torch.allclose(one[name].dense(), other[name].dense(), atol=share * float(other[name].norm())) for name in other
    )


def same_bytes(one, other, tmp_path):
    paths = [result.adapter.save(tmp_path / str(i)).path for i, result in enumerate((one, other))]
    return len({(path / "adapter_model.safetensors").read_bytes() for path in paths}) == 1


@pytest.mark.parametrize(
    ("family", "beyond"),
    # what follows a tiny GPT-2's gelu has directions of 1e-10 of its energy, which are not read
    [*((family, 0) for family in FAMILIES), *((family, 1000) for family in FAMILIES if family != "gpt2")],
)
@pytest.mark.usefixtures("unchecked")
def test_it_is_least_squares(family, beyond, tmp_path):
    adapters = {k: make_adapter(family, tmp_path / k, i, rank=2 + i) for i, k in enumerate("ab")}
    data = {k: batches(family, 2, seed=i) for i, k in enumerate("ab")}
    how = {"prior": "zero", "ridge": 0.3, "beyond": beyond, "dtype": "float64"}
    result = fit(make_model(family).double(), adapters, doubled(data), **how)
    assert set(result.adapter) == set(adapters["a"])
    for name, update in brute_force(family, adapters, data, 0.3, beyond=beyond > 0).items():
        assert torch.allclose(result.adapter[name].dense(), update, atol=1e-6 * float(update.abs().max())), name


def test_one_adapter_comes_back(model, adapters, data):
    result = fit(model, {"a": adapters["a"]}, {"a": data["a"]}, dtype="float64")
    assert close(result.adapter, adapters["a"])
    assert result.report.warnings == ("a single adapter comes back as it is",)
    cut = fit(model, {"a": adapters["a"]}, {"a": data["a"]}, rank=1)
    assert cut.report.warnings[0] == "a single adapter comes back as it is, but for the cut to a rank"


@pytest.mark.usefixtures("unchecked")
def test_an_adapter_twice_is_that_adapter(model, adapters, data):
    twins, inputs = {"a": adapters["a"], "twin": adapters["a"]}, {"a": data["a"], "twin": data["a"]}
    result = fit(model, twins, inputs, prior="zero", ridge=1e-9, beyond=0, dtype="float64")
    assert close(result.adapter, adapters["a"], 1e-3)


@pytest.mark.usefixtures("unchecked")
def test_tasks_whose_inputs_do_not_overlap_are_both_kept():
    """Each adapter reads directions of its own, and each task's inputs have only those of its adapter."""
    model = torch.nn.Sequential(torch.nn.Linear(12, 12, bias=False)).double()
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.body = model

        def forward(self, x):
            return self.body(x)

    halves = torch.zeros(2, 3, 12, dtype=torch.float64)
    halves[0, :, :6], halves[1, :, 6:] = randn(3, 6), randn(3, 6)
    adapters = {
        key: Adapter.from_updates({"body.0": LowRank(randn(12, 3), half)}, name=key)
        for key, half in zip("ab", halves, strict=True)
    }
    inputs = {key: torch.zeros(40, 12, dtype=torch.float64) for key in "ab"}
    inputs["a"][:, :6], inputs["b"][:, 6:] = randn(40, 6), randn(40, 6)
    data = {key: [{"x": x}] for key, x in inputs.items()}
    result = fit(Net(), adapters, data, prior="zero", ridge=1e-9)
    for key, x in inputs.items():
        wanted = x @ adapters[key]["body.0"].dense().T
        assert torch.allclose(x @ result.adapter["body.0"].dense().T, wanted, atol=1e-5)  # the ridge of 1e-9 pulls


class Layer(torch.nn.Module):
    """One linear layer."""

    def __init__(self, width):
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(width, width, dtype=torch.float64)

    def forward(self, x):
        return self.layer(x)


def test_tasks_that_look_alike_along_what_adapters_read_are_told_apart_by_the_rest_of_their_inputs():
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    read = randn(1, 12)
    adapters = {key: Adapter.from_updates({"layer": LowRank(randn(12, 1), read)}, name=key) for key in "ab"}
    marks = {"a": randn(1, 12), "b": randn(1, 12)}  # what all inputs of a task have
    inputs = {key: randn(60, 1) * (read / read.norm()) + 2 * marks[key] + 0.1 * randn(60, 12) for key in "ab"}
    data = {key: [{"x": x}] for key, x in inputs.items()}
    left = {}
    for beyond in (0, 2):
        result = fit(Layer(12), adapters, data, prior="zero", ridge=1e-4, beyond=beyond, dtype="float64")
        merged = result.adapter["layer"]
        assert merged.rank <= 2
        outputs = {key: (x @ merged.dense().T, x @ adapters[key]["layer"].dense().T) for key, x in inputs.items()}
        left[beyond] = sum(float((one - own).square().sum() / own.square().sum()) for one, own in outputs.values())
    assert left[2] < 0.5 * left[0]


@pytest.mark.parametrize("beyond", [-1, 1.5, True])
def test_directions_beyond_are_a_count(model, adapters, data, beyond):
    with pytest.raises(ConfigError, match="whole number of at least zero") as error:
        fit(model, adapters, data, beyond=beyond)
    assert error.value.key == "beyond"


def test_the_order_of_adapters_does_not_matter(model, adapters, data):
    one = fit(model, adapters, data, dtype="float64")
    other = fit(model, dict(reversed(adapters.items())), data, dtype="float64")
    assert close(one.adapter, other.adapter)


def test_the_same_bytes_again_in_memory_on_disk_and_after_a_stop(model, adapters, data, tmp_path):
    first = fit(model, adapters, data, rank=4, spill=False)
    assert first.report.states == "memory"
    on_disk = fit(model, adapters, data, rank=4, spill=tmp_path)
    assert on_disk.report.states == "disk" and not list(tmp_path.iterdir())
    assert same_bytes(first, on_disk, tmp_path / "spilled")
    kept = tmp_path / "kept.safetensors"
    with pytest.raises(KeyboardInterrupt):
        fit(model, adapters, data, rank=4, resume=kept, progress=lambda done, count: done < count / 2)
    passes = []
    model.bert.register_forward_pre_hook(lambda *_: passes.append(1))
    resumed = fit(model, adapters, data, rank=4, resume=kept)
    assert same_bytes(first, resumed, tmp_path / "resumed")
    assert resumed.report.fits == first.report.fits
    some = len(passes)
    passes.clear()
    fit(model, adapters, data, rank=4)
    assert some < 0.8 * len(passes)


def test_states_that_were_on_disk_give_the_same_bytes_at_any_size_of_a_batch(adapters, tmp_path):
    data = {k: [{n: v[:2] for n, v in b.items()} for b in batches("bert", 6, seed=i)] for i, k in enumerate("ab", 1)}
    memory, disk = (fit(make_model("bert"), adapters, data, spill=spill) for spill in (False, True))
    assert same_bytes(memory, disk, tmp_path) and disk.report.states == "disk"


def test_a_kept_file_of_something_else(model, adapters, data, tmp_path):
    kept = tmp_path / "kept.safetensors"
    fit(model, adapters, data, rank=4, resume=kept)
    with pytest.raises(ConfigError, match="other adapters, inputs or settings"):
        fit(model, adapters, data, rank=3, resume=kept)
    with pytest.raises(ConfigError, match="other adapters, inputs or settings"):
        fit(model, adapters, {"a": data["a"], "b": data["a"]}, rank=4, resume=kept)


def test_what_is_padding_does_not_count(model, adapters, data):
    def padded(batch):
        ids, mask = batch["input_ids"].clone(), batch["attention_mask"]
        ids[mask == 0] = 7
        return {"input_ids": ids, "attention_mask": mask}

    other = {task: [padded(batch) for batch in listed] for task, listed in data.items()}
    one, two = (fit(model, adapters, given, dtype="float64") for given in (data, other))
    assert close(one.adapter, two.adapter)


def test_a_rank_is_held(model, adapters, data):
    result = fit(model, adapters, data, rank=3)
    assert result.report.rank == 3
    assert max(module.rank for module in result.adapter.modules.values()) == 3


def test_a_budget_of_ranks_goes_where_it_brings_most(model, adapters, data, tmp_path):
    ranks = {}
    for budget in (2, 3):
        result = fit(model, adapters, data, rank_budget=budget)
        ranks = {name: module.rank for name, module in result.adapter.modules.items()}
        assert sum(ranks.values()) == budget * len(ranks) and len(set(ranks.values())) > 1
    kept = tmp_path / "kept.safetensors"
    fit(model, adapters, data, rank_budget=3, resume=kept)
    again = fit(model, adapters, data, rank_budget=3, resume=kept)
    assert {name: module.rank for name, module in again.adapter.modules.items()} == ranks
    capped = fit(model, adapters, data, rank_budget=3, rank=4)
    ranks = [module.rank for module in capped.adapter.modules.values()]
    assert sum(ranks) == 3 * len(ranks) and max(ranks) == 4 and min(ranks) < 3


def test_the_model_and_the_inputs_are_as_they_were(model, adapters, data):
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    inputs = {task: [{k: v.clone() for k, v in b.items()} for b in listed] for task, listed in data.items()}
    fit(model, adapters, data)
    assert model.training and all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in model.modules())
    for task, listed in data.items():
        assert all(torch.equal(b[k], v) for b, c in zip(listed, inputs[task], strict=True) for k, v in c.items())


def test_what_no_input_reaches_keeps_the_prior(tmp_path):
    """Texts alone do not run a vision tower."""
    adapters = {k: make_adapter("llava", tmp_path / k, i) for i, k in enumerate("ab")}
    data = {k: batches("bert", 2, seed=i) for i, k in enumerate("ab")}
    result = fit(make_model("llava"), adapters, data, dtype="float64")
    prior = merge(adapters, Recipe(method="sum", steps=["isotropize"], dtype="float64")).adapter
    away = [name for name in prior if "vision" in name]
    assert away and close({n: result.adapter[n] for n in away}, {n: prior[n] for n in away})
    assert any(
        said.startswith(f"{len(away)} of {len(prior)} modules keep the prior: no input reaches them: ")
        and all(f"vision_tower.encoder.layers.[0-3].self_attn.{part}_proj" in said for part in "qv")
        and "language_model" not in said
        for said in result.report.warnings
    )


@pytest.mark.parametrize("name", kinds.KINDS)
def test_every_kind_of_model_is_fitted_block_by_block_as_in_whole_passes(name, unchecked, monkeypatch):
    kind = kinds.KINDS[name]
    model = kinds.make(kind)
    adapters = kinds.adapters_of(model, kind.targets)
    data = {key: [kinds.batch_of(kind, seed) for seed in (2 * i, 2 * i + 1)] for i, key in enumerate("ab")}
    found = fit(model, adapters, data, prior="zero", dtype="float64")
    said = [text for text in found.report.warnings if "nothing is left" not in text]  # SpeechT5's inputs are zeros
    assert set(found.report.fits) == set(adapters["a"]) and not said
    monkeypatch.setattr("coremerge.learning.stream._same", lambda *_: False)
    whole = fit(model, adapters, data, prior="zero", dtype="float64")
    assert any("cannot be run block by block" in said for said in whole.report.warnings)
    assert close(found.adapter, whole.adapter, 1e-4)


def test_tasks_of_texts_and_tasks_of_pictures_fit_a_tower_each():
    model = kinds.make(kinds.CLIP)
    adapters = kinds.adapters_of(model)
    generator = torch.Generator().manual_seed(0)
    data = {"a": [kinds.text(generator)], "b": [kinds.pictures()(generator)]}
    report = fit(model, adapters, data).report
    assert set(report.fits) == set(adapters["a"])
    assert not any("no input reaches" in said for said in report.warnings)


def test_modules_that_a_model_has_no_use_for_keep_the_prior_and_are_named():
    """As adapters have them that were trained where layers that share keys and values still had weights of these."""
    kind = kinds.SHARING["gemma4"]
    model = kinds.make(kind)
    adapters = kinds.adapters_of(model, (*kind.targets, "k_proj", "v_proj"))
    donor = adapters["a"]["model.layers.1.self_attn.k_proj"]
    unused = [f"model.layers.{i}.self_attn.{part}_proj" for i in (2, 3) for part in "kv"]
    assert not any(name in adapters["a"] for name in unused)
    adapters = {
        key: Adapter.from_updates({**dict(one.items()), **dict.fromkeys(unused, donor)}, name=key)
        for key, one in adapters.items()
    }
    data = {key: [kinds.batch_of(kind, seed)] for seed, key in enumerate("ab")}
    result = fit(model, adapters, data, dtype="float64", rank_budget=2)
    said = [one for one in result.report.warnings if "no input reaches them" in one]
    assert said == [
        f"4 of {len(adapters['a'])} modules keep the prior: no input reaches them:"
        " model.layers.[2-3].self_attn.k_proj, model.layers.[2-3].self_attn.v_proj"
    ]
    assert set(result.adapter) == set(adapters["a"]) and not set(unused) & set(result.report.fits)
    with pytest.raises(MismatchError, match=r"no such module.*q_prox|q_prox.*no such module"):
        wrong = Adapter.from_updates({"model.layers.3.self_attn.q_prox": donor})
        fit(model, {"a": wrong, "b": adapters["b"]}, data, allow_disjoint=True)


def test_layers_that_are_passed_by_keep_the_prior_and_are_named():
    """WavLM reads its projections' weights, and never runs them."""
    from transformers import WavLMConfig, WavLMModel

    kind = kinds.KINDS["wav2vec2"]
    torch.manual_seed(0)
    model = WavLMModel(WavLMConfig(**kinds.WAVES, **kinds.LAYERS)).eval()
    adapters = kinds.adapters_of(model, ("q_proj", "intermediate_dense"))
    data = {key: [kinds.batch_of(kind, seed)] for seed, key in enumerate("ab")}
    report = fit(model, adapters, data).report
    assert any("no input reaches them: encoder.layers.[0-1].attention.q_proj" in said for said in report.warnings)
    assert set(report.fits) == {f"encoder.layers.{i}.feed_forward.intermediate_dense" for i in range(2)}


def test_why_a_module_keeps_the_prior_is_the_reason(model, adapters, data):
    nothing = dict.fromkeys("ab", 0.0) | {"a": 1.0}
    few = Adapter.from_updates({n: u for n, u in adapters["b"].items() if ".layer.3." in n})
    masked = [{**batch, "token_mask": torch.zeros_like(batch["attention_mask"])} for batch in data["b"]]
    said = fit(model, adapters, {"a": data["a"], "b": masked}, preferences={"a": 0.0}).report.warnings
    assert any("modules keep the prior: only inputs of tasks whose preference is 0 reach them: " in one for one in said)
    said = fit(model, {"a": adapters["a"], "b": few}, {"b": masked}, preferences=nothing | {"b": 1.0}).report.warnings
    assert any("modules keep the prior: no token that counts reaches them: " in one for one in said)
    with pytest.raises(ConfigError, match="no task to fit to"):
        fit(model, adapters, data, preferences=dict.fromkeys("ab", 0.0))


class Seldom(torch.nn.Module):
    """An expert that the first input does not run."""

    def __init__(self):
        super().__init__()
        self.first, self.expert = torch.nn.Linear(6, 6), torch.nn.Linear(6, 6)

    def forward(self, x):
        y = self.first(x)
        rare = x[:, 0] > 0
        return self.expert(y[rare]) if bool(rare.any()) else y


def test_a_module_that_only_some_inputs_run_is_told_so():
    inputs = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
    inputs[0, 0], inputs[1, 0] = -1.0, 1.0
    report = fit(Seldom().eval(), random_adapters(["first", "expert"]), {k: [{"x": inputs}] for k in "ab"}).report
    assert any("only some inputs run them, as experts: expert" in said for said in report.warnings)


@pytest.mark.parametrize("prior", ["zero", "router", "regmean", "iso"])
def test_how_an_adapter_without_inputs_counts_is_what_is_said(model, adapters, data, prior):
    """Whether it does: with it changed, the result is, or is not, another."""
    other = make_from(adapters["b"], 3.0)
    one, two = (fit(model, {"a": adapters["a"], "b": b}, {"a": data["a"]}, prior=prior) for b in (adapters["b"], other))
    counts = any("these count through the prior alone" in said for said in one.report.warnings)
    assert counts == (prior == "iso")
    assert counts or any(f"as the prior ({prior}) does not hold them" in said for said in one.report.warnings)
    if prior != "zero":
        return
    assert close({n: one.adapter[n] for n in one.adapter}, {n: two.adapter[n] for n in two.adapter}, 1e-5)


def make_from(adapter, factor):
    return Adapter.from_updates({n: LowRank(factor * u.left, u.right) for n, u in adapter.items()}, name=adapter.name)


def test_a_models_own_exception_names_the_layer_and_the_task(model, adapters, data):
    long = {"input_ids": torch.ones(1, 40, dtype=torch.long), "attention_mask": torch.ones(1, 40, dtype=torch.long)}
    with pytest.raises(InputError, match="on the inputs of b the base model stops here with") as raised:
        fit(model, adapters, {"a": data["a"], "b": [data["b"][0], long]})
    assert raised.value.key.startswith("bert.embeddings") and isinstance(
        raised.value.__cause__, (RuntimeError, IndexError)
    )


def test_an_adapter_without_inputs_is_said(model, adapters, data):
    result = fit(model, adapters, {"a": data["a"]})
    assert any("no inputs for b" in said for said in result.report.warnings)


def test_a_module_that_runs_several_times(tmp_path):
    """ALBERT's layers share one block."""
    from transformers import AlbertConfig, AlbertModel

    torch.manual_seed(0)
    config = AlbertConfig(
        vocab_size=50, embedding_size=8, hidden_size=16, num_hidden_layers=3, num_attention_heads=2,
        intermediate_size=24, max_position_embeddings=32,
    )  # fmt: skip
    model = AlbertModel(config).eval()
    names = [name for name, module in model.named_modules() if name.endswith(("query", "value"))]
    adapters = {
        key: Adapter.from_updates({n: LowRank(0.3 * torch.randn(16, 3), 0.3 * torch.randn(3, 16)) for n in names})
        for key in "ab"
    }
    data = {key: batches("bert", 3, seed=i) for i, key in enumerate("ab")}
    result = fit(model, adapters, data, prior="zero", ridge=0.1)
    tokens = sum(int(b["attention_mask"].sum()) for listed in data.values() for b in listed)
    assert {one.tokens for one in result.report.fits.values()} == {3 * tokens}
    assert any("cannot be run block by block" in said for said in result.report.warnings)


class Twice(torch.nn.Module):
    """A layer that acts on its own outputs."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(6, 6, dtype=torch.float64)

    def forward(self, x):
        return self.layer(torch.tanh(self.layer(x)))


def random_adapters(names, seed=0, rank=2, width=6):
    generator = torch.Generator().manual_seed(seed)

    def factors():
        pair = torch.randn(2, width, rank, generator=generator, dtype=torch.float64)
        return LowRank(pair[0], pair[1].T)

    return {key: Adapter.from_updates({name: factors() for name in names}, name=key) for key in "ab"}


@pytest.mark.parametrize("beyond", [0, 6])
@pytest.mark.usefixtures("unchecked")
def test_a_module_that_runs_twice_is_fitted_to_both_as_its_prior_has_them(beyond):
    torch.manual_seed(0)
    model, adapters = Twice().eval(), random_adapters(["layer"])
    weight, bias = model.layer.weight, model.layer.bias
    prior = adapters["a"]["layer"].dense()
    inputs = {key: torch.randn(9, 6, dtype=torch.float64) for key in "ab"}
    asked = {}
    with torch.no_grad():
        for key, x in inputs.items():
            own = adapters[key]["layer"].dense()
            own_between = torch.tanh(x @ (weight + own).T + bias)
            between = torch.tanh(x @ (weight + prior).T + bias)
            second = own_between @ (weight + own).T - between @ weight.T
            plain = torch.cat([x @ weight.T, between @ weight.T])
            asked[key] = (
                own,
                torch.cat([x, own_between]),
                torch.cat([x, between]),
                torch.cat([x @ own.T, second]),
                plain,
            )
        expected = least_squares([a["layer"] for a in adapters.values()], asked, 0.3, prior, beyond=beyond > 0)
    data = {key: [{"x": x}] for key, x in inputs.items()}
    result = fit(model, adapters, data, prior=adapters["a"], ridge=0.3, beyond=beyond, dtype="float64")
    assert torch.allclose(result.adapter["layer"].dense(), expected, rtol=1e-8, atol=1e-8)
    assert result.report.fits["layer"].tokens == 2 * 2 * 9


def test_weights_that_are_tied_are_fitted_like_others():
    class Two(torch.nn.Module):
        def __init__(self, tied):
            super().__init__()
            torch.manual_seed(0)
            self.first, self.second = (torch.nn.Linear(6, 6, bias=False, dtype=torch.float64) for _ in range(2))
            self.second.weight = self.first.weight if tied else torch.nn.Parameter(self.first.weight.detach().clone())

        def forward(self, x):
            return self.second(torch.tanh(self.first(x)))

    adapters = random_adapters(["first", "second"])
    data = {key: [{"x": torch.randn(20, 6, dtype=torch.float64)}] for key in "ab"}
    tied, untied = (fit(Two(kind).eval(), adapters, data, ridge=0.1, dtype="float64") for kind in (True, False))
    assert close(tied.adapter, untied.adapter, 1e-12)


def test_a_fit_that_is_worse_than_its_prior_is_not_taken():
    """Two tasks ask for opposite things on a handful of inputs; the mean of both is the best guess for others."""
    model, adapters = Twice().eval(), random_adapters(["layer"], rank=6)
    generator = torch.Generator().manual_seed(3)
    data = {key: [{"x": torch.randn(4, 6, generator=generator, dtype=torch.float64)}] for key in "ab"}
    mean = Adapter.from_updates(
        {"layer": LowRank(sum(a["layer"].dense() for a in adapters.values()) / 2, torch.eye(6, dtype=torch.float64))}
    )
    result = fit(model, adapters, data, prior=mean, ridge=1e-6, dtype="float64")
    said = result.report.fits["layer"]
    assert said.checked and said.kept and said.fitted > said.prior > 0
    assert close(result.adapter, mean, 1e-9)
    assert any(
        "1 of 1 modules keep the prior: the fit is not better on held-out" in warning
        for warning in result.report.warnings
    )


def test_labels_are_not_read(model, adapters, data, tmp_path):
    labelled = {task: [{**batch, "labels": object()} for batch in listed] for task, listed in data.items()}
    kept = tmp_path / "kept"
    one, two = fit(model, adapters, data, resume=kept), fit(model, adapters, labelled, resume=kept)
    three = fit(model, adapters, labelled)
    assert same_bytes(one, two, tmp_path / "kept-on") and same_bytes(one, three, tmp_path / "anew")


def test_what_a_cut_takes_of_the_outputs_is_said(tmp_path):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 6, bias=False, dtype=torch.float64))
    adapters = random_adapters(["0"])
    data = {key: [{"input": torch.randn(50, 6, dtype=torch.float64)}] for key in "ab"}
    settings = {"prior": "zero", "ridge": 1e-9, "aside": 1.0, "dtype": "float64"}
    whole = fit(model, adapters, data, **settings)
    assert whole.report.fits["0"].lost == whole.report.outputs_lost == 0.0
    kept = tmp_path / "kept"
    cut, again = (fit(model, adapters, data, rank=1, resume=kept, **settings) for _ in range(2))
    assert again.report.fits == cut.report.fits
    # tasks count by one over what they ask most of in one direction
    outputs = {key: [r.adapter["0"].dense() @ data[key][0]["input"].T for r in (whole, cut)] for key in "ab"}
    shares = {
        key: 1 / float(torch.linalg.matrix_norm(adapters[key]["0"].dense() @ data[key][0]["input"].T, 2)) ** 2
        for key in "ab"
    }
    before, after = (sum(shares[key] * float(outputs[key][i].square().sum()) for key in "ab") for i in (0, 1))
    assert cut.report.fits["0"].lost == pytest.approx(1 - after / before, rel=1e-6)
    assert any("the cut to rank loses" in said and "most in 0" in said for said in cut.report.warnings)
    assert cut.report.to_dict()["fit"]["outputs_lost"] == cut.report.to_dict()["fit"]["modules"]["0"]["lost"] > 0.01


def test_what_a_cut_takes_of_a_prior_alone_is_said(model, adapters, data, tmp_path):
    settings = {"prior": "merge", "rank": 2, "ridge": float("inf"), "resume": tmp_path / "kept"}
    result, again = (fit(model, adapters, data, **settings) for _ in range(2))
    assert again.report.modules == result.report.modules
    expected = merge(adapters, Recipe(rank=2)).report
    assert {n: m.lost for n, m in result.report.modules.items()} == pytest.approx(
        {n: m.lost for n, m in expected.modules.items()}
    )
    assert result.report.lost == pytest.approx(expected.lost) and expected.lost > 0


def test_the_callers_random_numbers_are_left_alone(model, adapters, data):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    fit(lambda: (torch.rand(3), model)[1], adapters, data)
    assert torch.equal(torch.get_rng_state(), before)


def test_too_few_inputs_to_check_the_fit(model, adapters, data):
    one = {task: [{k: v[:1] for k, v in listed[0].items()}] for task, listed in data.items()}
    result = fit(model, adapters, one)
    count = len(result.report.fits)
    assert not any(said.checked for said in result.report.fits.values())
    assert any(f"too few inputs to hold some out: {count} of {count}" in said for said in result.report.warnings)


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_a_model_spread_by_accelerate(adapters, place, tmp_path):
    from accelerate import dispatch_model

    data = {"a": batches("bert", 2, seed=1), "b": batches("bert", 2, seed=2)}
    parts = dict.fromkeys(("bert.embeddings", "bert.pooler", "dropout", "classifier"), "cpu")
    parts |= {f"bert.encoder.layer.{i}": place if i % 2 else "cpu" for i in range(4)}
    spread = dispatch_model(make_model("bert"), parts, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
    found, expected = (fit(given, adapters, data, dtype="float64") for given in (spread, make_model("bert")))
    assert spread.bert.encoder.layer[0].forward.__name__ != "<lambda>"
    assert close(found.adapter, expected.adapter, 1e-4)


@pytest.mark.parametrize("prior", ["router", "regmean", "merge"])
def test_a_prior_alone(model, adapters, data, prior):
    passes = []
    model.bert.register_forward_pre_hook(lambda *_: passes.append(1))
    result = fit(model, adapters, data, prior=prior, ridge=float("inf"), dtype="float64")
    assert not result.report.fits and not result.report.warnings
    assert result.report.to_dict()["fit"]["ridge"] is None
    if prior == "merge":
        assert close(result.adapter, merge(adapters, Recipe(dtype="float64")).adapter)
    alone, _ = len(passes), passes.clear()
    strong = fit(model, adapters, data, prior=prior, ridge=1e9, dtype="float64")
    assert close(result.adapter, strong.adapter) and alone < len(passes) / 2


def test_regmean_with_inputs_as_the_merged_model_has_them(adapters, data):
    dense = {k: {n: a[n].dense() for n in a} for k, a in adapters.items()}
    result = fit(make_model("bert").double(), adapters, data, prior="regmean++", ridge=float("inf"), dtype="float64")
    assert not result.report.fits and not result.report.warnings
    order = seen("bert", dense["a"], data["a"][0])
    fitted = dict.fromkeys(order)
    for name in sorted(order, key=lambda n: order[n][2]):
        basis = torch.linalg.qr(torch.cat([a[name].right for a in adapters.values()]).double().T)[0]
        moments = {}
        for k in adapters:
            z = torch.cat([seen("bert", fitted, batch)[name][0] for batch in data[k]]) @ basis
            moments[k] = z.T @ z
        whole = sum(moments.values())
        whole = whole + 0.01 * whole.diagonal().mean() * torch.eye(len(whole))
        asked = sum(dense[k][name] @ basis @ moments[k] for k in adapters)
        fitted[name] = torch.linalg.solve(whole, asked.T).T @ basis.T
        assert torch.allclose(result.adapter[name].dense(), fitted[name], atol=1e-6 * float(fitted[name].norm()))


def test_an_adapter_as_prior(model, adapters, data, tmp_path):
    prior = merge(adapters, Recipe(dtype="float64")).adapter.load()
    found = [fit(model, adapters, data, prior=one, dtype="float64") for one in (prior, Recipe())]
    assert close(found[0].adapter, found[1].adapter)
    kept = tmp_path / "kept.safetensors"
    fit(model, adapters, data, prior=prior, resume=kept)
    with pytest.raises(ConfigError, match="other adapters, inputs or settings"):
        fit(model, adapters, data, prior=adapters["a"], resume=kept)
    other = Adapter.from_updates({name: LowRank(torch.ones(2, 1), torch.ones(1, 3)) for name in prior})
    for wrong in (other, Adapter.from_updates({})):
        with pytest.raises(MismatchError, match="the prior has it as"):
            fit(model, adapters, data, prior=wrong)


def test_preferences(model, adapters, data, unchecked):
    settings = {"prior": "zero", "ridge": 1e-3, "dtype": "float64"}
    for beyond in (2, 128):
        alone = fit(model, adapters, {"a": data["a"]}, beyond=beyond, **settings)
        ignored = fit(model, adapters, data, preferences={"b": 0}, beyond=beyond, **settings)
        assert close(ignored.adapter, alone.adapter)
    equal, same = (fit(model, adapters, data, preferences=given, **settings) for given in (None, {"a": 2, "b": 2}))
    more = fit(model, adapters, data, preferences={"a": 50}, **settings)
    assert close(same.adapter, equal.adapter)
    own = {name: adapters["a"][name].dense() for name in more.adapter}
    away = [sum(float((r.adapter[n].dense() - own[n]).norm()) for n in own) for r in (alone, more, equal)]
    assert away[0] < away[1] < away[2]


@pytest.mark.parametrize("prior", ["router", "zero", Recipe(), Recipe(method="ties", space="full")])
def test_other_priors(model, adapters, data, prior):
    result = fit(model, adapters, data, prior=prior)
    assert set(result.report.fits) == set(result.adapter)
    assert all(torch.isfinite(result.adapter[name].left).all() for name in result.adapter)


def test_a_strong_ridge_is_the_prior(model, adapters, data):
    prior = merge(adapters, Recipe(dtype="float64")).adapter
    result = fit(model, adapters, data, prior=Recipe(), ridge=1e9, dtype="float64")
    assert close(result.adapter, prior)


def test_it_goes_to_disk_and_back(model, adapters, data, tmp_path):
    result = fit(model, adapters, data, dtype="float32")
    result.adapter.save(tmp_path / "out")
    assert close(load(tmp_path / "out"), result.adapter, 1e-5)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"prior": "nonsense"}, "no such prior"),
        ({"ridge": -1.0}, "at least zero"),
        ({"ridge": float("nan")}, "at least zero"),
        ({"aside": 0.0}, "at least 1e-06"),
        ({"preferences": {"a": -1.0}}, "at least zero"),
        ({"preferences": {"c": 1.0}}, "no adapter of that name"),
        ({"preferences": {"a": 0, "b": 0}}, "no task to fit to"),
        ({"preferences": {"a": "much"}}, "preferences.a"),
        ({"ridge": "x"}, "ridge"),
        ({"prior": 3}, "no such prior"),
        ({"rank": 0}, "rank = 0: .*greater than or equal to 1"),
        ({"rank": -1}, "rank = -1"),
        ({"rank": 1.5}, "rank = 1.5"),
        ({"rank": True}, "rank = true"),
        ({"seed": "x"}, 'seed = "x"'),
        ({"dtype": "float99"}, 'dtype = "float99"'),
        ({"rank_budget": 0}, "rank_budget = 0: a whole number from 1 on"),
        ({"rank_budget": 2.5}, "rank_budget = 2.5: a whole number from 1 on"),
        ({"rank_budget": 3, "rank": 2}, "rank_budget: no module is to have more than rank 2"),
        ({"rank_budget": 3, "ridge": float("inf")}, "rank_budget: a prior alone"),
    ],
)
def test_settings_that_mean_nothing(model, adapters, data, settings, said):
    with pytest.raises(ConfigError, match=said):
        fit(model, adapters, data, **settings)


def test_inputs_that_are_missing(model, adapters, data):
    with pytest.raises(ConfigError, match="no task to fit to"):
        fit(model, adapters, {})
    with pytest.raises(InputError, match="no inputs"):
        fit(model, adapters, {"a": []})
    with pytest.raises(ConfigError, match="no adapter of that name"):
        fit(model, adapters, {"c": data["a"]})


def test_biases_are_refused(model, adapters, data, tmp_path):
    biased = make_adapter("bert", tmp_path / "biased", 4, lora_bias=True)
    with pytest.raises(UnsupportedError, match="lora_bias"):
        fit(model, {"a": adapters["a"], "biased": biased}, {"a": data["a"]})


def test_tasks_that_take_different_ways_in(tmp_path):
    """Texts alone beside texts with images: the vision tower is fitted to the latter."""
    adapters = {k: make_adapter("llava", tmp_path / k, i) for i, k in enumerate("ab")}
    data = {"a": batches("bert", 2, seed=1), "b": batches("llava", 2, seed=2)}
    result = fit(make_model("llava"), adapters, data)
    tokens = {name: one.tokens for name, one in result.report.fits.items()}
    assert set(tokens) == set(result.adapter)
    assert {count for name, count in tokens.items() if "vision" in name} == {2 * 2 * 5}  # patches and a class token
    assert all(count > 20 for name, count in tokens.items() if "vision" not in name)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite(model, adapters, data, value):
    with torch.no_grad():
        model.bert.encoder.layer[2].attention.self.query.weight[0, 0] = value
    with pytest.raises(InputError, match="not finite") as raised:
        fit(model, adapters, data)
    assert "layer.2" in str(raised.value)


class Routed(torch.nn.Module):
    """An expert whose tokens depend on what an earlier layer gives."""

    def __init__(self):
        super().__init__()
        self.first, self.expert = torch.nn.Linear(6, 6), torch.nn.Linear(6, 6)

    def forward(self, x):
        x = self.first(x)
        return self.expert(x[x[:, 0] > 0])


def test_experts_whose_routing_changes_are_refused():
    torch.manual_seed(0)
    adapters = {
        key: Adapter.from_updates({n: LowRank(torch.randn(6, 1), torch.randn(1, 6)) for n in ("first", "expert")})
        for key in "ab"
    }
    with pytest.raises(UnsupportedError, match="another way"):
        fit(Routed().eval(), adapters, {key: [{"x": torch.randn(40, 6)}] for key in "ab"}, ridge=3.0)
