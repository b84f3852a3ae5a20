"""What adapters answer, against a model with the update in its weights that answers a row at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from coremerge import Adapter
from coremerge.adapter import Info
from coremerge.errors import UnsupportedError
from coremerge.language import answers
from coremerge.learning import answered_batches, fit
from coremerge.learning.backbone import TOKEN_MASK, Batch
from coremerge.learning.data import make_batches
from coremerge.learning.examples import read_examples
from coremerge.learning.files import load_model
from coremerge.learning.own_answers import _with, answering
from coremerge.learning.processor import load_processor
from coremerge.learning.rows import Example, Message
from coremerge.learning.speech import Speech, speech_of
from coremerge.lowrank import LowRank
from speakers import make_speaker, rows_for, slow_answer, write_rows

MOST = 5
FORMS = [("llama", "text"), ("llama", "messages"), ("t5", "text"), ("llava", "messages"), ("whisper", "audio")]
ENDS = (".q", ".v", "q_proj", "v_proj")


def adapter_of(model: torch.nn.Module, task_type: str | None = "CAUSAL_LM", seed: int = 3) -> Adapter:
    """Of the decoder's queries and values, large enough that answers are others."""
    torch.manual_seed(seed)
    linear = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n.endswith(ENDS)}
    decoder = {n: m for n, m in linear.items() if "encoder" not in n and "vision" not in n}
    updates = {n: LowRank(torch.randn(m.out_features, 2), torch.randn(2, m.in_features)) for n, m in decoder.items()}
    return Adapter.from_updates(updates, info=Info(task_type=task_type))


def examples_of(family: str, form: str, folder: Path) -> list[Example]:
    rows = rows_for(family, folder)
    for row in rows:
        if form == "text":
            row["text"] = row.pop("words")
        elif form == "messages":
            row["messages"] = [{"role": "user", "content": row.pop("words")}]
    return read_examples(write_rows(folder / "rows.jsonl", rows))


def said_in(batch: Batch, prompt: Batch, speech: Speech) -> Iterator[tuple[dict[str, Any], list[int], list[bool]]]:
    """Of each row: the inputs before its answer, the answer but for its last token, and what counts from there on."""
    if speech.paired:
        first, starts, mask = "decoder_input_ids", [len(speech.start)] * len(batch["decoder_input_ids"]), None
    else:
        first, starts = "input_ids", prompt["attention_mask"].sum(1).tolist()
        mask = batch.get(TOKEN_MASK)
    present = batch["decoder_attention_mask" if speech.paired else "attention_mask"]
    for row, start in enumerate(starts):
        end = int(present[row].sum())
        inputs = {key: value[row : row + 1] for key, value in prompt.items() if key != TOKEN_MASK}
        if speech.paired:
            inputs["decoder_input_ids"] = torch.tensor([speech.start])
        else:
            inputs = {k: v[:, :start] if v.shape == prompt[first][:1].shape else v for k, v in inputs.items()}
        counts = [] if mask is None else mask[row, start - 1 :].bool().tolist()
        yield inputs, batch[first][row, start:end].tolist(), counts


@pytest.mark.parametrize(("family", "form"), FORMS)
def test_prompts_have_their_own_adapters_answers_behind_them(tmp_path: Path, family: str, form: str) -> None:
    base, examples = make_speaker(family, tmp_path / "base"), examples_of(family, form, tmp_path)
    model: Any = load_model(base, head=True).eval()
    adapter, processor = adapter_of(model), load_processor(base)
    before, hooks = {k: v.clone() for k, v in model.state_dict().items()}, model.get_output_embeddings()._forward_hooks
    given: dict[str, Any] = {"size": 3}
    found = answered_batches(model, {"a": adapter}, {"a": examples}, processor, most=MOST, **given)["a"]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()) and not hooks
    plain: Any = load_model(base, head=True).eval()
    for name, update in adapter.items():
        with torch.no_grad():
            model.get_submodule(name).weight.add_(update.dense().float())
    speech, others = speech_of(model, processor, examples[0]), 0
    for batch, prompt in zip(found, make_batches(examples, processor, **given), strict=True):
        for inputs, said, counts in said_in(batch, prompt, speech):
            wanted = slow_answer(model, inputs, MOST, speech.stops)
            assert said == (wanted if len(wanted) < MOST else wanted[:-1])
            if counts:
                assert counts == [True] * (len(said) + 1) + [False] * (len(counts) - len(said) - 1)
            others += wanted != slow_answer(plain, inputs, MOST, speech.stops)
    assert others > len(examples) // 2  # it is the adapter that answers


@pytest.mark.parametrize(("family", "form"), [("llama", "text"), ("llava", "text"), ("t5", "text")])
def test_a_prompt_that_is_too_long_keeps_what_asks(tmp_path: Path, family: str, form: str) -> None:
    base, (example, *_) = make_speaker(family, tmp_path / "base"), examples_of(family, form, tmp_path)
    model: Any = load_model(base, head=True).eval()
    processor, long = load_processor(base), replace(example, text="w1 w2 w3 w4 w5 w6 w7")
    given: dict[str, Any] = {"max_length": 4 if family == "t5" else 3, "most": MOST}
    (found,) = answered_batches(model, {"a": adapter_of(model)}, {"a": [long]}, processor, **given)["a"]
    read = getattr(processor, "tokenizer", processor).decode(found["input_ids"][0])
    assert ("w1 w2 w3" in read and "w4" not in read) if family == "t5" else ("w5 w6 w7" in read and "w4 w5" not in read)


