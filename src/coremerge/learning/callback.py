"""The null-space ratio while a LoRA trains."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from coremerge.errors import InputError, MismatchError
from coremerge.learning.backbone import Batch, backbone_output, evaluating, sides_apart, token_mask
from coremerge.learning.given import moved
from coremerge.learning.ratio import MeanRatios, row_basis

PREFIX = "null_space/"


class NullSpaceCallback(TrainerCallback):
    """Logs the mean null-space ratio of every adapted module, on held inputs, to the Trainer's own log.

    As ``null_space/<module>`` and, over all modules, ``null_space/mean``: at the start, every so many steps, and at the
    end. Training is not disturbed: random numbers, modes and gradients are as they were.

    Args:
        trainer: whose model is a PEFT model with LoRA.
        batches: of unlabelled inputs, held back from training.
        every: steps between two measurements.

    Example:
        >>> trainer.add_callback(NullSpaceCallback(trainer, batches))  # doctest: +SKIP

    Source: Null-Space Compression merging (CVPR 2026): the ratio falls as training goes on.
    """

    def __init__(self, trainer: Trainer, batches: Iterable[Batch], *, every: int = 50) -> None:
        self.trainer, self.batches, self.every = trainer, list(batches), every

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Before the first step."""
        self._log(control)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Every so many steps, and at the last one."""
        if state.global_step % self.every == 0 or state.global_step >= state.max_steps:
            self._log(control)

    def _log(self, control: TrainerControl) -> None:
        assert isinstance(self.trainer.model, nn.Module)
        ratios = null_space_of_training(self.trainer.model, self.batches)
        mean = sum(ratios.values()) / len(ratios)
        due = control.should_log  # a log of one's own would cancel the Trainer's at this step
        self.trainer.log({PREFIX + "mean": mean} | {PREFIX + name: value for name, value in ratios.items()})
        control.should_log = due


def null_space_of_training(model: nn.Module, batches: Iterable[Batch]) -> dict[str, float]:
    """The mean ratio of each module of a PEFT model with respect to its current A, over tokens that count.

    The number is that of :func:`~coremerge.learning.measure_null_space` for the adapter as it is, in the model that
    carries it. Modules that no token reaches are absent.

    Args:
        model: with an active LoRA, or VeRA, whose shared A stays as it is; embeddings and convolutions are passed over.
        batches: of inputs; labels are not read.

    Raises:
        MismatchError: no linear module has a LoRA.
        InputError: the inputs reach none that has.
    """
    means = MeanRatios()
    base: Any = getattr(getattr(model, "base_model", model), "model", model)  # beneath PEFT's two layers
    adapted = list(_adapted(model))
    if not adapted:
        raise MismatchError("no linear layer of this model has a LoRA", remedy="Give the model that PEFT trains")
    held: list[Batch] = [{}]
    with evaluating(model), torch.random.fork_rng(), torch.no_grad(), ExitStack() as hooks:
        for name, module, down in adapted:
            basis = row_basis(down)

            def see(_: nn.Module, args: tuple[Tensor, ...], name: str = name, basis: Tensor = basis) -> None:
                means.add(name, args[0], basis, token_mask(held[0], args[0]))

            hooks.callback(module.register_forward_pre_hook(see).remove)
        device = next(model.parameters()).device
        for batch in batches:
            held[0] = moved(sides_apart(batch), device)
            backbone_output(base, held[0])
    found = {name: mean for name, _, _ in adapted if (mean := means.get(name)) is not None}
    if not found:
        raise InputError(
            "the inputs reach no module that has a LoRA", remedy="Give inputs of the task it is trained on"
        )
    return found


def _adapted(model: nn.Module) -> Iterator[tuple[str, nn.Module, Tensor]]:
    """Name in the base model, the module that holds a LoRA or VeRA, and its active A (r, n)."""
    for path, module in model.named_modules():
        downs: Any = getattr(module, "lora_A", None) or getattr(module, "vera_A", None)
        names: Any = module.active_adapters if downs and hasattr(module, "base_layer") else ()
        part = next((downs[name] for name in names if name in downs), None)
        down = getattr(part, "weight", part)
        if down is not None and down.ndim == 2:
            yield path.removeprefix("base_model.model."), module, down[:, : module.in_features]
