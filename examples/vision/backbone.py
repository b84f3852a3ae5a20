"""The base model, lean enough to train adapters on one core: bfloat16, adapters added to the weights.

PEFT multiplies by A and by B at every module; here W + B·A is put together once a step and one product does, and its
gradients are those of the factors alone. Layer scales are multiplied into the weights before them.
The numbers are those of PEFT's model up to bfloat16's rounding.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel
from torch import Tensor, nn
from transformers import Dinov2Model

MEAN, DEVIATION = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
Factors = Callable[[], tuple[Tensor, Tensor]]
"""An update's factors, (out, r) and (r, in), float32."""


def pixels(images: NDArray[np.uint8]) -> Tensor:
    """(n, side, side, 3) → (n, 3, side, side), normalised as the base model was trained."""
    values = torch.from_numpy(np.asarray(images)).float() / 255
    return ((values - MEAN) / DEVIATION).permute(0, 3, 1, 2).bfloat16()


class _Product(torch.autograd.Function):
    """x (n, in) → x (W + left·right)ᵀ + bias; gradients reach x and the factors."""

    @staticmethod
    def forward(ctx: Any, *given: Tensor) -> Tensor:
        x, weight, bias, left, right = given
        whole = torch.addmm(weight, left, right).bfloat16()
        ctx.save_for_backward(x, whole, left, right)
        return nn.functional.linear(x, whole, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, whole, left, right = ctx.saved_tensors
        grad = grads[0]
        back = grad @ whole if ctx.needs_input_grad[0] else None
        to_left = grad.mT @ (x @ right.bfloat16().mT)
        to_right = (grad @ left.bfloat16()).mT @ x
        return back, None, None, to_left.float(), to_right.float()


class _Adapted(nn.Module):
    """A linear layer whose weight carries an update."""

    def __init__(self, linear: nn.Linear, scale: Tensor, factors: Factors | None) -> None:
        super().__init__()
        self.scale, self.factors = scale, factors
        self.weight = linear.weight.detach().float() * scale[:, None]
        self.bias = (linear.bias.detach().float() * scale).bfloat16()
        self.half = self.weight.bfloat16()

    def forward(self, x: Tensor) -> Tensor:
        if self.factors is None:
            return nn.functional.linear(x, self.half, self.bias)
        left, right = self.factors()
        flat = x.reshape(-1, x.shape[-1])
        found: Tensor = _Product.apply(flat, self.weight, self.bias, left * self.scale[:, None], right)  # type: ignore[no-untyped-call]
        return found.view(*x.shape[:-1], -1)


class Backbone(nn.Module):
    """Pictures to tokens (n, 65, 384), float32.

    Args:
        base: the model without adapters; it is copied.
        adapter: a PEFT model whose factors are added, as they are at each call.
    """

    def __init__(self, base: Dinov2Model, adapter: PeftModel | None = None) -> None:
        super().__init__()
        found = factors_of(adapter) if adapter is not None else {}
        model = copy.deepcopy(base).requires_grad_(False).eval()
        unknown = set(found) - {name for name, _ in model.named_modules()}
        assert not unknown, unknown
        for place, layer in enumerate(model.encoder.layer):
            scales = {"attention.o_proj": layer.layer_scale1.lambda1, "mlp.fc2": layer.layer_scale2.lambda1}
            for name, module in list(layer.named_modules()):
                if isinstance(module, nn.Linear):
                    scale = scales.get(name, torch.ones(module.out_features)).detach().float()
                    full = f"encoder.layer.{place}.{name}"
                    layer.set_submodule(name, _Adapted(module, scale, found.get(full)))
            layer.layer_scale1, layer.layer_scale2 = nn.Identity(), nn.Identity()
        self.model = model.bfloat16()

    def forward(self, images: Tensor) -> Tensor:
        tokens: Tensor = self.model(pixel_values=images).last_hidden_state
        return tokens.float()


def factors_of(adapter: PeftModel) -> Mapping[str, Factors]:
    """Module's name → its update's factors, of LoRA or VeRA."""
    found: dict[str, Factors] = {}
    for name, module in adapter.base_model.model.named_modules():
        if hasattr(module, "lora_A"):
            found[name] = _lora(module)
        elif hasattr(module, "vera_lambda_b"):
            found[name] = _vera(module)
    return found


def _lora(module: Any) -> Factors:
    down, up, scale = module.lora_A["default"].weight, module.lora_B["default"].weight, module.scaling["default"]
    return lambda: (up * scale, down)


def _vera(module: Any) -> Factors:
    down = module.vera_A["default"][:, : module.in_features]
    up = module.vera_B["default"][: module.out_features]
    inner, outer = module.vera_lambda_d["default"], module.vera_lambda_b["default"]
    return lambda: (outer[:, None] * up, inner[:, None] * down)
