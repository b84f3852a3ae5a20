"""A fused layer and its parts are one weight: joined exactly, or refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import coremerge
from coremerge.adapter import Adapter, Info
from coremerge.errors import MismatchError
from coremerge.fused import find, joined
from coremerge.lowrank import LowRank
from coremerge.pipeline import merge_files
from coremerge.plan import make_plan
from coremerge.recipe import Recipe

SUM = Recipe(method="sum", steps=[], scale=1.0)
INNER = 5
FORMS = {
    "Phi-3's attention": ("self_attn.qkv_proj", {"q_proj": 6, "k_proj": 3, "v_proj": 3}),
    "Phi-3's and GLM's MLP": ("mlp.gate_up_proj", {"gate_proj": 7, "up_proj": 7}),
    "Qwen3.5's linear attention": ("linear_attn.in_proj_qkv", {"in_proj_q": 4, "in_proj_k": 4, "in_proj_v": 8}),
}


def update(out: int, seed: int, inner: int = INNER) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.randn(*s, generator=generator, dtype=torch.float64) for s in ((out, 2), (2, inner)))
    return LowRank(left, right)


def made(sizes: dict[str, int], seed: int = 0, name: str = "a", inner: int = INNER, **rest: object) -> Adapter:
    held = {module: update(out, seed + at, inner) for at, (module, out) in enumerate(sizes.items())}
    return Adapter.from_updates(held, name=name, **rest)  # type: ignore[arg-type]


def both(form: str, keep: tuple[int, ...] = (0, 1, 2)) -> tuple[Adapter, Adapter, dict[str, int]]:
    fused, sizes = FORMS[form]
    parent = f"model.layers.3.{fused.rpartition('.')[0]}"
    parts = {f"{parent}.{part}": size for part, size in sizes.items()}
    some = {part: size for at, (part, size) in enumerate(parts.items()) if at in keep}
    whole = made({f"model.layers.3.{fused}": sum(sizes.values()), f"{parent}.o_proj": 6}, name="whole")
    return whole, made({**some, f"{parent}.o_proj": 6}, 50, "split", info=Info(base_model="org/split")), parts


def stacked(adapter: Adapter, parts: dict[str, int]) -> Tensor:
    zero = {part: torch.zeros(size, INNER, dtype=torch.float64) for part, size in parts.items()}
    return torch.cat([adapter[part].dense() if part in adapter else zero[part] for part in parts])


@pytest.mark.parametrize("keep", [(0, 1, 2), (0, 2), (0,), (1,)])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("order", [1, -1])
def test_parts_become_rows_of_the_fused_layer_exactly(form: str, keep: tuple[int, ...], order: int) -> None:
    whole, split, parts = both(form, keep)
    fused = f"model.layers.3.{FORMS[form][0]}"
    result = coremerge.merge([whole, split][::order], SUM).adapter
    assert sorted(result) == sorted(whole)
    torch.testing.assert_close(result[fused].dense(), whole[fused].dense() + stacked(split, parts))
    moved = make_plan([whole, split], SUM).adapters["split"]
    assert moved.modules[fused].rank == 2 * len(parts.keys() & split.keys())
    assert moved.modules[fused].shape == whole.modules[fused].shape
    (note,) = moved.info.notes
    assert f"became rows of {fused.rpartition('.')[2]}" in note


@pytest.mark.parametrize("form", FORMS)
def test_trained_biases_become_rows_too(form: str) -> None:
    whole, split, parts = both(form)
    first = next(iter(parts))
    split.biases = {first: torch.ones(parts[first], dtype=torch.float64)}
    (fused,) = (name for name in whole if not name.endswith("o_proj"))
    bias = joined({"w": whole, "s": split})["s"].biases[fused]
    assert bias.tolist() == [1.0] * parts[first] + [0.0] * (sum(parts.values()) - parts[first])


def test_each_reads_in_the_dtype_that_it_is_asked_for() -> None:
    whole, split, _ = both("Phi-3's attention")
    found = joined({"w": whole, "s": split})["s"]
    name = "model.layers.3.self_attn.qkv_proj"
    for dtype in (torch.float32, torch.float64):
        assert found.read(name, dtype).dtype == dtype
        torch.testing.assert_close(found.read(name, dtype).dense().double(), found[name].dense(), rtol=1e-5, atol=1e-5)


UNKNOWN = {
    "NeoX mixes the rows of heads": ("attention.query_key_value", "attention.query"),
    "GPT-2's": ("attn.c_attn", "attn.q_proj"),
    "CodeGen mixes them": ("attn.qkv_proj", "attn.k_proj"),
    "ModernBERT's": ("attn.Wqkv", "attn.to_v"),
    "Qwen3-Next's, by groups of heads": ("linear_attn.in_proj_qkvz", "linear_attn.in_proj_z"),
    "Qwen3-Next's other": ("linear_attn.in_proj_ba", "linear_attn.in_proj_b"),
    "keys and values": ("attn.to_kv", "attn.to_k"),
    "without a parent": ("qkv", "q"),
    "Megatron's": ("self_attention.linear_qkv", "self_attention.linear_q"),
    "DiT's": ("attn.attn_qkv", "attn.attn_v"),
    "vision towers'": ("attn.qkv_linear", "attn.q_proj"),
    "vision towers' keys and values": ("attn.kv", "attn.k"),
    "diffusers' second stream": ("attn.to_added_qkv", "attn.add_q_proj"),
    "gate and up": ("mlp.gate_and_up_proj", "mlp.up_proj"),
}


@pytest.mark.parametrize("form", UNKNOWN)
def test_rows_in_an_order_that_is_not_known_are_refused_by_name(form: str) -> None:
    fused, part = UNKNOWN[form]
    adapters = [made({fused: 12, "o": 4}, name="whole"), made({part: 4, "o": 4}, name="split")]
    with pytest.raises(MismatchError, match=rf"{fused} \(whole\) and {part} \(split\) are one weight.*one form only"):
        coremerge.merge(adapters, SUM)
    assert len(coremerge.merge(adapters, SUM.model_copy(update={"allow_disjoint": True})).adapter) == 3


@pytest.mark.parametrize(
    ("sizes", "inner"),
    [
        ({"q_proj": 6, "k_proj": 3, "v_proj": 4}, INNER),  # k and v are of one size
        ({"q_proj": 6, "k_proj": 4}, INNER),
        ({"q_proj": 5}, INNER),  # the rest is odd
        ({"q_proj": 12}, INNER),
        ({"q_proj": 6}, INNER + 1),
    ],
)
def test_sizes_that_do_not_add_up_are_refused(sizes: dict[str, int], inner: int) -> None:
    split = made({f"self_attn.{part}": size for part, size in sizes.items()} | {"o": 4}, name="split", inner=inner)
    whole = made({"self_attn.qkv_proj": 12, "o": 4}, name="whole")
    whole = Adapter.from_updates({**whole, "o": update(4, 0, inner)}, name="whole")
    with pytest.raises(MismatchError, match=r"self_attn\.qkv_proj \(whole\) and self_attn\."):
        coremerge.merge([whole, split], SUM)


def test_parts_of_two_sizes_are_refused() -> None:
    sizes = [{"self_attn.q_proj": size, "self_attn.k_proj": 3, "self_attn.v_proj": 3} for size in (6, 7)]
    adapters = [
        made({"self_attn.qkv_proj": 12}),
        *(made(each, name=name) for each, name in zip(sizes, "bc", strict=True)),
    ]
    with pytest.raises(MismatchError, match=r"self_attn\.q_proj: shape \(6, 5\) in b, \(7, 5\) in c"):
        coremerge.merge(adapters, SUM)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (["attn.to_kv", "attn.o"], ["attn.to_q", "attn.o"]),  # Granite's speech: the rest of the same layer
        (["attn.in_proj_qkv", "attn.o"], ["attn.in_proj_z", "attn.o"]),
        (["attn.kv_proj", "attn.o"], ["attn.gate_proj", "attn.o"]),
        (["mlp.gate_up_proj", "attn.o"], ["attn.gate_proj", "attn.o"]),  # of another parent
        (["attn.qkv_proj", "attn.q_proj", "o"], ["attn.q_proj", "o"]),  # one adapter has both: they are two layers
        (["crossattention.c_attn", "o"], ["crossattention.q_attn", "o"]),
    ],
)
def test_layers_that_belong_side_by_side_stay_so(one: list[str], other: list[str]) -> None:
    adapters = [made(dict.fromkeys(names, 4), name=name) for names, name in ((one, "a"), (other, "b"))]
    assert not list(find({adapter.name: adapter for adapter in adapters}))
    assert sorted(coremerge.merge(adapters, SUM).adapter) == sorted({*one, *other})


@pytest.mark.filterwarnings("ignore::FutureWarning")  # transformers', of what PEFT asks it
def test_phis_layers_hold_llamas_parts_in_this_order(tmp_path: Path) -> None:
    """The same model in both forms, each as transformers and PEFT run it."""
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM

    sizes = {
        "vocab_size": 20, "hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "rms_norm_eps": 1e-5,
    }  # fmt: skip
    torch.manual_seed(0)
    llama, phi = LlamaForCausalLM(LlamaConfig(**sizes)), Phi3ForCausalLM(Phi3Config(**sizes))
    weights = dict(llama.state_dict())
    for layer in ("model.layers.0", "model.layers.1"):
        for fused, parts in (("self_attn.qkv_proj", "qkv"), ("mlp.gate_up_proj", ("gate", "up"))):
            names = [f"{layer}.{fused.split('.')[0]}.{part}_proj.weight" for part in parts]
            weights[f"{layer}.{fused}.weight"] = torch.cat([weights.pop(name) for name in names])
    phi.load_state_dict(weights)
    ids = torch.arange(1, 9).unsqueeze(0)
    for model, targets, folder in (
        (llama, ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"], "split"),
        (phi, ["qkv_proj", "gate_up_proj", "down_proj"], "fused"),
    ):
        adapted = get_peft_model(model, LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM"))
        if folder == "split":
            for name, parameter in adapted.named_parameters():
                if "lora_B" in name:
                    torch.nn.init.normal_(parameter)
            expected = adapted(input_ids=ids).logits
        adapted.save_pretrained(tmp_path / folder)
        adapted.unload()
    merge_files([tmp_path / "split", tmp_path / "fused"], tmp_path / "out", SUM)
    found = PeftModel.from_pretrained(phi, tmp_path / "out")(input_ids=ids).logits
    # float32 on both ways
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
