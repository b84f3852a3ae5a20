"""Tasks that a language model answers, against a row at a time, all logits and no cache."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from coremerge import load
from coremerge.errors import ConfigError, MissingExtraError, SourceError, UnsupportedError
from coremerge.evaluation import Evaluator, evaluate, read_taskset
from coremerge.evaluation.answering import GenerationScorer, untemplated
from coremerge.evaluation.prompts import read_questions
from coremerge.learning.backbone import NotFiniteError, StoppedError
from coremerge.learning.processor import parts_of
from coremerge.learning.speech import Speech, speech_of
from families import make_adapter, make_model
from speakers import make_speaker, rows_for, slow_answer, slow_log_likelihood, write_rows
from tolerances import SINGLE

FAMILIES = ("llama", "gpt2", "t5", "llava", "whisper")
MOST = 6
PROMPTS: dict[str, dict[str, Any]] = {
    "plain": {"prompt": "w9 {words}"},
    "chat": {"prompt": "w9 {words}", "chat": True, "system": "w8"},
    "sound": {},
}


def forms_of(family: str) -> list[str]:
    return {"whisper": ["sound"], "t5": ["plain"]}.get(family, ["plain", "chat"])


CASES = [(family, form) for family in FAMILIES for form in forms_of(family)]


@pytest.fixture(scope="module")
def speaker(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    @cache
    def made(family: str) -> Path:
        folder = tmp_path_factory.mktemp(family)
        make_speaker(family, folder / "base")
        write_rows(folder / "rows.jsonl", [row | {"answer": "w3"} for row in rows_for(family, folder)])
        return folder

    return made


def taskset(folder: Path, name: str, *answers: str, **task: Any) -> Path:
    """A task of these answers to the rows."""
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    file = f"{name}.jsonl"
    if answers:
        rows = [row | {"answer": answer, "label": answer} for row, answer in zip(rows, answers, strict=False)]
    write_rows(folder / file, rows)
    task = {"kind": "generation", "metric": "exact_match", "test": file, "max_new_tokens": MOST} | task
    (folder / f"{name}.yaml").write_text(
        yaml.safe_dump({"name": name, "base": {"path": "base"}, "tasks": {"task": task}})
    )
    return folder / f"{name}.yaml"


class Slow:
    """The rows of a task one by one."""

    def __init__(self, tasks: Path) -> None:
        self.evaluator = Evaluator(read_taskset(tasks), {})
        self.model: Any = self.evaluator.encoder.model
        self.questions = read_questions(self.evaluator.taskset, "task", "test")
        self.speech: Speech = speech_of(self.model, self.evaluator.encoder.processor, self.questions[0].prompt)

    def inputs(self) -> list[dict[str, Any]]:
        found = []
        for one in self.questions:
            prompt = untemplated(one.prompt, parts_of(self.evaluator.encoder.processor))
            ((_, batch),) = self.evaluator.encoder.placed([prompt])
            inputs = {key: value for key, value in batch.items() if key != "token_mask"}
            if self.speech.paired:
                inputs["decoder_input_ids"] = torch.tensor([self.speech.start])
            found.append(inputs)
        return found

    def said(self) -> list[list[int]]:
        """One token more than an answer may have, where it does not end."""
        return [slow_answer(self.model, inputs, MOST + 1, self.speech.stops) for inputs in self.inputs()]

    def likelihoods(self, answers: list[tuple[int, ...]]) -> list[float]:
        pairs = zip(self.inputs(), answers, strict=True)
        return [slow_log_likelihood(self.model, inputs, answer) for inputs, answer in pairs]


@pytest.mark.parametrize(("family", "form"), CASES)
def test_answers_and_likelihoods_are_those_of_a_row_alone(
    speaker: Callable[[str], Path], family: str, form: str
) -> None:
    folder = speaker(family)
    slow = Slow(taskset(folder, f"{form}0", **PROMPTS[form]))
    said = slow.said()
    texts = [slow.speech.text(answer[:MOST]) for answer in said]
    assert len(set(texts)) > 1
    answers = [text if at % 2 and len(text) else "w3 w4" for at, text in enumerate(texts)]
    tasks = taskset(folder, f"{form}1", *answers, **PROMPTS[form])
    scores = Evaluator(read_taskset(tasks), {}).score({}, "test", intervals=True)
    tokens = [slow.speech.tokens(answer) for answer in answers]
    right = [answer == (*found, slow.speech.end) for answer, found in zip(tokens, said, strict=True)]
    assert scores.raw["task"] == pytest.approx(np.mean(right))
    low, high = scores.intervals["task"]
    assert low <= scores.raw["task"] <= high
    assert scores.log_likelihood["task"] == pytest.approx(np.mean(slow.likelihoods(tokens)), abs=SINGLE * 100)
    written = taskset(folder, f"{form}2", *answers, **PROMPTS[form], metric="rouge_l")
    assert Evaluator(read_taskset(written), {}).score({}, "test").raw["task"] >= np.mean(
        [answer == text for answer, text in zip(answers, texts, strict=True)]
    )


@pytest.mark.parametrize(("family", "form"), CASES)
def test_the_likeliest_choice_is_that_of_a_row_alone(speaker: Callable[[str], Path], family: str, form: str) -> None:
    folder = speaker(family)
    for name, choices in {"one": ["w3", "w4", "w5"], "two": ["w3", "w4 w5", "w4 w6"], "in": ["w3", "w3 w4"]}.items():
        labels = [choices[i % len(choices)] for i in range(7)]
        more = {"kind": "choice", "metric": "accuracy", "choices": choices}
        slow = Slow(taskset(folder, f"{form}{name}", *labels, **PROMPTS[form] | more))
        ended = name == "in"
        tokens = [slow.speech.tokens(choice, ended=ended) for choice in choices]
        logs = np.array([slow.likelihoods([one] * 7) for one in tokens]).T
        scores = slow.evaluator.score({}, "test", intervals=True)
        wanted = np.array([choices.index(label) for label in labels])
        assert scores.raw["task"] == pytest.approx((logs.argmax(1) == wanted).mean())
        assert scores.log_likelihood["task"] == pytest.approx(logs[np.arange(7), wanted].mean(), abs=SINGLE * 100)
        assert not math.isnan(scores.intervals["task"][0])


def test_a_base_in_bfloat16_is_run_in_it(speaker: Callable[[str], Path]) -> None:
    tasks = taskset(speaker("llama"), "half", **PROMPTS["chat"])
    single = Evaluator(read_taskset(tasks), {}).score({}, "test").log_likelihood["task"]
    tasks.write_text(tasks.read_text() + "dtype: bfloat16\n")
    evaluator = Evaluator(read_taskset(tasks), {})
    assert next(evaluator.encoder.model.parameters()).dtype == torch.bfloat16
    assert evaluator.score({}, "test").log_likelihood["task"] == pytest.approx(single, rel=0.05)


def test_a_prompt_without_a_token_is_refused(speaker: Callable[[str], Path]) -> None:
    folder = speaker("llama")
    (folder / "empty.jsonl").write_text('{"words": "w3", "answer": "w4"}\n{"words": "", "answer": "w4"}\n')
    tasks = taskset(folder, "none", prompt="{words}", test="empty.jsonl")
    with pytest.raises(ConfigError, match="line 2: a prompt without a token"):
        Evaluator(read_taskset(tasks), {}).score({}, "test")


def test_answers_beyond_a_models_positions_stop_with_its_own_words(speaker: Callable[[str], Path]) -> None:
    tasks = taskset(speaker("whisper"), "long", metric="rouge_l", max_new_tokens=500)
    with pytest.raises(StoppedError, match="on the inputs of task the base model stops here with"):
        Evaluator(read_taskset(tasks), {}).score({}, "test")


def test_choices_of_the_same_tokens_are_refused(speaker: Callable[[str], Path]) -> None:
    more = {"kind": "choice", "metric": "accuracy", "choices": ["Paris", "Rome"]}  # words that the vocabulary lacks
    tasks = taskset(speaker("llama"), "same", *["Rome"] * 7, **PROMPTS["plain"] | more)
    with pytest.raises(ConfigError, match="two choices are the same tokens"):
        Evaluator(read_taskset(tasks), {}).score({}, "test")


@pytest.mark.parametrize("more", [{}, {"kind": "choice", "metric": "accuracy", "choices": ["w3", "w4"]}])
def test_a_model_of_no_numbers_has_no_score(speaker: Callable[[str], Path], more: dict[str, Any]) -> None:
    tasks = taskset(speaker("llama"), "nan", *["w3"] * 7, **PROMPTS["plain"] | more)
    evaluator = Evaluator(read_taskset(tasks), {})
    next(evaluator.encoder.model.parameters()).fill_(math.nan)
    with pytest.raises(NotFiniteError, match="on the inputs of task the base model's numbers are not finite"):
        evaluator.score({}, "test")


def test_an_encoder_does_not_answer(speaker: Callable[[str], Path], tmp_path: Path) -> None:
    """It would see the answer that it is asked for."""
    tasks = taskset(speaker("llama"), "encoder", **PROMPTS["plain"])
    make_model("bert").save_pretrained(tmp_path)
    with pytest.raises(UnsupportedError, match=r"an encoder \(bert\)"):
        Evaluator(read_taskset(tasks), {}, base=tmp_path)


def test_a_heads_weights_are_not_copied_for_each_row(speaker: Callable[[str], Path]) -> None:
    """As PyTorch does where positions are not contiguous: seconds for a vocabulary of 49,152."""
    tasks = taskset(speaker("llama"), "pieces", **PROMPTS["plain"], metric="rouge_l")
    evaluator = Evaluator(read_taskset(tasks), {})
    seen = []
    head = evaluator.encoder.model.get_output_embeddings()
    head.register_forward_hook(lambda module, args, output: seen.append(args[0].is_contiguous()))
    evaluator.score({}, "test")
    assert len(seen) > 2 and all(seen)


def test_adapters_and_their_shares(speaker: Callable[[str], Path]) -> None:
    folder = speaker("llama")
    for seed, name in enumerate(("own", "other"), 1):
        make_adapter("llama", folder / name, seed)
    tasks = taskset(folder, "shares", *["w3 w4"] * 7, **PROMPTS["plain"], metric="log_likelihood", adapter="own")
    result = evaluate([folder / "own", folder / "other"], tasks)
    own, other = result["own"].scores, result["other"].scores
    assert own.normalised["task"] == 1.0 and result.counts == {"task": 7}
    assert own.raw["task"] == own.log_likelihood["task"] < 0
    perplexity = {name: math.exp(-scores.raw["task"] / 3) for name, scores in (("own", own), ("other", other))}
    assert other.normalised["task"] == pytest.approx(perplexity["own"] / perplexity["other"])
    low, high = other.intervals["task"]
    assert other.margin == pytest.approx((high - low) / 2 / 3 * other.normalised["task"])
    json.dumps(result.to_dict(), allow_nan=False)
    assert result.to_dict()["rows"][-1]["log_likelihood"] == {"task": other.raw["task"]}
    assert load(folder / "own")


def test_a_prompt_is_not_cut(speaker: Callable[[str], Path]) -> None:
    folder = speaker("llama")
    tasks = taskset(folder, "long", **PROMPTS["chat"])
    tasks.write_text(tasks.read_text() + "max_length: 14\n")
    with pytest.raises(ConfigError, match=r"long\.jsonl, line 4: a prompt of 15 tokens, and 14 are the most.*raise"):
        Evaluator(read_taskset(tasks), {}).score({}, "test")


def test_an_image_takes_nothing_of_a_prompts_length(speaker: Callable[[str], Path]) -> None:
    tasks = taskset(speaker("llava"), "pictured", **PROMPTS["plain"])
    tasks.write_text(tasks.read_text() + "max_length: 6\n")
    assert Evaluator(read_taskset(tasks), {}).count("task", "test") == 7


def test_an_answer_that_is_too_long_is_refused(speaker: Callable[[str], Path]) -> None:
    folder = speaker("llama")
    tasks = taskset(folder, "wordy", "w3", "w3 " * 7, **PROMPTS["plain"])
    with pytest.raises(ConfigError, match=r"line 2: answer = .*7 tokens, and max_new_tokens is 6. Raise it"):
        Evaluator(read_taskset(tasks), {}).score({}, "test")
    written = taskset(folder, "written", "w3", "w3 " * 7, **PROMPTS["plain"], metric="chrf")
    assert 0 <= Evaluator(read_taskset(written), {}).score({}, "test").raw["task"] <= 1


def test_what_a_metric_needs_is_asked_for_before_any_work(
    speaker: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "sacrebleu.metrics.chrf", None)
    monkeypatch.setitem(__import__("sys").modules, "rouge_score", None)
    for metric, package in (("chrf", "sacrebleu"), ("rouge_l", "rouge-score")):
        tasks = read_taskset(taskset(speaker("llama"), metric, **PROMPTS["plain"], metric=metric))
        with pytest.raises(MissingExtraError, match=rf"{package}.*\[evaluate\]"):
            GenerationScorer(tasks, ["task"], {})


def test_a_missing_image_is_named(speaker: Callable[[str], Path]) -> None:
    folder = speaker("llava")
    tasks = taskset(folder, "gone", **PROMPTS["plain"])
    write_rows(folder / "gone.jsonl", [{"words": "w1", "image": "nowhere.png", "answer": "w3"}])
    with pytest.raises(SourceError, match=r"gone\.jsonl, line 1: image = .*nowhere\.png.*no such image"):
        Evaluator(read_taskset(tasks), {}).score({}, "test")
