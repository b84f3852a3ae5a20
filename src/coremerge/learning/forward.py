"""The merged model without merging: a base model whose target modules carry the adapters, by hooks.

A hook adds Σ_k c_k B_k A_k z to the module's output, with coefficients that gradients can reach. The model itself is
not touched: its weights, its training mode and its hooks are as they were afterwards.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from coremerge.adapter import Adapter
from coremerge.errors import InputError, MismatchError, UnsupportedError
from coremerge.learning.backbone import Batch, backbone_output

Coefficients = Callable[["Target"], Tensor]
"""Of a target: one per rank component (R,)."""

OTHER_WAY = "the inputs of a task take another way through the merged model than through their own"
WITHOUT_EXPERTS = "Leave out adapters of experts, or merge without data"

Watch = Callable[["Target", Tensor], Tensor | None]
"""Called with a target module and its input (..., n); what it returns is collected."""


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
        self.device = next((target.left.device for target in self.targets.values()), torch.device("cpu"))

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


def find_modules(model: nn.Module, names: Sequence[str]) -> dict[str, str]:
    """Where ``model`` keeps the modules that adapters call ``names``.

    Names may begin elsewhere: at the backbone while ``model`` has a head, at a tower of it, or the other way round.
    Modules that the model lacks and has no use for, as Gemma's layers that share keys and values, are left out.

    Raises:
        MismatchError: a module is not there, or could be several.
    """
    known = dict(model.named_modules())
    unused = _unused(model)
    needed = [name for name in names if not any(re.search(pattern, f"{name}.weight") for pattern in unused)] or names
    if all(name in known for name in needed):
        return {name: name for name in names if name in known}
    first = needed[0]
    longer = [path.removesuffix(first) for path in known if path.endswith(f".{first}")]
    parts = first.split(".")
    shorter = [".".join(parts[:i]) + "." for i in range(1, len(parts)) if ".".join(parts[i:]) in known]
    changes = [{name: prefix + name for name in names} for prefix in longer]
    changes += [{name: name.removeprefix(prefix) for name in names} for prefix in shorter]
    fitting = [paths for paths in changes if all(paths[name] in known for name in needed)]
    if len(fitting) == 1:
        return {name: path for name, path in fitting[0].items() if path in known}
    if fitting:
        raise MismatchError(
            f"the base model ({type(model).__name__}) has several such modules: "
            + ", ".join(paths[first] for paths in fitting),
            key=first, remedy="Give the part of the model that the adapters were trained on",
        )  # fmt: skip
    missing = next(name for name in needed if name not in known)
    linear = [name for name, module in known.items() if isinstance(module, nn.Linear)]
    raise MismatchError(
        f"the base model ({type(model).__name__}) has no such module", key=missing,
        remedy=f"Give the model that the adapters were trained on; its linear layers are called {linear[:1] or 'none'}",
    )  # fmt: skip


def _unused(model: nn.Module) -> list[str]:
    """Patterns of weights that the model, or a part of it, passes over when ``transformers`` loads it."""
    patterns = (getattr(part, "_keys_to_ignore_on_load_unexpected", None) for part in model.modules())
    return list(dict.fromkeys(pattern for listed in patterns for pattern in listed or ()))


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
