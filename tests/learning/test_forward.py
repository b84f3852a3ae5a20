"""The merged model by hooks, against PEFT's own forward pass, on tiny models of every family."""

from __future__ import annotations

import warnings

import pytest
import torch
from peft import PeftModel
from transformers import CLIPConfig, CLIPModel

import families
from coremerge import Adapter, LowRank, Recipe, merge
from coremerge.adapter import Module
from coremerge.errors import InputError, MismatchError, UnsupportedError
from coremerge.learning.backbone import frozen
from coremerge.learning.forward import MergedModel, find_modules
from coremerge.learning.objectives import alone
from families import FAMILIES, batches, make_adapter, make_model
from tolerances import LAYERS, SINGLE


def weighted(weights):
    """Coefficients from one number per adapter."""
    return lambda target: torch.tensor([weights[target.adapters[k]] for k in target.owner.tolist()])


@pytest.fixture(params=list(FAMILIES))
def family(request):
    return request.param


@pytest.fixture
def pair(family, tmp_path):
    return {"a": make_adapter(family, tmp_path / "a", 1), "b": make_adapter(family, tmp_path / "b", 2, rank=5)}


def hidden(model, batch, adapters=None, coefficients=None):
    merged = MergedModel(model, adapters or {"none": zero(model)})
    with torch.no_grad(), merged.run(batch, coefficients or weighted({"none": 0.0})) as run:
        return run.hidden


def zero(model):
    """An adapter of nothing, for a module that every family has."""
    name, module = next((n, m) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear))
    return Adapter.from_updates(
        {name: LowRank(torch.zeros(module.out_features, 1), torch.zeros(1, module.in_features))}
    )


def test_it_is_pefts_forward_pass(family, pair, tmp_path):
    weights = {"a": 0.7, "b": -0.4}
    merge(pair, Recipe(method="sum", scale=1.0, weights=weights)).adapter.save(tmp_path / "merged")
    model = make_model(family)
    batch = batches(family)[0]
    found = hidden(model, batch, pair, weighted(weights))
    before = hidden(model, batch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's own
        peft = PeftModel.from_pretrained(make_model(family), tmp_path / "merged").eval()
    expected = hidden(peft.base_model.model, batch)
    torch.testing.assert_close(found, expected, **LAYERS)
    assert float((found - before).abs().max()) > 1e-2


def test_one_alone(family, pair):
    model, batch = make_model(family), batches(family)[0]
    one = hidden(model, batch, {"a": pair["a"]}, weighted({"a": 1.0}))
    torch.testing.assert_close(hidden(model, batch, pair, alone("a")), one, rtol=SINGLE, atol=SINGLE)


def test_the_model_is_as_it_was(family, pair):
    model = make_model(family).train()
    next(model.parameters()).requires_grad_(False)
    hidden(model, batches(family)[0])  # some models install hooks of their own when they first run
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    state = [(module.training, len(module._forward_hooks), "forward" in vars(module)) for module in model.modules()]
    caches = [getattr(getattr(module, "config", None), "use_cache", None) for module in model.modules()]
    with pytest.raises(KeyError), frozen(model, checkpointing=True):
        merged = MergedModel(model, pair)
        with merged.run(batches(family)[0], weighted({"a": 1.0})):
            raise AssertionError("there is no weight of b")
    assert [(m.training, len(m._forward_hooks), "forward" in vars(m)) for m in model.modules()] == state
    assert [getattr(getattr(module, "config", None), "use_cache", None) for module in model.modules()] == caches
    assert [p.requires_grad for p in model.parameters()][:2] == [False, True]
    for name, value in model.state_dict().items():
        assert torch.equal(value, weights[name])


@pytest.fixture
def watched_gradient(family, pair):
    """The gradient of one coefficient for all, and how often a hook has watched during and after the pass."""

    def gradient(checkpointing):
        model, watched = make_model(family), []
        scale = torch.tensor(0.5, requires_grad=True)

        def watch(target, x):
            watched.append(target.name)
            return x.square().mean()

        with frozen(model, checkpointing=checkpointing):
            merged = MergedModel(model, pair)
            with merged.run(batches(family)[0], lambda target: scale.expand(len(target.owner)), watch) as run:
                once = len(watched)
                torch.stack(list(run.found.values())).sum().backward()
        return scale.grad, once, len(watched)

    return gradient


def test_checkpointing_changes_no_gradient(watched_gradient):
    plain, once, after = watched_gradient(False)
    assert once == after
    repeated, once, after = watched_gradient(True)
    assert once < after
    torch.testing.assert_close(repeated, plain)


def test_biases_are_added(tmp_path):
    adapter = make_adapter("bert", tmp_path / "a", 1, lora_bias=True)
    model, batch = make_model("bert"), batches("bert")[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft = PeftModel.from_pretrained(make_model("bert"), tmp_path / "a").eval()
    found = hidden(model, batch, {"a": adapter}, weighted({"a": 1.0}))
    torch.testing.assert_close(found, hidden(peft.base_model.model, batch), **LAYERS)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype, tmp_path):
    adapter = make_adapter("llama", tmp_path / "a", 1)
    batch = batches("llama")[0]
    exact = hidden(make_model("llama"), batch, {"a": adapter}, weighted({"a": 1.0}))
    found = hidden(make_model("llama").to(dtype), batch, {"a": adapter}, weighted({"a": 1.0}))
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), exact, rtol=0.1, atol=0.2)  # bfloat16 has 8 bits, and layers add up


