"""From files to merge weights: adapters, a base model and inputs, each from where people have them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from coremerge.errors import ConfigError, MissingExtraError, SourceError
from coremerge.learning.data import base_place, load_processor, make_batches, read_examples
from coremerge.learning.result import Weights
from coremerge.learning.weights import Progress, learn_weights
from coremerge.pipeline import read_adapters


def learn_files(
    sources: Sequence[str | Path],
    base: str | Path,
    data: Mapping[str, str | Path],
    *,
    count: int = 64,
    size: int = 16,
    max_length: int | None = None,
    dtype: str = "auto",
    device: str = "cpu",
    seed: int = 0,
    allow_pickle: bool = False,
    vera_width: int | None = None,
    initial: Mapping[str, str | Path] | None = None,
    resume: Weights | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> Weights:
    """Learn merge weights for the adapters in ``sources`` on the base model that they were trained on.

    Args:
        sources: folders, files or hub ids: see :func:`coremerge.load`.
        base: the base model: a folder or a hub id.
        data: an adapter's label or source → its unlabelled inputs: see :mod:`coremerge.learning.data`.
        count: inputs drawn for each task.
        size: inputs of a batch.
        max_length: tokens of an input.
        dtype: of the base model: ``"float32"``, ``"bfloat16"``, or the stored one: ``"auto"``.
        device: ``"cpu"``, ``"cuda"``, or ``"auto"`` to spread the model over what is there.
        seed: of the draw of inputs.
        allow_pickle: read legacy ``.bin`` adapters.
        vera_width: see :func:`coremerge.load`.
        initial: see :func:`coremerge.pipeline.merge_files`.
        resume: see :func:`~coremerge.learning.learn_weights`, as are ``progress`` and ``settings``.

    Raises:
        CoremergeError: a refusal that says what to do.
    """
    adapters = read_adapters(sources, base=base, vera_width=vera_width, initial=initial, allow_pickle=allow_pickle)
    labels = {str(source): label for label, source in zip(adapters, sources, strict=True)}
    named = {_label(key, labels): source for key, source in data.items()}
    processor = load_processor(base)
    batches = {
        key: make_batches(read_examples(source, count=count, seed=seed), processor, size=size, max_length=max_length)
        for key, source in named.items()
    }
    model = load_model(base, dtype, device)
    at = {key: [_moved(batch, model) for batch in listed] for key, listed in batches.items()}
    return learn_weights(model, adapters, at, seed=seed, resume=resume, progress=progress, **settings)


def _label(key: str, labels: Mapping[str, str]) -> str:
    if key in labels.values():
        return key
    if key in labels:
        return labels[key]
    raise ConfigError(
        "no adapter of that name", key="data", value=key, remedy=f"Adapters: {', '.join(labels.values())}"
    )


def _moved(batch: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    device = next(model.parameters()).device
    return {key: value.to(device) if hasattr(value, "to") else value for key, value in batch.items()}


def load_model(base: str | Path, dtype: str = "auto", device: str = "cpu") -> nn.Module:
    """The backbone of a model of ``transformers``, without a head and without remote code.

    Raises:
        MissingExtraError: transformers is not installed.
        SourceError: it cannot be loaded.
    """
    try:
        from transformers import AutoModel
        from transformers.utils import logging
    except ImportError:
        raise MissingExtraError("a base model needs transformers", remedy="pip install 'coremerge[learn]'") from None
    place, where = base_place(base)
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        model: nn.Module = AutoModel.from_pretrained(
            place,
            dtype=dtype,
            device_map=None if device == "cpu" else device,
            trust_remote_code=False,
            **where,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise SourceError(
            f"the base model cannot be loaded: {str(error).splitlines()[0]}", file=base,
            remedy="Give a model of transformers: its folder, or its hub id",
        ) from None  # fmt: skip
    return model
