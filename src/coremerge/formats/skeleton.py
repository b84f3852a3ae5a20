"""A base model's parameters as its class in transformers has them: names and shapes, and no memory.

Only transformers' own classes; nothing that comes with a model is run.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from coremerge.adapter import Info

_TASKS = {
    "CAUSAL_LM": ("AutoModelForCausalLM", "AutoModelForImageTextToText"),
    "SEQ_2_SEQ_LM": ("AutoModelForSeq2SeqLM", "AutoModelForSpeechSeq2Seq"),
    "SEQ_CLS": ("AutoModelForSequenceClassification",),
    "TOKEN_CLS": ("AutoModelForTokenClassification",),
    "QUESTION_ANS": ("AutoModelForQuestionAnswering",),
    "FEATURE_EXTRACTION": ("AutoModel",),
}


@dataclass(frozen=True)
class Skeleton:
    """What a model's class says of its parameters.

    Attributes:
        shapes: parameter or buffer → shape.
        shared: groups of names of one parameter each: tied weights.
        input: the table of the input embedding.
        output: the weight of the output layer.
    """

    shapes: Mapping[str, tuple[int, ...]]
    shared: tuple[tuple[str, ...], ...]
    input: str | None
    output: str | None


def skeleton(config: Mapping[str, Any], info: Info, names: Iterable[str]) -> Skeleton | None:
    """Of the first class, as the adapter or the base names them, that has most parameters of ``names``.

    None where transformers is not installed, or does not know the model.
    """
    wanted, best = frozenset(names), None
    adapted = (info.auto_mapping or {}).get("base_model_class")
    for made in _built(json.dumps(config, default=str), str(adapted), info.task_type or ""):
        if best is None or len(wanted & made.shapes.keys()) > len(wanted & best.shapes.keys()):
            best = made
    return best


@lru_cache(4)  # a plan is made twice: before the merge and at its end
def _built(text: str, adapted: str, task: str) -> tuple[Skeleton, ...]:
    """Of every class that may be meant."""
    try:
        import transformers

        config = json.loads(text)
        described = transformers.CONFIG_MAPPING[str(config.get("model_type"))].from_dict(config)
        kinds = dict.fromkeys(_classes(transformers, (adapted, *(config.get("architectures") or ())), task, described))
    except Exception:  # not installed, or whatever it makes of a model that it does not know
        return ()
    return tuple(filter(None, (_outline(transformers.logging, kind, described) for kind in kinds)))


def _classes(transformers: Any, given: Iterable[Any], task: str, config: Any) -> Iterator[Any]:
    for name in given:
        kind = getattr(transformers, name, None) if isinstance(name, str) else None
        if is_model(kind, transformers):
            yield kind
    for auto in _TASKS.get(task, ("AutoModelForCausalLM",)):
        kind = getattr(transformers, auto)._model_mapping.get(type(config), None)
        yield from kind if isinstance(kind, tuple) else [kind] if kind else []


def is_model(kind: Any, transformers: Any) -> bool:
    """Whether ``kind`` is a class of models; what their base class finds of itself it would keep for all of them."""
    base = transformers.PreTrainedModel
    return isinstance(kind, type) and issubclass(kind, base) and kind is not base


def _outline(logging: Any, kind: Any, config: Any) -> Skeleton | None:
    loud = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings(), torch.device("meta"):
            warnings.simplefilter("ignore")
            model = kind(config)
            model.tie_weights()
            return _described(model)
    except Exception:
        return None
    finally:
        logging.set_verbosity(loud)


def _described(model: Any) -> Skeleton:
    tensors = {**dict(model.named_buffers()), **dict(model.named_parameters(remove_duplicate=False))}
    groups: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        groups.setdefault(id(tensor), []).append(name)
    layers = {id(layer): f"{name}.weight" for name, layer in model.named_modules()}
    return Skeleton(
        {name: tuple(tensor.shape) for name, tensor in tensors.items()},
        tuple(tuple(group) for group in groups.values() if len(group) > 1),
        layers.get(id(_layer(model.get_input_embeddings))),
        layers.get(id(_layer(model.get_output_embeddings))),
    )


def _layer(get: Callable[[], Any]) -> Any:
    try:
        return get()
    except (NotImplementedError, AttributeError):  # a model without such a layer
        return None
