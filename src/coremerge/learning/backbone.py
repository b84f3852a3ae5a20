"""A model of ``transformers`` without its head: run as it is, and left as it was."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Batch = Mapping[str, Any]
"""What a model takes, by name. ``token_mask`` (batch, tokens), where present, says which tokens count."""

TOKEN_MASK = "token_mask"
_UNREAD = ("labels", TOKEN_MASK)


class _HeadReachedError(Exception):
    pass


def backbone_output(model: nn.Module, batch: Batch) -> Any:
    """What the model's backbone makes of ``batch``."""
    inputs = {key: value for key, value in batch.items() if key not in _UNREAD}
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False) and "decoder_input_ids" not in inputs:
        inputs["decoder_input_ids"] = torch.full_like(inputs["input_ids"][:, :1], _decoder_start(model))
    backbone = _tower(getattr(model, "base_model", model), inputs)
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if backbone is not model or head is None:
        return backbone(**inputs)

    def stop(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        raise _HeadReachedError(*args)

    handle = head.register_forward_pre_hook(stop)
    try:
        return model(**inputs)
    except _HeadReachedError as reached:
        return reached.args[0]
    finally:
        handle.remove()


def _tower(backbone: Any, inputs: Mapping[str, Any]) -> Any:
    """Of a model with a tower for texts and one for images: the one that the inputs are for, if they are for one."""
    if not (hasattr(backbone, "text_model") and hasattr(backbone, "vision_model")):
        return backbone
    text, image = "input_ids" in inputs, "pixel_values" in inputs
    return backbone if text == image else backbone.text_model if text else backbone.vision_model


def _decoder_start(model: Any) -> int:
    places = (model.config, getattr(model, "generation_config", None))
    names = ("decoder_start_token_id", "bos_token_id", "pad_token_id")
    found = (getattr(place, name, None) for name in names for place in places)
    return next((token for token in found if isinstance(token, int)), 0)


@contextmanager
def frozen(model: nn.Module, *, checkpointing: bool = False) -> Iterator[None]:
    """``model`` in evaluation mode, without gradients or a cache of its own; as it was afterwards.

    Args:
        model: of transformers, or any.
        checkpointing: keep only the inputs of its blocks for the backward pass, and repeat the rest.
    """
    with ExitStack() as undo:
        undo.enter_context(evaluating(model))
        for parameter in model.parameters():
            undo.callback(parameter.requires_grad_, parameter.requires_grad)
            parameter.requires_grad_(False)
        for config in _configs(model):
            undo.callback(setattr, config, "use_cache", config.use_cache)
            config.use_cache = False
        for block in blocks(model) if checkpointing else ():
            undo.callback(put_back, block, "forward", vars(block).get("forward"))
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        yield


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Random numbers from ``seed``; the caller's go on afterwards where they were, on GPUs, too."""
    gpus = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    with torch.random.fork_rng(gpus):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would also seed GPUs that are first used later
        if gpus:
            torch.cuda.manual_seed_all(seed)
        yield


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """``model`` in evaluation mode; every part of it in its own mode again afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def put_back(block: nn.Module, name: str, before: object) -> None:
    """``block``'s own attribute as it was; None: it had none of that name."""
    delattr(block, name)
    if before is not None:
        setattr(block, name, before)


def _configs(model: nn.Module) -> list[Any]:
    """Those of the model and its parts that know of a cache."""
    found = [getattr(module, "config", None) for module in model.modules()]
    return [config for config in {id(c): c for c in found}.values() if hasattr(config, "use_cache")]


def blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks of every stack: the members of the outermost lists of modules."""
    found: list[nn.Module] = []
    for child in model.children():
        found += list(child) if isinstance(child, nn.ModuleList) else blocks(child)
    return found


def token_mask(batch: Batch, x: Tensor) -> Tensor | None:
    """Which tokens of a module's input ``x`` (batch, tokens, n) count; None: all of them."""
    for key in (TOKEN_MASK, "attention_mask", "decoder_attention_mask"):
        mask = batch.get(key)
        if isinstance(mask, Tensor) and mask.ndim == 2:
            if mask.shape == x.shape[:-1]:
                return mask
            if x.ndim == 2 and mask.numel() == len(x):
                return mask.reshape(-1)
    return None
