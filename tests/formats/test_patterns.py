"""rank_pattern and alpha_pattern follow PEFT's own rule."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key

from coremerge.errors import ConfigError
from coremerge.formats.config import Config, as_integer
from coremerge.formats.patterns import Patterns

NAMES = ["q_proj", "model.layers.0.self_attn.q_proj", "model.layers.10.self_attn.q_proj", "model.layers.1.mlp.up_proj",
         "modelXlayers.0.q_proj", "aq_proj", "model.q_projx", "visual.blocks.3.attn.qkv", "lm-head"]  # fmt: skip
KEYS = ["q_proj", "layers.0.self_attn.q_proj", "model.layers.0.q_proj", r"layers\.\d+\.self_attn\.(q|k)_proj",
        "^model.layers.0.self_attn.q_proj", ".*_proj", r"layers\.[01]\..*", "up_proj|qkv", "", "model..*", "lm-head",
        r"(?:self_)?attn\.q_proj", r".*\.layers\.(\d+)\..*", "(?!.*mlp).*proj", "attn.qkv$"]  # fmt: skip


def patterns(table: dict[str, object]) -> Patterns[int]:
    return Patterns(Config(Path("adapter_config.json"), {"rank_pattern": table}), "rank_pattern", as_integer)


@settings(deadline=None)
@given(st.lists(st.sampled_from(KEYS), unique=True))
def test_the_first_match_in_the_files_order_as_peft(keys: list[str]) -> None:
    table: dict[str, object] = {key: index for index, key in enumerate(keys)}
    mine = patterns(table)
    for name in NAMES:
        assert mine.get(name, -1) == table.get(get_pattern_key(list(table), name), -1), (name, keys)


@settings(deadline=None)
@given(st.text("ab.-_1", max_size=6), st.text("ab.-_1", min_size=1, max_size=10))
def test_plain_keys_as_peft(key: str, name: str) -> None:
    table: dict[str, object] = {key: 1}
    assert patterns(table).get(name, 0) == (get_pattern_key([key], name) == key and (key != name or 1))


@pytest.mark.parametrize(
    "key",
    [r"(\w+)+x", "(a+)*b", "(a|aa)+b", "(?:a?)*b", "((a)+)+", r"(.*a){12}", r".*.*.*.*.*.*x", "a?" * 30 + "a" * 30,
     "(a|a)" * 40, "^" + "x" * 2000, "[", "(", "*", r"(?i)q_proj", "a{4294967296}"],
)  # fmt: skip
def test_expressions_that_are_wrong_or_could_take_forever(key: str) -> None:
    started = time.monotonic()
    with pytest.raises(ConfigError, match="the key ") as refused:
        patterns({key: 3})
    assert time.monotonic() - started < 1
    assert refused.value.key == f"rank_pattern.{key}" and refused.value.value == 3 and refused.value.remedy


@settings(deadline=2000)
@given(st.text(r"ab.*+?(){}[]|\^$1,", max_size=24))
def test_whatever_is_accepted_is_fast(key: str) -> None:
    try:
        made = patterns({key: 1})
    except ConfigError:
        return
    made.get("a" * 60 + ".b.c" * 10, 0)
