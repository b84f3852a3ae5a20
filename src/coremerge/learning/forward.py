"""The merged model without merging: a base model whose target modules carry the adapters, by hooks.

A hook adds Σ_k c_k B_k A_k z to the module's output, with coefficients that gradients can reach. The model itself is
not touched: its weights, its training mode and its hooks are as they were afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from coremerge.adapter import Adapter
from coremerge.errors import InputError, MismatchError, UnsupportedError

Batch = Mapping[str, Any]
"""What a model takes, by name. ``token_mask`` (batch, tokens), where present, says which tokens count."""

Coefficients = Callable[["Target"], Tensor]
"""Of a target: one per rank component (R,)."""

Watch = Callable[["Target", Tensor], Tensor | None]
"""Called with a target module and its input (..., n); what it returns is collected."""

TOKEN_MASK = "token_mask"
_UNREAD = ("labels", TOKEN_MASK)


@dataclass(frozen=True)
class Target:
    """A module that at least one adapter has.

    Attributes:
        name: as the adapters call it.
        path: as the model calls it.
        module: itself.
        adapters: names of the adapters that have it, in order.
        owner: (R,) which of ``adapters`` each rank component belongs to.
        left: (m, R) of the adapters side by side, scales folded in.
        right: (R, n).
        biases: (R, m), where an adapter has trained biases: each one's shared out among its components.
    """

    name: str
    path: str
    module: nn.Module
    adapters: tuple[str, ...]
    owner: Tensor
    left: Tensor
    right: Tensor
    biases: Tensor | None

    def right_of(self, adapter: str) -> Tensor:
        """A_k (r, n)."""
        return self.right[self.owner == self.adapters.index(adapter)]

    def update(self, x: Tensor, coefficients: Tensor) -> Tensor:
        """Σ_k c_k B_k A_k x for inputs ``x`` (..., n) and one coefficient per component (R,)."""
        left, right = self.left.to(x.device), self.right.to(x.device)
        coefficients = coefficients.to(x.device)
        added = ((x.to(right.dtype) @ right.mT) * coefficients.to(right.dtype)) @ left.mT
        return added if self.biases is None else added + coefficients.to(added.dtype) @ self.biases.to(added)


class MergedModel:
    """A model and adapters, whose sum is run with coefficients of the moment.

    Args:
        model: of transformers, or any whose backbone takes batches as keywords.
        adapters: name → adapter; all of their modules must be linear (or GPT-2's Conv1D).

    Raises:
        MismatchError: the model has no such module, or of another shape.
        UnsupportedError: a module is no linear layer.
    """

    def __init__(self, model: nn.Module, adapters: Mapping[str, Adapter]) -> None:
        if not adapters:
            raise InputError("no adapters given", remedy="Name at least one")
        self.model = model
        self.adapters = tuple(adapters)
        names = sorted({name for adapter in adapters.values() for name in adapter})
        paths = find_modules(model, names)
        self.targets = {name: _target(name, path, model.get_submodule(path), adapters) for name, path in paths.items()}

    @contextmanager
    def run(self, batch: Batch, coefficients: Coefficients, watch: Watch | None = None) -> Iterator[Run]:
        """One forward pass of the backbone: no head and no logits.

        Take gradients before it is left: gradient checkpointing repeats parts of it, hooks included.

        Args:
            batch: see :data:`Batch`; ``labels`` are not passed on.
            coefficients: see :data:`Coefficients`.
            watch: called at every target, before its update is added.
        """
        found: dict[str, Tensor] = {}
        first = True  # later passes are gradient checkpointing's, which have to do the same again

        def hook(target: Target) -> Callable[..., Tensor]:
            def add(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
                value = watch(target, args[0]) if watch else None
                if first and value is not None:
                    found[target.name] = value
                return output + target.update(args[0], coefficients(target)).to(output)

            return add

        with ExitStack() as hooks:
            for target in self.targets.values():
                hooks.callback(target.module.register_forward_hook(hook(target)).remove)
            output = backbone_output(self.model, batch)
            first = False
            yield Run(output, found)


@dataclass(frozen=True)
class Run:
    """A forward pass.

    Attributes:
        output: the backbone's, or, of a model that cannot do without its head, what that was given.
        found: target name → what the watch returned, unless that was None.
    """

    output: Any
    found: Mapping[str, Tensor]

    @property
    def hidden(self) -> Tensor | None:
        """The last hidden states (batch, tokens, n), if there are such."""
        output = self.output if isinstance(self.output, Tensor) else getattr(self.output, "last_hidden_state", None)
        return output if isinstance(output, Tensor) and output.ndim == 3 else None


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
    modes = {module: module.training for module in model.modules()}
    wanted = {parameter: parameter.requires_grad for parameter in model.parameters()}
    with ExitStack() as undo:
        model.eval().requires_grad_(False)
        undo.callback(_restore, modes, wanted)
        for config in _configs(model):
            undo.callback(setattr, config, "use_cache", config.use_cache)
            config.use_cache = False
        for block in blocks(model) if checkpointing else ():
            undo.callback(_put_back, block, "forward", vars(block).get("forward"))
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        yield


def _restore(modes: Mapping[nn.Module, bool], wanted: Mapping[nn.Parameter, bool]) -> None:
    for module, mode in modes.items():
        module.training = mode
    for parameter, mode in wanted.items():
        parameter.requires_grad_(mode)


def _put_back(block: nn.Module, name: str, before: object) -> None:
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


def find_modules(model: nn.Module, names: Sequence[str]) -> dict[str, str]:
    """Where ``model`` keeps the modules that adapters call ``names``.

    Names may begin elsewhere: at the backbone while ``model`` has a head, at a tower of it, or the other way round.

    Raises:
        MismatchError: a module is not there, or could be several.
    """
    known = dict(model.named_modules())
    if all(name in known for name in names):
        return {name: name for name in names}
    first = names[0]
    longer = [path.removesuffix(first) for path in known if path.endswith(f".{first}")]
    parts = first.split(".")
    shorter = [".".join(parts[:i]) + "." for i in range(1, len(parts)) if ".".join(parts[i:]) in known]
    changes = [{name: prefix + name for name in names} for prefix in longer]
    changes += [{name: name.removeprefix(prefix) for name in names} for prefix in shorter]
    fitting = [paths for paths in changes if all(path in known for path in paths.values())]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise MismatchError(
            f"the base model ({type(model).__name__}) has several such modules: "
            + ", ".join(paths[first] for paths in fitting),
            key=first, remedy="Give the part of the model that the adapters were trained on",
        )  # fmt: skip
    missing = next(name for name in names if name not in known)
    linear = [name for name, module in known.items() if isinstance(module, nn.Linear)]
    raise MismatchError(
        f"the base model ({type(model).__name__}) has no such module", key=missing,
        remedy=f"Give the model that the adapters were trained on; its linear layers are called {linear[:1] or 'none'}",
    )  # fmt: skip


def _target(name: str, path: str, module: nn.Module, adapters: Mapping[str, Adapter]) -> Target:
    having = {key: adapter for key, adapter in adapters.items() if name in adapter}
    weight = getattr(module, "weight", None)
    transposed = type(module).__name__ == "Conv1D"
    kinds = {adapter.modules[name].kind for adapter in having.values()}
    if kinds != {"linear"} or not (transposed or hasattr(module, "out_features")):
        raise UnsupportedError(
            f"only linear layers can be hooked, and this is {type(module).__name__}", key=path,
            remedy="Leave out the adapters that train it, or set their weights by hand",
        )  # fmt: skip
    shape = _shape(module, transposed)
    updates = {key: adapter.read(name, torch.float32) for key, adapter in having.items()}
    for key, update in updates.items():
        if update.shape != shape:
            raise MismatchError(
                f"the base model's layer is {shape}, the update of {key} {update.shape}", key=path,
                remedy="Give the model that the adapters were trained on",
            )  # fmt: skip
    floating = isinstance(weight, Tensor) and weight.is_floating_point() and weight.itemsize >= 2
    dtype = weight.dtype if floating and weight is not None else torch.float32
    device = weight.device if weight is not None and weight.device.type != "meta" else torch.device("cpu")
    owner = torch.cat([torch.full((u.rank,), k) for k, u in enumerate(updates.values())])
    return Target(
        name,
        path,
        module,
        tuple(having),
        owner.to(device),
        torch.cat([u.left for u in updates.values()], -1).to(device, dtype),
        torch.cat([u.right for u in updates.values()], -2).to(device, dtype),
        _biases(name, having, shape[0]),
    )


def _biases(name: str, having: Mapping[str, Adapter], outputs: int) -> Tensor | None:
    if not any(name in adapter.biases for adapter in having.values()):
        return None
    shares = []
    for adapter in having.values():
        rank = adapter.modules[name].rank
        bias = adapter.biases[name].float() if name in adapter.biases else torch.zeros(outputs)
        shares.append((bias / rank).expand(rank, -1))
    return torch.cat(shares)


def _shape(module: nn.Module, transposed: bool) -> tuple[int, int]:
    """(out, in)."""
    if transposed:
        inner, outer = module.get_parameter("weight").shape
        return outer, inner
    return int(module.out_features), int(module.in_features)  # type: ignore[arg-type]


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
