"""Merge weights from files: a base model and inputs, each from where people have them."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from coremerge import patterns
from coremerge.adapter import Adapter
from coremerge.devices import check_device
from coremerge.errors import SourceError, UnsupportedError
from coremerge.executors import Executor
from coremerge.formats.source import in_full
from coremerge.learning.backbone import Batch
from coremerge.learning.data import make_batches
from coremerge.learning.examples import read_examples
from coremerge.learning.optional import first_line, optional
from coremerge.learning.own_answers import Progress as Answers
from coremerge.learning.own_answers import answered_batches, answering
from coremerge.learning.processor import base_place, load_processor
from coremerge.learning.result import Weights
from coremerge.learning.rows import Example
from coremerge.learning.weights import Progress, check_names, learn_weights
from coremerge.memory import out_of_memory


def learn_files(
    adapters: Mapping[str, Adapter],
    base: str | Path,
    data: Mapping[str, str | Path | Sequence[Example]],
    *,
    count: int = 64,
    size: int = 16,
    max_length: int | None = None,
    dtype: str = "auto",
    device: str = "cpu",
    seed: int = 0,
    resume: Weights | None = None,
    executor: Executor | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> Weights:
    """Learn merge weights for ``adapters`` on the base model that they were trained on, from files.

    Args:
        adapters: label → adapter: see :func:`coremerge.inputs.read_adapters`.
        base: the base model: a folder or a hub id.
        data: an adapter's label → its unlabelled inputs, or where they are: see
            :func:`coremerge.learning.examples.read_examples`.
        count: inputs drawn for each task.
        size: inputs of a batch.
        max_length: tokens of an input.
        dtype: of the base model: ``"float32"``, ``"bfloat16"``, or the stored one: ``"auto"``; of float16 files on a
            processor, which is slow in it, float32.
        device: ``"cpu"``, ``"cuda"``, or ``"auto"`` to spread the model over what is there.
        seed: of the draw of inputs.
        resume: see :func:`~coremerge.learning.learn_weights`, as are ``executor``, ``progress`` and ``settings``.

    Raises:
        CoremergeError: a refusal that says what to do.
    """
    batches = read_batches(adapters, base, data, count=count, size=size, max_length=max_length, seed=seed)
    settings |= {"seed": seed, "resume": resume, "executor": executor, "progress": progress}
    return learn_weights(loader(base, dtype, device), adapters, batches, **settings)


Batches = dict[str, list[Batch]]


def read_batches(
    adapters: Iterable[str],
    base: str | Path,
    data: Mapping[str, str | Path | Sequence[Example]],
    *,
    count: int = 64,
    size: int = 16,
    max_length: int | None = None,
    seed: int = 0,
) -> Batches:
    """Label → batches for the base model: see :func:`learn_files`."""
    return Inputs(read_inputs(adapters, data, count=count, seed=seed), base, size, max_length).batches()


@dataclass(frozen=True)
class Inputs:
    """What was drawn for each task, and how it becomes batches.

    Attributes:
        examples: label → inputs.
        base: the base model: a folder or a hub id.
        size: inputs of a batch.
        max_length: tokens of an input.
    """

    examples: Mapping[str, Sequence[Example]]
    base: str | Path
    size: int = 16
    max_length: int | None = None

    @cached_property
    def processor(self) -> Any:
        """Of the base model."""
        return load_processor(self.base)

    def batches(self) -> Batches:
        """As they are."""
        return {
            key: make_batches(given, self.processor, size=self.size, max_length=self.max_length)
            for key, given in self.examples.items()
        }

    def answering(self, adapters: Mapping[str, Adapter]) -> list[str]:
        """See :func:`~coremerge.learning.own_answers.answering`; none where the base model gives no text."""
        return answering(adapters, self.examples) if has_head(self.base) else []

    def answered(self, model: nn.Module, adapters: Mapping[str, Adapter], progress: Answers | None = None) -> Batches:
        """See :func:`~coremerge.learning.own_answers.answered_batches`."""
        how: dict[str, Any] = {"size": self.size, "max_length": self.max_length, "progress": progress}
        return answered_batches(model, adapters, self.examples, self.processor, **how)


def read_inputs(
    adapters: Iterable[str], data: Mapping[str, str | Path | Sequence[Example]], *, count: int = 64, seed: int = 0
) -> dict[str, list[Example]]:
    """Label → the inputs that are drawn: see :func:`learn_files`."""
    check_names("data", data, adapters)
    return {key: read_examples(source, count=count, seed=seed) for key, source in data.items()}


def read_config(base: str | Path) -> Any:
    """What a model of ``transformers`` says of itself; None where that cannot be read."""
    from transformers import AutoConfig

    place, where = base_place(base)
    try:
        return AutoConfig.from_pretrained(place, trust_remote_code=False, **where)
    except (OSError, ValueError):
        return None


def loader(
    base: str | Path, dtype: str = "auto", device: str = "cpu", *, head: bool = False
) -> Callable[[], nn.Module]:
    """:func:`load_model`, to be done later or elsewhere: a path is given in full."""
    return partial(load_model, in_full(base), dtype, device, head=head)


def load_model(base: str | Path, dtype: str = "auto", device: str = "cpu", *, head: bool = False) -> nn.Module:
    """The backbone of a model of ``transformers``; with ``head``, together with what makes tokens of its states.

    Its code is that of ``transformers`` (none comes from the model's folder), its weights are safetensors.

    Raises:
        MissingExtraError: transformers is not installed.
        SourceError: it cannot be loaded, or lacks the weights of its head.
    """
    transformers = optional("transformers", "a base model needs")
    config = read_config(base)
    kind = _with_head(config) if head else transformers.AutoModel
    if device not in ("cpu", "auto"):
        check_device(device, torch.float32)
    place, where = base_place(base)
    how = {
        "dtype": running_dtype(config, dtype, device),
        "device_map": None if device == "cpu" else device,
        "use_safetensors": True,
    }
    with load_report() as report:
        try:
            model, said = kind.from_pretrained(place, trust_remote_code=False, output_loading_info=True, **how, **where)
        except (OSError, ValueError, RuntimeError, ImportError, LookupError, TypeError, AttributeError) as error:
            if refusal := out_of_memory(error):
                raise refusal from None
            raise SourceError(
                f"the base model cannot be loaded: {_wrong(report) or first_line(error)}", file=base,
                remedy="Give a model of transformers: its folder, or its hub id",
            ) from None  # fmt: skip
    made_up = {*said["missing_keys"], *(key for key, *_ in said["mismatched_keys"])}
    if head and (tokens := sorted(made_up & _of_head(model))):
        raise SourceError(
            "it lacks the weights of its head, without which a model does not answer", file=base, key=tokens[0],
            remedy="Give the whole model; coremerge fit does without one with --answers none",
        )  # fmt: skip
    if made_up:  # nothing is learned of these, but they run
        names = patterns.listed(dict.fromkeys(made_up, ""))
        logging.getLogger(__name__).warning("%s lacks weights of the model, which are random now: %s", base, names)
    loaded: nn.Module = model
    return loaded


def _of_head(model: Any) -> set[str]:
    """The names of the parameters that make tokens; those that embeddings have, too, are theirs."""
    head = model.get_output_embeddings()
    own = {id(parameter) for parameter in head.parameters()} if head is not None else set()
    return {name for name, parameter in model.named_parameters() if id(parameter) in own}


def has_head(base: str | Path) -> bool:
    """Whether the base model gives text, as far as its config tells: loading says what is wrong with it.

    Adapters whose configs name no task are taken for a language model's by names that other models have, too.
    """
    config = read_config(base)
    return config is None or (not _is_masked(config) and _head_of(config) is not None)


def _with_head(config: Any) -> Any:
    """The class that loads a model which answers with text: an encoder with a decoder, one that sees, or a decoder.

    Raises:
        UnsupportedError: it reads what comes after a word, too, and so the answers that it is asked for.
    """
    import transformers

    if _is_masked(config):
        raise UnsupportedError(
            f"an encoder ({config.model_type}), which fills in words and does not answer", key="base",
            remedy="Give a decoder, or tasks with heads",
        )  # fmt: skip
    return _head_of(config) or transformers.AutoModelForCausalLM


def _is_masked(config: Any) -> bool:
    import transformers

    masked = type(config) in transformers.AutoModelForMaskedLM._model_mapping
    return masked and not getattr(config, "is_encoder_decoder", False) and not getattr(config, "is_decoder", False)


def _head_of(config: Any) -> Any:
    import transformers

    pair = getattr(config, "is_encoder_decoder", False)
    seeing = (transformers.AutoModelForImageTextToText, transformers.AutoModelForCausalLM)
    kinds = (transformers.AutoModelForSeq2SeqLM, transformers.AutoModelForSpeechSeq2Seq) if pair else seeing
    return next((kind for kind in kinds if type(config) in kind._model_mapping), None)


def running_dtype(config: Any, dtype: str = "auto", device: str = "cpu") -> str:
    """What a base model runs in: what was asked for, or the stored dtype; float32 in place of float16 on a processor.

    float32 holds every float16 as it is; bfloat16, faster where a processor multiplies it, would round each.
    """
    stored = str(getattr(config, "dtype", None)).removeprefix("torch.")
    on_processor = device == "cpu" or (device == "auto" and not torch.cuda.is_available())
    return "float32" if dtype == "auto" and stored == "float16" and on_processor else dtype


@contextmanager
def load_report() -> Iterator[list[str]]:
    """No bars, and the lines of what ``transformers`` reports of a load: it draws that for terminals alone."""
    from transformers.utils import logging as bars

    lines: list[str] = []

    def catch(record: logging.LogRecord) -> bool:
        text = record.getMessage()
        lines.extend(_ESCAPES.sub("", text).splitlines() if _REPORT in text else ())
        return _REPORT not in text

    logger, shown = logging.getLogger("transformers.modeling_utils"), bars.is_progress_bar_enabled()
    level = logger.level
    logger.addFilter(catch)
    if not logger.isEnabledFor(logging.WARNING):  # the report is needed, whatever the caller has for transformers
        logger.setLevel(logging.WARNING)
    bars.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield lines
    finally:
        logger.removeFilter(catch)
        logger.setLevel(level)
        if shown:
            bars.enable_progress_bar()  # type: ignore[no-untyped-call]


_REPORT, _ESCAPES = "LOAD REPORT", re.compile(r"\x1b\[[0-9;]*m")


def _wrong(report: Sequence[str]) -> str | None:
    """The first weight of another shape, or that could not be converted."""
    row = next((line.split("|") for line in report if "MISMATCH" in line or "CONVERSION" in line), None)
    return f"{row[0].strip()}: {row[-1].strip()}" if row else None
