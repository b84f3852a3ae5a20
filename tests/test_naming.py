"""One weight has one name in a merge, whatever the adapters call it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

import coremerge
from coremerge.adapter import Adapter, Info
from coremerge.errors import ConfigError, MismatchError
from coremerge.lowrank import LowRank
from coremerge.naming import agreed, renamed, unsettled
from coremerge.pipeline import merge_files
from coremerge.plan import make_plan
from coremerge.recipe import Recipe
from coremerge.report.gather import gather
from coremerge.report.page import report_page
from coremerge.report.record import read_record
from tiny import PREFIX, make_adapter

SUM = Recipe(method="sum", steps=[], scale=1.0)
PARTS = [f"layers.{layer}.self_attn.{part}" for layer in (0, 1) for part in ("q_proj", "v_proj")]


def update(seed: int, out: int = 5, inner: int = 4, rank: int = 2) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.randn(*s, generator=generator, dtype=torch.float64) for s in ((out, rank), (rank, inner)))
    return LowRank(left, right)


def adapter(*names: str, seed: int = 0, out: int = 5, name: str = "a", **info: object) -> Adapter:
    extras = info.pop("extras", None)
    held = {module: update(seed + at, out) for at, module in enumerate(names)}
    return Adapter.from_updates(held, name=name, info=Info(**info), extras=extras)  # type: ignore[arg-type]


def tower(prefix: str, *more: str, **settings: object) -> Adapter:
    return adapter(*(prefix + part for part in PARTS), *more, **settings)  # type: ignore[arg-type]


def merged(*adapters: Adapter, recipe: Recipe = SUM) -> Adapter:
    return coremerge.merge(adapters, recipe).adapter


OLD = {
    "a text model's own": ("model.", ""),
    "as transformers 4 had it": ("language_model.model.", "language_model."),
    "the inner model of one": ("language_model.", ""),
    "as one saves it twice": ("model.language_model.model.", ""),
    "MiniCPM's": ("llm.model.", "llm."),
}


@pytest.mark.parametrize("old", OLD)
def test_a_tower_under_two_names_goes_under_todays(old: str) -> None:
    prefix, _ = OLD[old]
    a, b = tower(prefix, "lm_head"), tower("model.language_model.", "lm_head", seed=9, name="b")
    made = merged(a, b)
    assert sorted(made) == sorted(["lm_head", *(f"model.language_model.{part}" for part in PARTS)])
    for part in PARTS:
        expected = a[prefix + part].dense() + b[f"model.language_model.{part}"].dense()
        torch.testing.assert_close(made[f"model.language_model.{part}"].dense(), expected)
    noted, kept = make_plan([a, b], SUM).adapters.values()
    (note,) = noted.info.notes
    assert prefix.split(".")[0] in note and "model.language_model" in note
    assert not kept.info.notes


def test_two_old_names_of_one_tower() -> None:
    assert sorted(merged(tower("model."), tower("language_model.model.", name="b"))) == sorted(
        f"model.language_model.{part}" for part in PARTS
    )


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("visual.blocks.0.attn.qkv", "model.visual.blocks.0.attn.qkv"),
        ("vision_tower.vision_model.encoder.layers.0.mlp.fc1", "model.vision_tower.encoder.layers.0.mlp.fc1"),
        ("model.vision_tower.vision_model.encoder.fc1", "model.vision_tower.encoder.fc1"),
        ("audio_tower.layers.0.fc1", "model.audio_tower.layers.0.fc1"),
        ("multi_modal_projector.linear_1", "model.multi_modal_projector.linear_1"),
        ("language_model.lm_head", "lm_head"),
    ],
)
def test_the_other_towers_too(old: str, new: str) -> None:
    assert list(merged(adapter(old), adapter(new, name="b"))) == [new]


def test_one_spelling_stays_as_it_is() -> None:
    for names in (["model.layers.0.q"], ["language_model.model.layers.0.q", "vision_tower.x.fc1"], ["visual.b.qkv"]):
        assert list(merged(adapter(*names), adapter(*names, name="b"))) == sorted(names)


def test_towers_of_other_shapes_are_other_towers() -> None:
    with pytest.raises(MismatchError, match="no module in common"):
        merged(tower("model."), tower("model.language_model.", out=6, name="b"))


def test_an_adapter_of_both_says_that_they_are_two() -> None:
    both = adapter("model.layers.0.q", "model.language_model.layers.0.q")
    assert len(merged(both, adapter("model.language_model.layers.0.q", name="b"))) == 2


def test_whole_tensors_and_token_rows_move_with_their_tower() -> None:
    rows = "model.embed_tokens.token_adapter.trainable_tokens_delta"
    extras = {rows: torch.ones(2, 4), "model.norm.weight": torch.ones(3), "score.weight": torch.ones(2)}
    old = tower(
        "model.", extras=extras, modules_to_save=("model.norm", "score"), token_indices={"model.embed_tokens": (5, 6)}
    )
    made = merged(old, tower("model.language_model.", name="b"))
    assert sorted(made.extras) == [
        "model.language_model.embed_tokens.token_adapter.trainable_tokens_delta", "model.language_model.norm.weight",
        "score.weight",
    ]  # fmt: skip
    assert made.info.modules_to_save == ("model.language_model.norm", "score")
    assert made.info.token_indices == {"model.language_model.embed_tokens": (5, 6)}


def test_the_base_is_that_of_the_adapter_whose_names_were_kept() -> None:
    text = tower("model.", base_model="org/text", targets=("q_proj", "v_proj"))
    made = merged(text, tower("model.language_model.", name="b", base_model="org/vision"))
    assert made.info.base_model == "org/vision"
    assert made.info.targets == ()  # the vision tower, which the text model's adapter does not know, may have such


def test_agreeing_again_changes_nothing() -> None:
    once = agreed({"a": tower("model."), "b": tower("model.language_model.", name="b")})
    assert all(again is before for again, before in zip(agreed(once).values(), once.values(), strict=True))


class TestRename:
    def one(self, rename: Mapping[str, str], *names: str) -> list[str]:
        return list(renamed({"a": adapter(*names)}, rename)["a"])

    @pytest.mark.parametrize(
        ("rename", "names", "new"),
        [
            ({"encoder": "bert.encoder"}, ["encoder.layer.0.q"], ["bert.encoder.layer.0.q"]),
            ({"bert.encoder": "encoder"}, ["bert.encoder.layer.0.q", "bert.x"], ["bert.x", "encoder.layer.0.q"]),
            ({"model": "model.text"}, ["model.text.a", "model.b"], ["model.text.a", "model.text.b"]),
            ({"model.": "model.text."}, ["model.b"], ["model.text.b"]),
            ({"moe": "mlp"}, ["layers.0.moe.x", "layers.0.moes"], ["layers.0.mlp.x", "layers.0.moes"]),
            ({"a": "x", "a.b": "y"}, ["a.b.c", "a.d"], ["x.d", "y.c"]),
            ({"a": "b", "b": "a"}, ["a.x", "b.y"], ["a.y", "b.x"]),
            ({"lm_head": "head"}, ["lm_head"], ["head"]),
        ],
    )
    def test_whole_steps_in_front_or_else_inside(
        self, rename: dict[str, str], names: list[str], new: list[str]
    ) -> None:
        assert self.one(rename, *names) == new

    def test_a_name_that_nothing_has_is_refused(self) -> None:
        with pytest.raises(ConfigError, match=r'rename = "bart": no module.*encoder\.q'):
            self.one({"bart": "bert"}, "encoder.q")

    def test_two_modules_of_one_name_are_refused(self) -> None:
        with pytest.raises(ConfigError, match=r"b\.q: two modules of one adapter would have this name"):
            self.one({"a": "b"}, "a.q", "b.q")

    def test_files_report_and_record(self, tmp_path: Path) -> None:
        plain = make_adapter(tmp_path / "plain")
        other = make_adapter(tmp_path / "other", seed=1)
        from safetensors.torch import load_file, save_file

        held = load_file(other / "adapter_model.safetensors")
        save_file(
            {key.replace(f"{PREFIX}model.", f"{PREFIX}wrapped.inner."): value for key, value in held.items()},
            other / "adapter_model.safetensors",
        )
        with pytest.raises(
            MismatchError, match=r"no module in common.*--rename (\S+)=(\S+)\. If it has both"
        ) as refused:
            merge_files([plain, other], tmp_path / "out", SUM)
        option = str(refused.value).partition("--rename ")[2].partition(". ")[0]
        old, _, new = option.partition("=")
        merge_files([plain, other], tmp_path / "out", SUM, rename={old: new})
        assert sorted(coremerge.load(tmp_path / "out")) == sorted(name.replace("model.", "wrapped.inner.", 1)
                                                                  for name in coremerge.load(plain))  # fmt: skip
        assert read_record(tmp_path / "out")["rename"] == {old: new}
        assert "cannot be read" not in report_page(tmp_path / "out")
        kept = json.dumps(read_record(tmp_path / "out")["notes"])
        assert "as asked" in kept


@pytest.mark.parametrize(
    ("first", "other", "options"),
    [
        ("", "bert.", "--rename layers=bert.layers"),
        ("bert.", "", "--rename layers=bert.layers"),
        ("transformer.", "net.body.", "--rename transformer=net.body"),
    ],
)
def test_the_remedy_of_a_refusal_makes_one_tower(first: str, other: str, options: str) -> None:
    a, b = tower(first), tower(other, name="b")
    with pytest.raises(MismatchError, match=options):
        merged(a, b)
    rename = dict(option.split("=") for option in options.replace("--rename ", "").split())
    both = renamed({"a": a, "b": b}, rename)
    assert len({tuple(each) for each in both.values()}) == 1


def test_parts_of_one_layer_under_two_names_are_told() -> None:
    a, b = adapter("model.layers.0.attn.q"), adapter("net.layers.0.attn.v", name="b")
    assert unsettled({"a": a, "b": b}) == "--rename net=model" or unsettled({"a": a, "b": b}) == "--rename model=net"


def test_different_models_are_told_apart() -> None:
    a, b = adapter("model.layers.0.q", "x.y"), adapter("vision.block.k", "z", name="b")
    with pytest.raises(MismatchError, match="different base models; --allow-disjoint"):
        merged(a, b)


def test_a_tower_beside_a_common_head_is_warned_of() -> None:
    adapters = [tower("", "head"), tower("bert.", "head", name="b")]
    (warning,) = (text for text in make_plan(adapters, SUM).warnings if "--rename" in text)
    assert warning.endswith("--rename layers=bert.layers")
    two = [adapter("encoder.layers.0.q", "head"), adapter("decoder.layers.0.q", "head", name="b")]
    assert not [text for text in make_plan(two, SUM).warnings if "--rename" in text]


@pytest.mark.parametrize("front", ["", "encoder."])
def test_what_has_its_new_name_already_stays(front: str) -> None:
    short, long = (adapter(*(f"{front}{tower}{part}" for part in PARTS)) for tower in ("", "bert."))
    for given in ({"a": short, "b": long}, {"b": long}):
        found = renamed(given, {"layers": "bert.layers"})
        assert all(each.keys() == long.keys() for each in found.values())
    back = renamed({"b": long}, {"bert.layers": "layers"})
    assert back["b"].keys() == short.keys()


@pytest.mark.parametrize(
    ("tower", "rename"),
    [(("", "bert."), {"layers": "bert.layers"}), (("language_model.model.", "model.language_model."), {})],
    ids=["renamed", "today's names"],
)
@pytest.mark.parametrize("gone", ["a", "b"])
def test_a_report_knows_the_names_of_the_merge_when_others_are_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tower: tuple[str, str], rename: dict[str, str], gone: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for seed, (name, front) in enumerate(zip("ab", tower, strict=True)):
        adapter(*(front + part for part in PARTS), seed=seed).save(name)
    merge_files(["a", "b"], "OUT", SUM, rename=rename)
    whole = gather(Path("OUT"), read_record("OUT"))
    shutil.rmtree(gone)
    kept = {name: sums for name, sums in whole.kept.items() if name != gone}
    assert all(len(sums) == len(PARTS) for sums in kept.values())
    assert gather(Path("OUT"), read_record("OUT")).kept == kept


def test_a_report_knows_a_fused_layer_when_who_had_it_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    adapter("self_attn.qkv_proj", out=15).save("fused")
    adapter("self_attn.q_proj", "self_attn.v_proj", seed=3).save("split")
    merge_files(["fused", "split"], "OUT", SUM)
    whole = gather(Path("OUT"), read_record("OUT"))
    shutil.rmtree("fused")
    assert gather(Path("OUT"), read_record("OUT")).kept == {"split": whole.kept["split"]}
    assert whole.kept["split"]


@pytest.mark.parametrize(
    "extra", ["embed_tokens.weight", "embed_tokens.token_adapter.trainable_tokens_delta", "norm.weight"]
)
def test_the_remedy_names_whole_tensors_too(extra: str) -> None:
    inner = adapter(*PARTS, extras={extra: torch.ones(2), "classifier.weight": torch.ones(1)})
    whole = adapter(*(f"model.{part}" for part in PARTS), name="b")
    options = unsettled({"a": inner, "b": whole})
    assert options is not None
    found = renamed({"a": inner, "b": whole}, dict(pair.split("=") for pair in options.split() if "=" in pair))
    assert found["a"].keys() == whole.keys()
    assert set(found["a"].extras) == {f"model.{extra}", "classifier.weight"}
