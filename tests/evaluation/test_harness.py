"""Tasks of a language model, through lm-eval, without a network."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from coremerge.errors import ConfigError, MissingExtraError
from coremerge.evaluation import Evaluation, Evaluator, evaluate, read_taskset
from families import make_adapter, make_model
from made import jsonl, make_tokenizer

pytest.importorskip("lm_eval")
CHOICES = ["w7", "w9", "w11"]
ROWS = [{"text": f"w{i} w{i + 1}", "label": i % 3} for i in range(1, 13)]
OTHERS = [{"text": f"w{2 * i}", "label": (i + 1) % 3} for i in range(1, 12)]
TEMPLATE = (
    "{% for m in messages %}<turn> {{ m['role'] }} {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}<turn> assistant {% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama, one adapter of its own and one other, and a task of three choices."""
    folder = tmp_path_factory.mktemp("language")
    make_model("llama").save_pretrained(folder / "base")
    make_tokenizer(chat_template=TEMPLATE).save_pretrained(folder / "base")
    for seed, name in enumerate(("own", "other"), 1):
        make_adapter("llama", folder / name, seed)
    files = {"test": str(jsonl(folder / "rows.jsonl", *ROWS)), "held": str(jsonl(folder / "others.jsonl", *OTHERS))}
    harness = {
        "task": "tiny_choice", "dataset_path": "json", "dataset_kwargs": {"data_files": files},
        "test_split": "test", "validation_split": "held", "output_type": "multiple_choice",
        "doc_to_text": "{{text}}", "doc_to_choice": CHOICES, "doc_to_target": "label",
        "metric_list": [{"metric": "acc"}],
    }  # fmt: skip
    (folder / "tiny_choice.yaml").write_text(yaml.safe_dump(harness))
    del harness["test_split"]
    (folder / "no_test.yaml").write_text(yaml.safe_dump(harness | {"task": "tiny_no_test"}))
    write_tasks(folder)
    return folder


def write_tasks(folder: Path, **changes: Any) -> Path:
    task = {"kind": "lm-eval", "harness": "tiny_choice", "metric": "acc", "adapter": "own"} | changes
    path = folder / f"tasks{'-'.join(changes)}.yaml"
    path.write_text(yaml.safe_dump({"name": "language", "base": {"path": "base"}, "tasks": {"choice": task}}))
    return path


def scored(folder: Path, tasks: Path, *names: str, **settings: Any) -> Evaluation:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the harness and its libraries
        return evaluate([folder / name for name in names], tasks, **settings)


def accuracy_of(folder: Path, adapter: str | None, rows: Sequence[Any] = ROWS, form: str = "{}") -> float:
    """By hand: the choice whose token the model finds likeliest."""
    from peft import PeftModel

    model, tokenizer = make_model("llama"), make_tokenizer()
    if adapter:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT's own
            model = PeftModel.from_pretrained(model, folder / adapter).eval()
    choices = torch.tensor(tokenizer.convert_tokens_to_ids(CHOICES))
    right = 0
    for row in rows:
        with torch.no_grad():
            logits = model(**tokenizer(form.format(row["text"]), return_tensors="pt")).logits[0, -1]
        right += int(logits[choices].argmax()) == row["label"]
    return right / len(rows)


def test_scores_are_those_of_the_adapted_model(folder: Path) -> None:
    result = scored(folder, write_tasks(folder), "other")
    assert result["other"].scores.raw["choice"] == pytest.approx(accuracy_of(folder, "other"))
    assert result["no adapter"].scores.raw["choice"] == pytest.approx(accuracy_of(folder, None))
    own = accuracy_of(folder, "own")
    assert result["other"].scores.normalised["choice"] == pytest.approx(accuracy_of(folder, "other") / own)
    low, high = result["other"].scores.intervals["choice"]
    assert low < result["other"].scores.raw["choice"] < high
    assert result.counts == {"choice": None}


def test_validation_rows_are_not_test_rows(folder: Path) -> None:
    held = scored(folder, write_tasks(folder), "other", split="validation")
    assert held["other"].scores.raw["choice"] == pytest.approx(accuracy_of(folder, "other", OTHERS))
    changed = write_tasks(folder, split={"test": "held", "validation": "test"})
    assert scored(folder, changed, "other")["other"].scores.raw["choice"] == held["other"].scores.raw["choice"]
    evaluator = Evaluator(read_taskset(write_tasks(folder)), {})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the harness and its libraries
        found = [evaluator.score({}, split).raw["choice"] for split in ("test", "validation") * 2]  # type: ignore[arg-type]
    assert found == pytest.approx([accuracy_of(folder, None, rows) for rows in (ROWS, OTHERS) * 2])


@pytest.mark.parametrize(
    ("changes", "split", "message"),
    [
        ({"harness": "tiny_no_test"}, "test", r"tasks\.choice\.split = .*tiny_no_test has no rows for test. Say which"),
        (
            {"split": {"validation": "nowhere"}},
            "validation",
            "has no rows for validation of its own: nowhere.*held, test",
        ),
        ({"split": {"validation": "test"}}, "validation", "has no rows for validation of its own: test"),
    ],
)
def test_a_task_without_rows_of_a_split_is_refused(
    folder: Path, changes: dict[str, Any], split: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        scored(folder, write_tasks(folder, **changes), "other", split=split)


def test_rows_may_be_chats(folder: Path) -> None:
    tasks = write_tasks(folder, chat=True, system="w5", fewshot=0)
    form = "<turn> system w5 <turn> user {} <turn> assistant "
    assert scored(folder, tasks, "other")["other"].scores.raw["choice"] == pytest.approx(
        accuracy_of(folder, "other", ROWS, form)
    )
    tasks.write_text(tasks.read_text() + "batch: 3\n")
    assert scored(folder, tasks, "other")["other"].scores.raw["choice"] == pytest.approx(
        accuracy_of(folder, "other", ROWS, form)
    )


def test_an_unknown_task_or_metric_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"no such task.*lm-eval ls tasks"):
        scored(folder, write_tasks(folder, harness="nowhere"), "other")
    with pytest.raises(ConfigError, match=r"no such metric.*Take one of acc,none"):
        scored(folder, write_tasks(folder, metric="bleu"), "other")


def test_without_lm_eval_the_extra_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(MissingExtraError, match=r"pip install .*\[lm-eval\]"):
        scored(folder, write_tasks(folder), "other")
