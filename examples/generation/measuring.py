"""What is measured of a stored adapter: its scores beside the bare base's, its norm and its null-space ratio."""

from __future__ import annotations

import math
from typing import Any

from prompting import Prompter, Question, collate
from splits import Fields, Splits

from coremerge import Adapter
from coremerge.evaluation import Evaluator, Scores, TaskSet
from coremerge.formats import load
from coremerge.learning.measure import measure_null_space

RATIO_ROWS = 32
"""Unlabelled prompts that the null-space ratios are measured on."""


def measure(taskset: TaskSet, name: str, base: str, prompter: Prompter, splits: Splits) -> dict[str, Any]:
    """Scores of the stored adapter and of the base without it, the adapter's norm, and its null-space ratio."""
    task = taskset.tasks[name]
    adapter = load(taskset.own()[name])
    evaluator = Evaluator(taskset.only([name]), {name: adapter}, base=base)
    scores: dict[str, Any] = {"metric": task.metric}
    for split in ("validation", "test"):
        scores[split] = {"rows": len(splits[split]), "own": _said(evaluator.own(split), name, task.metric)}
    scores["test"]["no_adapter"] = _said(evaluator.score({}, "test"), name, task.metric)
    ratios = null_space(adapter, evaluator.encoder.model, prompter, splits["unlabelled"])
    return scores | {"mean_frobenius_norm": mean_norm(adapter), "null_space_ratio": ratios}


def _said(scores: Scores, name: str, metric: str) -> dict[str, float]:
    return {metric: round(scores.raw[name], 4), "log_likelihood": round(scores.log_likelihood[name], 3)}


def mean_norm(adapter: Adapter) -> float:
    """The mean Frobenius norm of the updates, over modules."""
    norms = [float(adapter.read(name).norm()) for name in adapter]
    return round(sum(norms) / len(norms), 4)


def null_space(adapter: Adapter, model: Any, prompter: Prompter, rows: list[Fields]) -> dict[str, float]:
    """The adapter's mean null-space ratio on its own prompts while it is active, and that of random rows."""
    questions = [Question(prompter.question(fields).prompt, []) for fields in rows[:RATIO_ROWS]]
    batch = collate(questions, prompter.tokenizer.pad_token_id)
    data = {"own": [{"input_ids": batch.ids, "attention_mask": batch.mask}]}
    found = measure_null_space(model, {"own": adapter}, data, weights={"own": 1.0})["own"]["own"]
    random_rows = [math.sqrt(1 - adapter.read(name).rank / adapter.read(name).shape[-1]) for name in found]
    return {
        "own": round(sum(found.values()) / len(found), 4),
        "random": round(sum(random_rows) / len(random_rows), 4),
    }
