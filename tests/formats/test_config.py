"""adapter_config.json as people publish it: read, or refused with file, key, value and remedy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import zoo
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coremerge import load
from coremerge.errors import ConfigError, CoremergeError, SourceError, UnsupportedError
from coremerge.formats.config import Config, read_config

NULLS = dict.fromkeys(
    ("alora_invocation_tokens", "arrow_config", "corda_config", "eva_config", "exclude_modules", "kasa_config",
     "layer_replication", "layers_pattern", "layers_to_transform", "lora_ga_config", "megatron_config",
     "modules_to_save", "monteclora_config", "revision", "target_parameters", "trainable_token_indices", "use_bdlora",
     "velora_config", "auto_mapping", "task_type")
)  # fmt: skip
PUBLISHED: dict[str, dict[str, Any]] = {
    "2023, with keys that are gone": {
        "base_model_name_or_path": "org/base-7b", "bias": "none", "enable_lora": None, "fan_in_fan_out": False,
        "inference_mode": True, "init_lora_weights": True, "lora_alpha": 16, "lora_dropout": 0.05,
        "merge_weights": False, "modules_to_save": None, "r": 2, "target_modules": ["q_proj", "v_proj"],
        "task_type": "CAUSAL_LM",
    },
    "float alpha, saved embeddings, a base that is nowhere": {
        "base_model_name_or_path": "/Base-7b-hf", "bias": "none", "lora_alpha": 128.0, "r": 2, "merge_weights": False,
        "modules_to_save": ["embed_tokens", "lm_head"], "target_modules": ["q_proj", "v_proj"],
    },
    "large alpha": {**NULLS, "lora_alpha": 100000, "lora_dropout": 0.0, "loftq_config": {}, "r": 2, "rank_pattern": {}},
    "targets twice": {"r": 2, "lora_alpha": 16, "lora_dropout": 0, "target_modules": ["v_proj", "q_proj", "v_proj"]},
    "classifier": {**NULLS, "r": 2, "lora_alpha": 32, "modules_to_save": ["classifier", "score"],
                   "task_type": "SEQ_CLS", "qalora_group_size": 16, "use_qalora": False},
    "image model without a base": {
        **NULLS, "auto_mapping": {"base_model_class": "UNet", "parent_library": "lib"}, "r": 2, "lora_alpha": 40,
        "base_model_name_or_path": None, "ensure_weight_tying": False, "target_modules": ["0.proj_in", "to_out.0"],
    },
    "rslora": {"r": 2, "lora_alpha": 48, "use_rslora": True, "base_model_name_or_path": "/input/models/base/1"},
    "regex targets": {**NULLS, "r": 2, "target_modules": r"(?:.*?(?:language|text).*?\.(?:q_proj))|(?:\bmodel\.x)"},
    "velora": {**NULLS, "r": 2, "velora_config": {"num_groups": 4}},
    "no task type, scale below one": {"r": 2, "lora_alpha": 0.5},
    "by hand": {"base_model_name_or_path": "/hub/models--org--base/snapshots/0123/", "bias": "none", "r": 2,
                "inference_mode": True, "lora_alpha": 16.0, "lora_dropout": 0.1, "target_modules": ["q_proj"]},
    "another letter case": {"peft_type": "Lora", "r": 2.0, "alpha_pattern": None, "rank_pattern": None},
    "every null": {**NULLS, "r": 2, "lora_alpha": None, "bias": None, "use_rslora": None, "init_lora_weights": None},
    "unknown keys": {"r": 2, "something_of_2031": {"a": [1]}, "use_everything": True},
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_shapes_are_read(tmp_path: Path, name: str) -> None:
    said = PUBLISHED[name]
    adapter = load(zoo.simple(tmp_path / "a", **{"lora_alpha": 8, **said}))
    alpha = said.get("lora_alpha", 8)
    alpha = 8 if alpha is None else alpha
    assert len(adapter) == 2
    assert adapter.modules["layers.0.q_proj"].scale == alpha / (2**0.5 if said.get("use_rslora") else 2)


BROKEN: dict[str, tuple[str, str]] = {
    '{"r": 8, "peft_type": None, "lora_alpha": 4}': ("peft_type", r'None is Python, not JSON .*Write null or.*"LORA"'),
    '{"peft_type": "LORA", "use_dora": True}': ("use_dora", "True is Python, not JSON .*Write true"),
    '{"peft_type": "LORA"} {"r": 1}': ("", r"a second value follows the JSON object at line 1 column 23"),
    '{"peft_type": "LORA",': ("", "not valid JSON: .*Correct the config there"),
    '{"peft_type": "LORA", "r": nope}': ("r", "not valid JSON: Expecting value at line 1 column 28"),
    "": ("", "the file is empty"),
    "[1, 2]": ("", "must be a JSON object"),
    '"LORA"': ("", "must be a JSON object"),
    '{"base_model": "org/policy"}': ("peft_type", r"not a PEFT adapter config: .*keys found: base_model"),
    "{}": ("peft_type", r"keys found: nothing"),
    '{"peft_type": 3}': ("peft_type", "must be a string"),
    "[" * 100_000: ("", "not usable JSON"),
    '{"peft_type": "LORA", "r": ' + "9" * 5000 + "}": ("", "not usable JSON"),
}


@pytest.mark.parametrize("text", BROKEN, ids=lambda text: text[:30])
def test_broken_files(tmp_path: Path, text: str) -> None:
    key, message = BROKEN[text]
    path = tmp_path / "adapter_config.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as refused:
        read_config(path)
    assert (refused.value.key or "") == key
    assert refused.value.file == str(path)
    assert refused.value.remedy


def test_pointers_other_encodings_and_absurd_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "adapter_config.json"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n")
    with pytest.raises(SourceError, match=r"adapter_config.json: this is a Git LFS pointer.*git lfs pull"):
        read_config(path)
    path.write_bytes(b'{"peft_type": "\xff"}')
    with pytest.raises(ConfigError, match="not UTF-8"):
        read_config(path)
    path.write_bytes(b'\xef\xbb\xbf{"peft_type": "LORA"}')
    assert read_config(path).type == "LORA"
    monkeypatch.setattr("coremerge.formats.config._LIMIT", 10)
    with pytest.raises(ConfigError, match="larger than any"):
        read_config(path)
    with pytest.raises(SourceError, match="cannot be read: No such file"):
        read_config(tmp_path / "none.json")


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"r": "8"}, r'r = "8": must be a finite number'),
    ({"r": True}, r"r = true: must be a finite number"),
    ({"r": 2.5}, r"r = 2\.5: must be a whole number"),
    ({"r": -2}, r"r = -2: must be a whole number"),
    ({"lora_alpha": float("nan")}, r"lora_alpha = NaN: must be a finite number"),
    ({"lora_alpha": 10**400}, r"lora_alpha = 1000.*\.\.\.: must be a finite number"),
    ({"lora_alpha": [1]}, r"lora_alpha = \[1\]: must be a finite number"),
    ({"use_rslora": "yes"}, r'use_rslora = "yes": must be true or false'),
    ({"rank_pattern": [1]}, r"rank_pattern = \[1\]: must be an object or null"),
    ({"rank_pattern": {"q": "4"}}, r'rank_pattern\.q = "4": must be a finite number'),
    ({"alpha_pattern": {"q": None}}, r"alpha_pattern\.q = null: must be a finite number"),
    ({"alpha_pattern": {"(q": 1}}, r"alpha_pattern\.\(q = 1: the key is not a regular expression"),
    ({"task_type": 5}, r"task_type = 5: must be a string or null"),
    ({"layer_replication": [[1]]}, r"layer_replication = \[\[1\]\]: must be a list of \[start, end\] pairs"),
    ({"layer_replication": 7}, r"layer_replication = 7: must be a list"),
]


@pytest.mark.parametrize(("config", "message"), WRONG, ids=str)
def test_wrong_values(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match="adapter_config.json: " + message) as refused:
        load(zoo.simple(tmp_path / "a", **config))
    assert refused.value.remedy


def test_modules_to_save_must_be_names(tmp_path: Path) -> None:
    import torch

    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors["base_model.model.head.weight"] = torch.ones(1, 1)

    with pytest.raises(ConfigError, match=r"modules_to_save = \[1\]: must be a list of names"):
        load(zoo.simple(tmp_path / "a", change=add, modules_to_save=[1]))
    assert len(load(zoo.simple(tmp_path / "b", change=add, modules_to_save="head")).extras) == 1


VARIANTS: dict[str, Any] = {
    "use_dora": True, "kasa_config": {}, "use_qalora": True, "use_bdlora": {"nblocks": 2}, "arrow_config": {"top_k": 3},
    "alora_invocation_tokens": [1, 2], "monteclora_config": {}, "enable_lora": [True, False, True],
}  # fmt: skip


@pytest.mark.parametrize("key", VARIANTS)
def test_settings_that_change_the_maths(tmp_path: Path, key: str) -> None:
    with pytest.raises(UnsupportedError) as refused:
        load(zoo.simple(tmp_path / "a", **{key: VARIANTS[key]}))
    error = refused.value
    assert error.file == str(tmp_path / "a/adapter_config.json")
    assert (error.key, error.value) == (key, VARIANTS[key])
    assert error.remedy


@pytest.mark.parametrize("value", ["pissa", "pissa_niter_16", "olora", "OLoRA", "corda", "loftq", "lora_ga"])
def test_initialisations_that_changed_the_base(tmp_path: Path, value: str) -> None:
    with pytest.raises(UnsupportedError, match=r"init_lora_weights = .*changed the base model.*initial=") as refused:
        load(zoo.simple(tmp_path / "a", init_lora_weights=value))
    assert refused.value.value == value


@pytest.mark.parametrize("value", [True, False, None, "gaussian", "eva", "orthogonal", "mica", "true"])
def test_initialisations_that_did_not(tmp_path: Path, value: object) -> None:
    assert len(load(zoo.simple(tmp_path / "a", init_lora_weights=value))) == 2


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("LOHA", "low-rank but this version has no reader.*save_as_lora"),
        ("OFT", "multiplies.*LORA, ADALORA, VERA, PVERA"),
        ("FourierFT", "full rank.*save_as_lora"),
        ("HIRA", "depends on the base.*save_as_lora"),
        ("PROMPT_TUNING", "adds prompts"),
        ("XLORA", "routing"),
        ("NEXT_BIG_THING", "does not know.*LORA"),
    ],
)
def test_other_types_are_refused_with_the_reason(tmp_path: Path, kind: str, message: str) -> None:
    with pytest.raises(UnsupportedError, match=rf'adapter_config.json: peft_type = "{kind}": .*{message}'):
        load(zoo.simple(tmp_path / "a", peft_type=kind))


def test_every_type_that_peft_knows_is_read_or_explained() -> None:
    from peft import PeftType

    from coremerge.formats import DIALECTS
    from coremerge.formats.config import _REASONS

    read = {kind for dialect in DIALECTS for kind in dialect.TYPES}
    unexplained = {kind.value for kind in PeftType} - read - set(_REASONS)
    assert unexplained <= {"ADAMSS", "BEFT", "FROD", "LILY", "SHADOW", "SUPERTUNING"}


KEYS = ["r", "lora_alpha", "peft_type", "rank_pattern", "alpha_pattern", "use_rslora", "bias", "modules_to_save",
        "init_lora_weights", "layer_replication", "auto_mapping", "task_type", "use_dora", "fan_in_fan_out",
        "trainable_token_indices", "base_model_name_or_path", "revision", "init_r", "projection_prng_key"]  # fmt: skip
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
VALUES = st.recursive(
    SCALARS, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=6), v, max_size=3), max_leaves=6
)
FUZZ = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@FUZZ
@given(st.dictionaries(st.sampled_from(KEYS), VALUES | st.sampled_from(["LORA", "VeRA", "adalora", 2])))
def test_any_config_is_read_or_refused(tmp_path: Path, config: dict[str, Any]) -> None:
    folder = tmp_path / "a"
    if not folder.exists():
        zoo.simple(folder)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, **config}))
    try:
        assert len(load(folder)) == 2
    except CoremergeError as error:
        assert "a/adapter_" in str(error)


@FUZZ
@given(st.data())
def test_any_damage_to_the_text_is_read_or_refused(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "adapter_config.json"
    text = json.dumps({"peft_type": "LORA", "r": 2, "rank_pattern": {"q": 1}, "modules_to_save": None})
    start = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(start, len(text)))
    path.write_bytes((text[:start] + data.draw(st.text(max_size=5)) + text[end:]).encode(errors="surrogatepass"))
    try:
        assert isinstance(read_config(path), Config)
    except CoremergeError as error:
        assert str(path) in str(error)
