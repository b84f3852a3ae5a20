"""Parameters by a model's class: names and shapes, whatever the class does."""

import sys

import pytest
import transformers

from coremerge.adapter import Info
from coremerge.formats.skeleton import skeleton

LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 40, "hidden_size": 16,
    "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "tie_word_embeddings": True,
}  # fmt: skip
TABLE = "model.embed_tokens.weight"


def test_names_shapes_and_what_is_one():
    made = skeleton(LLAMA, Info(), [TABLE])
    assert made.shapes[TABLE] == made.shapes["lm_head.weight"] == (40, 16)
    assert [set(group) for group in made.shared] == [{TABLE, "lm_head.weight"}]
    assert (made.input, made.output) == (TABLE, "lm_head.weight")
    assert skeleton(LLAMA | {"tie_word_embeddings": False}, Info(), [TABLE]).shared == ()


@pytest.mark.parametrize(
    ("info", "names"),
    [
        (Info(task_type="SEQ_CLS"), ["score.weight", TABLE]),
        (Info(auto_mapping={"base_model_class": "LlamaForTokenClassification"}), ["score.weight", TABLE]),
        (Info(task_type="FEATURE_EXTRACTION"), ["embed_tokens.weight"]),
    ],
)
def test_the_class_that_has_the_adapters_names(info, names):
    made = skeleton(LLAMA, info, names)
    assert made.output is None and made.shared == () and made.shapes.keys() >= {*names}


def test_a_config_that_names_no_class():
    assert skeleton(LLAMA | {"architectures": None}, Info(), [TABLE]).output == "lm_head.weight"


@pytest.mark.parametrize("config", [{}, {"model_type": "nobody-knows"}, LLAMA | {"num_attention_heads": 0}])
def test_a_model_that_transformers_does_not_take_is_unknown(config):
    assert skeleton(config, Info(), [TABLE]) is None


def test_without_transformers_every_model_is(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert skeleton(LLAMA, Info(), [TABLE]) is None


def test_a_class_that_raises_is_passed_over(monkeypatch):
    def fail(*_):
        raise RuntimeError("a model's own")

    loud = transformers.logging.get_verbosity()
    monkeypatch.setattr(transformers.LlamaForCausalLM, "__init__", fail)
    assert skeleton(LLAMA, Info(), [TABLE]) is None
    assert transformers.logging.get_verbosity() == loud


def test_the_class_of_all_models_is_not_made():
    assert skeleton(dict(LLAMA, architectures=["PreTrainedModel"]), Info(), [TABLE])
    assert "_can_set_experts_implementation_cached_value" not in vars(transformers.PreTrainedModel)