@pytest.mark.parametrize(("family", "form"), [("whisper", "audio"), ("gpt2", "text")])
def test_an_answer_ends_where_the_model_has_no_more_positions(tmp_path: Path, family: str, form: str) -> None:
    base, examples = make_speaker(family, tmp_path / "base"), examples_of(family, form, tmp_path)
    model: Any = load_model(base, head=True).eval()
    places = model.config.get_text_config(decoder=True)
    positions = places.max_target_positions if family == "whisper" else places.n_positions
    inner = {"h.0.attn.c_attn": LowRank(torch.zeros(48, 1), torch.zeros(1, 16))}
    adapter = (
        adapter_of(model) if family == "whisper" else Adapter.from_updates(inner, info=Info(task_type="CAUSAL_LM"))
    )
    found = answered_batches(model, {"a": adapter}, {"a": examples}, load_processor(base), most=positions + 9)["a"]
    widths = [batch["decoder_input_ids" if family == "whisper" else "input_ids"].shape[1] for batch in found]
    assert max(widths) == positions


def test_a_mask_that_is_padded_further_does_not_matter(tmp_path: Path) -> None:
    base = make_speaker("llama", tmp_path / "base")
    model, example = load_model(base, head=True), Example(messages=(Message("user", "w1 w2"),))
    speech = speech_of(model, load_processor(base), example)
    (prompt,) = make_batches([example], load_processor(base))
    wide = {key: torch.nn.functional.pad(value, (0, 9)) for key, value in prompt.items()}
    one, other = (_with(batch, [(speech.end,)], speech) for batch in (prompt, wide))
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_what_awaits_no_answer_stays_as_it_is(tmp_path: Path) -> None:
    base = make_speaker("llama", tmp_path / "base")
    model: Any = load_model(base, head=True).eval()
    asked = (Message("user", "w1 w2"),)
    examples = [Example(messages=asked), Example(messages=(*asked, Message("assistant", "w3")))]
    adapters = {"a": adapter_of(model, seed=1), "b": adapter_of(model, "SEQ_CLS"), "c": adapter_of(model)}
    given = {"a": examples, "b": examples[:1], "c": examples[1:]}
    assert answering(adapters, given) == ["a"]
    seen: list[tuple[int, int]] = []
    processor = load_processor(base)
    found = answered_batches(model, adapters, given, processor, most=MOST, progress=lambda *at: seen.append(at))
    assert seen == [(1, 1)]
    for task, rest in {"a": found["a"][:1], "b": found["b"], "c": found["c"]}.items():
        (plain,) = make_batches(given[task][-1:], processor)
        (kept,) = rest
        assert all(torch.equal(kept[key], plain[key]) for key in plain)
    assert found["a"][1]["input_ids"].shape[1] > make_batches(examples[:1], processor)[0]["input_ids"].shape[1]


def test_a_model_without_a_head_does_not_answer(tmp_path: Path) -> None:
    base = make_speaker("llama", tmp_path / "base")
    model = load_model(base).eval()
    with pytest.raises(UnsupportedError, match="no head that gives tokens"):
        answered_batches(model, {"a": adapter_of(model)}, {"a": [Example("w1")]}, load_processor(base))


def test_who_answers_is_told_by_the_config_or_else_by_names() -> None:
    def adapter(name: str, task_type: str | None = None) -> Adapter:
        update = {name: LowRank(torch.ones(2, 1), torch.ones(1, 2))}
        return Adapter.from_updates(update, info=Info(task_type=task_type))

    for name, task_type in (("x", "CAUSAL_LM"), ("x", "SEQ_2_SEQ_LM"), ("model.layers.0.q_proj", None),
                            ("model.decoder.layers.0.q_proj", None), ("decoder.block.0.layer.0.q", None)):  # fmt: skip
        assert answers(adapter(name, task_type))
    for name, task_type in (("model.layers.0.q_proj", "SEQ_CLS"), ("encoder.layer.0.query", None)):
        assert not answers(adapter(name, task_type))


@pytest.mark.parametrize(("family", "form", "ridge"), [("llama", "messages", 0.001), ("t5", "text", 0.1)])
def test_a_fit_to_answers_says_so_and_is_drawn_less_where_prompts_are_read_with_them(
    tmp_path: Path, family: str, form: str, ridge: float
) -> None:
    base = make_speaker(family, tmp_path / "base")
    model: Any = load_model(base, head=True).eval()
    adapters = {name: adapter_of(model, seed=seed) for seed, name in enumerate("ab")}
    given = dict.fromkeys(adapters, examples_of(family, form, tmp_path))
    data = answered_batches(model, adapters, given, load_processor(base), most=MOST)
    report = fit(model, adapters, data, answered=True).report
    assert "14 inputs of 2 tasks, with the adapters' own answers" in report.made
    assert math.isclose(report.ridge, ridge)
    assert math.isclose(fit(model, adapters, data).report.ridge, 0.1)
