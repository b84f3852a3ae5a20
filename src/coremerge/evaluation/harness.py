"""Tasks of language models, left to EleutherAI's harness (the extra ``lm-eval``)."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any, ClassVar

from coremerge.errors import ConfigError, MissingExtraError
from coremerge.evaluation.encoder import Encoder
from coremerge.evaluation.metrics import Interval
from coremerge.evaluation.scorer import Groups, Scored
from coremerge.evaluation.taskset import Split, Task, TaskSet
from coremerge.installing import install

SEED = 0
BOOTSTRAP = 200
"""Of metrics whose error has no formula."""


class HarnessScorer:
    """Tasks of the harness: see :class:`~coremerge.evaluation.scorer.Scorer`."""

    language: ClassVar[bool] = True

    def __init__(self, taskset: TaskSet, names: Sequence[str], limits: Mapping[Split, int]) -> None:
        self.taskset, self._limits = taskset, limits

    def score(
        self, encoder: Encoder, names: Sequence[str], split: Split, *, groups: Groups, intervals: bool
    ) -> dict[str, Scored]:
        """See :class:`~coremerge.evaluation.scorer.Scorer`."""
        tasks = {name: self.taskset.tasks[name] for name in names}
        found = run(encoder, tasks, self.taskset.folder, self._limits.get(split))
        return {name: Scored(*one) for name, one in found.items()}

    def count(self, encoder: Encoder, name: str, split: Split) -> None:
        """The harness counts."""


def run(
    encoder: Encoder, tasks: Mapping[str, Task], folder: Path, limit: int | None = None
) -> dict[str, tuple[float, Interval]]:
    """Score and 95 % interval of each task, under the weights of the moment.

    Args:
        encoder: with a causal language model.
        tasks: name → a task of the kind ``lm-eval``.
        folder: where YAML files of tasks of one's own lie.
        limit: of documents a task.

    Raises:
        MissingExtraError: lm-eval is not installed.
        ConfigError: the harness has no such task, or it gives no such metric.
    """
    lm_eval, models, manager = _harness()
    wanted = [str(task.harness) for task in tasks.values()]
    known = manager.TaskManager(verbosity="ERROR", include_path=str(folder))
    for name in wanted:
        if name not in known.all_tasks:
            raise ConfigError(
                "lm-eval has no such task", key="harness", value=name,
                remedy="See `lm-eval ls tasks`, or put its YAML file beside the task set's",
            )  # fmt: skip
    with _quiet():
        model = models.HFLM(pretrained=encoder.model, tokenizer=_tokenizer(encoder), batch_size=8)
        results = lm_eval.simple_evaluate(
            model=model, tasks=wanted, task_manager=known, limit=limit, bootstrap_iters=BOOTSTRAP, log_samples=False,
            random_seed=SEED, numpy_random_seed=SEED, torch_random_seed=SEED, fewshot_random_seed=SEED,
        )["results"]  # fmt: skip
    return {name: _score(name, task, results[str(task.harness)]) for name, task in tasks.items()}


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the harness's remarks on how it was called, and without its bars where stderr is no terminal."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with nullcontext() if sys.stderr.isatty() else redirect_stderr(StringIO()):
            yield
    finally:
        logger.setLevel(level)


def _harness() -> Any:
    try:
        import lm_eval
        from lm_eval import tasks
        from lm_eval.models import huggingface
    except ImportError:
        raise MissingExtraError("such tasks need lm-eval", remedy=install("lm-eval")) from None
    return lm_eval, huggingface, tasks


def _tokenizer(encoder: Encoder) -> Any:
    return getattr(encoder.processor, "tokenizer", encoder.processor)


def _score(name: str, task: Task, result: Mapping[str, Any]) -> tuple[float, Interval]:
    """The harness names a metric with the filter of its answers behind a comma."""
    key = task.metric if "," in task.metric else f"{task.metric},none"
    if key not in result:
        known = [known for known in result if "," in known and "_stderr" not in known]
        raise ConfigError(
            "lm-eval gives no such metric", key=f"tasks.{name}.metric", value=task.metric,
            remedy=f"Take one of {', '.join(known)}",
        )  # fmt: skip
    score, error = float(result[key]), result.get(key.replace(",", "_stderr,"))
    half = 1.959964 * float(error) if isinstance(error, float) else float("nan")
    return score, (score - half, score + half)