class TestNames:
    def test_of_a_model_with_a_head_and_of_its_backbone(self, tmp_path):
        model = make_model("bert")
        inner = "encoder.layer.0.attention.self.query"
        assert find_modules(model, [inner]) == {inner: f"bert.{inner}"}
        assert find_modules(model.bert, [f"bert.{inner}"]) == {f"bert.{inner}": inner}

    def test_of_a_tower(self):
        both = torch.nn.ModuleDict({"vision_model": make_model("clip"), "text_model": make_model("llama").model})
        assert find_modules(both, ["encoder.layers.0.mlp.fc1"]) == {
            "encoder.layers.0.mlp.fc1": "vision_model.encoder.layers.0.mlp.fc1"
        }
        twice = torch.nn.ModuleDict({"a": make_model("clip"), "b": make_model("clip")})
        with pytest.raises(MismatchError, match=r"several such modules: a\.encoder.*, b\.encoder"):
            find_modules(twice, ["encoder.layers.0.mlp.fc1"])

    def test_that_are_not_there(self):
        with pytest.raises(MismatchError, match=r"model.layers.0.q_proj: the base model \(Bert.* has no such module"):
            find_modules(make_model("bert"), ["model.layers.0.q_proj"])


@pytest.mark.parametrize(
    ("name", "shape", "kind", "error"),
    [
        ("bert.encoder.layer.0.attention.self.query", (4, 16), "linear", MismatchError),
        ("bert.embeddings.word_embeddings", (16, 50), "embedding", UnsupportedError),
        ("bert.encoder.layer.0", (16, 16), "linear", UnsupportedError),
    ],
)
def test_what_cannot_be_hooked(name, shape, kind, error):
    update = LowRank(torch.zeros(shape[0], 1), torch.zeros(1, shape[1]))
    adapter = Adapter.from_updates({name: update}, kinds={name: Module(shape, 1, kind)})
    with pytest.raises(error, match=name):
        MergedModel(make_model("bert"), {"a": adapter})


def test_no_adapters():
    with pytest.raises(InputError, match="no adapters"):
        MergedModel(make_model("bert"), {})


def test_the_families_are_the_issues():
    assert set(families.FAMILIES) >= {"bert", "vit", "clip", "llama", "gpt2", "t5", "llava"}


def test_a_model_of_two_towers_runs_the_one_that_is_fed():
    config = CLIPConfig(
        text_config={
            "vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
            "num_attention_heads": 2, "max_position_embeddings": 16,
        },
        vision_config={
            "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
            "image_size": 8, "patch_size": 4,
        },
        projection_dim=16,
    )  # fmt: skip
    model = CLIPModel(config).eval()
    update = LowRank(torch.zeros(16, 1), torch.zeros(1, 16))
    for tower, family in (("vision_model", "clip"), ("text_model", "llama")):
        adapter = Adapter.from_updates({f"{tower}.encoder.layers.0.self_attn.q_proj": update})
        assert hidden(model, batches(family)[0], {"a": adapter}, weighted({"a": 1.0})).shape[-1] == 16
