"""Tasks of language models, left to EleutherAI's harness (the extra ``lm-eval``)."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from functools import cached_property, partial
from io import StringIO
from typing import Any, ClassVar, NamedTuple

from coremerge.errors import ConfigError, MissingExtraError
from coremerge.evaluation.encoder import Encoder
from coremerge.evaluation.metrics import Interval
from coremerge.evaluation.scorer import Groups, Scored
from coremerge.evaluation.taskset import HARNESS, Split, Task, TaskSet
from coremerge.installing import install

SEED = 0
BATCH = 8
"""Requests that go through together, unless the task set says more."""
BOOTSTRAP = 200
"""Of metrics whose error has no formula."""


class HarnessScorer:
    """Tasks of the harness: see :class:`~coremerge.evaluation.scorer.Scorer`."""

    language: ClassVar[bool] = True

    def __init__(self, taskset: TaskSet, names: Sequence[str], limits: Mapping[Split, int]) -> None:
        self.taskset, self._limits = taskset, limits
        self._known: dict[tuple[str, Split], list[Any]] = {}

    @cached_property
    def _manager(self) -> Any:
        """What knows the tasks: the folder's own where they are all there, as the harness reads thousands of files."""
        make = partial(_harness().tasks.TaskManager, verbosity="ERROR", include_path=str(self.taskset.folder))
        own = make(include_defaults=False)
        wanted = {task.harness for task in self.taskset.tasks.values() if task.kind == HARNESS}
        return own if wanted <= set(own.all_subtasks) else make()

    def score(
        self, encoder: Encoder, names: Sequence[str], split: Split, *, groups: Groups, intervals: bool
    ) -> dict[str, Scored]:
        """See :class:`~coremerge.evaluation.scorer.Scorer`."""
        found: dict[str, Scored] = {}
        for alike in _alike({name: self.taskset.tasks[name] for name in names}):
            results = self._run(encoder, alike, split)
            found |= {name: Scored(*_score(name, task, results[str(task.harness)])) for name, task in alike.items()}
        return found

    def count(self, encoder: Encoder, name: str, split: Split) -> None:
        """The harness counts."""

    def _run(self, encoder: Encoder, tasks: Mapping[str, Task], split: Split) -> Mapping[str, Any]:
        """Of tasks that are asked alike: the harness's own name → its results."""
        first = next(iter(tasks.values()))
        tokenizer = _tokenizer(encoder)
        if first.chat and not getattr(tokenizer, "chat_template", None):
            raise ConfigError("the base model's tokenizer has no chat template", key=f"tasks.{next(iter(tasks))}.chat")
        with _quiet():
            wanted = [one for name in tasks for one in self._loaded(name, split)]
            batch = self.taskset.batch or BATCH
            model = _harness().models.HFLM(pretrained=encoder.model, tokenizer=tokenizer, batch_size=batch)
            results: Mapping[str, Any] = _harness().evaluate(
                model=model, tasks=wanted, task_manager=self._manager, limit=self._limits.get(split),
                num_fewshot=first.fewshot, apply_chat_template=first.chat, system_instruction=first.system,
                bootstrap_iters=BOOTSTRAP, log_samples=False,
                random_seed=SEED, numpy_random_seed=SEED, torch_random_seed=SEED, fewshot_random_seed=SEED,
            )["results"]  # fmt: skip
        return results

    def _loaded(self, name: str, split: Split) -> list[Any]:
        """The harness's task, or the group of them, that answers on the rows of a split."""
        if (name, split) not in self._known:
            task = self.taskset.tasks[name]
            if task.harness not in self._manager.all_tasks:
                raise ConfigError(
                    "lm-eval has no such task", key="harness", value=task.harness,
                    remedy="See `lm-eval ls tasks`, or put its YAML file beside the task set's",
                )  # fmt: skip
            loaded = self._manager.load([task.harness])
            for one in loaded["tasks"].values():
                _choose_rows(name, task, one, split)
            self._known[name, split] = [*(loaded["groups"].values() or loaded["tasks"].values())]
        return self._known[name, split]


def _alike(tasks: Mapping[str, Task]) -> list[dict[str, Task]]:
    """Tasks in groups of those that are asked in one way: the harness has one for all."""
    found: dict[tuple[Any, ...], dict[str, Task]] = {}
    for name, task in tasks.items():
        found.setdefault((task.fewshot, task.chat, task.system), {})[name] = task
    return list(found.values())


def _choose_rows(name: str, task: Task, loaded: Any, split: Split) -> None:
    """Make a task of the harness answer on the rows of ``split``: it takes validation rows where it has no others.

    Raises:
        ConfigError: it has no such rows.
    """
    own: dict[str, Any] = {key: getattr(loaded.config, f"{key}_split", None) for key in ("validation", "test")}
    wanted, known = (
        {**own, **{str(key): rows for key, rows in task.split.items()}},
        list(getattr(loaded, "dataset", None) or ()),
    )
    chosen, other = wanted[split], wanted["test" if split == "validation" else "validation"]
    if chosen is None or chosen == other or (known and chosen not in known):
        what = f"has no rows for {split}" + ("" if chosen is None else f" of its own: {chosen}")
        raise ConfigError(
            f"lm-eval's {loaded.config.task} {what}", key=f"tasks.{name}.split", value=wanted,
            remedy=f"Say which are which, as split: {{validation: ..., test: ...}}: {', '.join(known) or 'none'}",
        )  # fmt: skip
    loaded.set_config(key="test_split", value=chosen)


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


class _Harness(NamedTuple):
    evaluate: Any
    models: Any
    tasks: Any


def _harness() -> _Harness:
    try:
        import lm_eval
        from lm_eval import tasks
        from lm_eval.models import huggingface
    except ImportError:
        raise MissingExtraError("such tasks need lm-eval", remedy=install("lm-eval")) from None
    return _Harness(lm_eval.simple_evaluate, huggingface, tasks)


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
