"""What is measured of a stored adapter: its scores beside the bare base's, its norm and its null-space ratio."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from prompting import Prompter, Question, collate
from splits import Splits

from coremerge import Adapter
from coremerge.evaluation import Evaluator, Scores, TaskSet
from coremerge.formats import load

sys.path.append(str(Path(__file__).parents[1]))  # what all examples do alike
from trained import mean_ratios, own_ratios

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
    questions = [Question(prompter.question(fields).prompt, []) for fields in splits["unlabelled"][:RATIO_ROWS]]
    batch = collate(questions, prompter.tokenizer.pad_token_id)
    prompts = [{"input_ids": batch.ids, "attention_mask": batch.mask}]
    ratios = mean_ratios(own_ratios(evaluator.encoder.model, adapter, prompts))
    return scores | {"mean_frobenius_norm": mean_norm(adapter), "null_space_ratio": ratios}


def _said(scores: Scores, name: str, metric: str) -> dict[str, float]:
    return {metric: round(scores.raw[name], 4), "log_likelihood": round(scores.log_likelihood[name], 3)}


def mean_norm(adapter: Adapter) -> float:
    """The mean Frobenius norm of the updates, over modules."""
    norms = [float(adapter.read(name).norm()) for name in adapter]
    return round(sum(norms) / len(norms), 4)
