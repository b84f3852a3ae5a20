"""A model of ``transformers`` without its head: run as it is, and left as it was."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from coremerge.errors import CoremergeError, InputError
from coremerge.learning.optional import first_line
from coremerge.memory import out_of_memory

Batch = Mapping[str, Any]
"""What a model takes, by name. ``token_mask`` (batch, tokens), where present, says which tokens count."""

TOKEN_MASK = "token_mask"
_UNREAD = ("labels", TOKEN_MASK)


_OWN_CODE = str(Path(__file__).parent)
_FED: Mapping[str, frozenset[str]] = {
    "text_model": frozenset({"input_ids", "inputs_embeds"}),
    "vision_model": frozenset({"pixel_values"}),
    "audio_model": frozenset({"input_features", "input_values"}),
}
"""What the towers of a model of several are fed with, as ``transformers`` calls both."""


class PassEndError(Exception):
    """Ends a pass on purpose."""


class _HeadReachedError(PassEndError):
    pass


class StoppedError(InputError):
    """The model itself stopped: its own exception is the cause."""


class NotFiniteError(StoppedError):
    """What the model gives is no number."""


def check_numbers(given: Tensor) -> None:
    """Whether all of it are numbers: a logarithm of zero is one.

    Raises:
        NotFiniteError: they are not.
    """
    if bool(given.isnan().any()):
        remedy = "Check the adapters and their scale, or run the base model in float32 or bfloat16"
        raise NotFiniteError("the base model's numbers are not finite", remedy=remedy)


def backbone_output(model: nn.Module, batch: Batch) -> Any:
    """What the model's backbone makes of ``batch``.

    Raises:
        StoppedError: the model stops with an exception of its own.
    """
    inputs = {key: value for key, value in batch.items() if key not in _UNREAD}
    if _lacks_decoder_inputs(model, inputs):
        inputs["decoder_input_ids"] = _start_tokens(model, inputs)
    return run_model(model, inputs, partial(_output, model, inputs))


def run_model(model: nn.Module, inputs: Iterable[str], run: Callable[[], Any]) -> Any:
    """What ``run`` makes of ``model`` and the ``inputs`` of these names.

    Raises:
        StoppedError: the model stops with an exception of its own.
    """
    try:
        return run()
    except (PassEndError, CoremergeError, OSError):
        raise
    except Exception as error:
        if out_of_memory(error) or _is_ours(error):
            raise
        raise StoppedError(
            f"the base model stops here with {type(error).__name__}: {first_line(error)}", key=_layer(error, model),
            remedy=f"Run it by itself on such inputs ({', '.join(inputs)}), to see what it lacks",
        ) from error  # fmt: skip


@contextmanager
def inputs_of(task: str) -> Iterator[None]:
    """A model that stops on these inputs is told with whose they are."""
    try:
        yield
    except StoppedError as error:
        what = f"on the inputs of {task} {error.what}"
        raise type(error)(what, key=error.key, remedy=error.remedy) from error.__cause__


def _output(model: nn.Module, inputs: Mapping[str, Any]) -> Any:
    backbone = _backbone(model, inputs)
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


def _backbone(model: nn.Module, inputs: Mapping[str, Any]) -> nn.Module:
    """The part beneath the head, where it takes what the model does: some models' ``base_model`` is their encoder."""
    base = getattr(model, "base_model", None)
    takes_all = isinstance(base, nn.Module) and all(_takes(base, key) for key in inputs if _takes(model, key))
    return _tower(base if isinstance(base, nn.Module) and takes_all else model, inputs)


def _tower(backbone: nn.Module, inputs: Mapping[str, Any]) -> nn.Module:
    """Of a model with towers for texts, images or sounds: the one that the inputs are for, if they are for one."""
    towers = {name: tower for name in _FED if isinstance(tower := getattr(backbone, name, None), nn.Module)}
    fed = [tower for name, tower in towers.items() if _FED[name] & inputs.keys()]
    return fed[0] if len(towers) > 1 and len(fed) == 1 else backbone


def _takes(module: nn.Module, key: str) -> bool:
    """Whether it has an input of that name; a wrapper that hands all of them on has any."""
    parameters = inspect.signature(module.forward).parameters
    named = [one.name for one in parameters.values() if one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)]
    return key in named if named else bool(parameters)


def _is_ours(error: Exception) -> bool:
    """Whether it comes out of a hook of this package, not out of the model."""
    frames = [frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__)]
    return any(file.startswith(_OWN_CODE) for file in frames[2:])  # behind this module's own two


def _layer(error: Exception, model: nn.Module) -> str:
    """The innermost part of the model that was running."""
    names = {id(module): name for name, module in model.named_modules()}
    running = (frame.f_locals.get("self") for frame, _ in traceback.walk_tb(error.__traceback__))
    found = [names[id(module)] for module in running if id(module) in names]
    return (found[-1] if found else "") or type(model).__name__


def _lacks_decoder_inputs(model: nn.Module, inputs: Mapping[str, Any]) -> bool:
    known = {"decoder_input_ids", "decoder_inputs_embeds"}
    is_pair = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return bool(is_pair) and not known & inputs.keys() and _takes(model, "decoder_input_ids")


def _start_tokens(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """One for each input, whatever the encoder reads: texts, sounds, images (rows, 1)."""
    first = next(value for value in inputs.values() if isinstance(value, Tensor))
    like = inputs.get("input_ids", first)
    return torch.full((len(like), 1), decoder_start(model), dtype=torch.long, device=like.device)


def decoder_start(model: Any) -> int:
    """The token with which the decoder of an encoder and a decoder begins."""
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


def sides_apart(batch: Batch) -> Batch:
    """With a decoder's tokens of another shape than its encoder's, which tells whose mask a module's inputs have.

    One more is put behind them, which does not count, and which none before it sees.
    """
    ids, read = batch.get("decoder_input_ids"), batch.get("attention_mask")
    if ids is None or read is None or ids.ndim != 2 or ids.shape != read.shape:
        return batch
    mask = batch.get("decoder_attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask
    more = {"decoder_input_ids": (ids, ids[:, -1:]), "decoder_attention_mask": (mask, torch.zeros_like(mask[:, :1]))}
    return {**batch, **{key: torch.cat(parts, 1) for key, parts in more.items()}}


def token_mask(batch: Batch, x: Tensor) -> Tensor | None:
    """Which tokens of a module's input ``x`` (batch, tokens, n) count, told by their number; None: all of them.

    Of an encoder with a decoder, ``batch`` is one of :func:`sides_apart`.
    """
    for key in (TOKEN_MASK, "attention_mask", "decoder_attention_mask"):
        mask = batch.get(key)
        if isinstance(mask, Tensor) and mask.ndim == 2:
            if mask.shape == x.shape[:-1]:
                return mask
            if x.ndim == 2 and mask.numel() == len(x):
                return mask.reshape(-1)
    return None
