"""Weights kept in eight bits, computed with in the precision of what comes in: a quarter of float32's memory, on any device.

Symmetric, one scale an output channel: W ~ s q with q in [-127, 127], so W x + b = s (q x) + b. The scale is taken out of the
product, and what is multiplied are whole numbers that every floating point type of eight bits of mantissa holds exactly.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from aptp_ray.core.backbones import bare, blocks_of

# Below this many weights a layer's scales and its conversion on each call cost more than they save.
_LEAST_WEIGHTS = 4096


class _Int8Layer(nn.Module):
    """What both layers share: buffers `quantized` int8, of the weight's shape, `scale` [outputs] and `bias`."""

    quantized: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, layer: nn.Linear | nn.Conv2d) -> None:
        super().__init__()
        weight = layer.weight.detach().float()
        scale = weight.flatten(1).abs().amax(dim=1).clamp_min(torch.finfo(torch.float32).tiny) / 127  # [outputs]
        by_output = scale.view(-1, *[1] * (weight.ndim - 1))
        self.register_buffer("quantized", (weight / by_output).round().clamp(-127, 127).to(torch.int8))
        self.register_buffer("scale", scale.to(layer.weight.dtype))
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().clone())

    @property
    def weight(self) -> Tensor:
        """The weight that is computed with, in the scale's precision; made anew."""
        return self.quantized.to(self.scale.dtype) * self.scale.view(-1, *[1] * (self.quantized.ndim - 1))


class Int8Linear(_Int8Layer):
    """An nn.Linear with weights in eight bits."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer)
        self.in_features, self.out_features = layer.in_features, layer.out_features

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[..., inputs] -> [..., outputs]."""
        product = functional.linear(input, self.quantized.to(input.dtype)) * self.scale.to(input.dtype)
        return product if self.bias is None else product + self.bias.to(input.dtype)


class Int8Conv2d(_Int8Layer):
    """An nn.Conv2d with weights in eight bits."""

    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__(layer)
        self.in_channels, self.out_channels = layer.in_channels, layer.out_channels
        self.stride, self.padding, self.dilation, self.groups = layer.stride, layer.padding, layer.dilation, layer.groups

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[batch, inputs, height, width] -> [batch, outputs, height, width]."""
        product = functional.conv2d(
            input, self.quantized.to(input.dtype), None, self.stride, self.padding, self.dilation, self.groups
        )
        product = product * self.scale.to(input.dtype).view(-1, 1, 1)
        return product if self.bias is None else product + self.bias.to(input.dtype).view(-1, 1, 1)


_KINDS: dict[type, Any] = {nn.Linear: Int8Linear, nn.Conv2d: Int8Conv2d}


def quantize_weights(model: Any, *, least_weights: int = _LEAST_WEIGHTS) -> Any:
    """Turns the linear and convolutional layers of a model's blocks to eight-bit weights, in place.

    What stands outside of the blocks (first and last convolution, embeddings of time and text) stays as it is: few weights,
    through which everything passes. So do norms, biases and small layers.

    Args:
        model: stock or pruned, or what `load_unet` returned; frozen, for the result cannot be trained.
        least_weights: of a layer that is turned.

    Returns:
        The model.

    Raises:
        ValueError: if a weight would still learn.
    """
    if any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("eight-bit weights cannot be trained: freeze the model first (requires_grad_(False))")
    for block in blocks_of(bare(model)):
        for parent in list(block.modules()):
            layer: Any
            for name, layer in list(parent.named_children()):
                kind = _KINDS.get(type(layer))
                plain = getattr(layer, "padding_mode", "zeros") == "zeros"
                if kind is not None and plain and layer.weight.numel() >= least_weights:
                    setattr(parent, name, kind(layer))
    return model


def count_weights(model: nn.Module) -> int:
    """Numbers that a model has learned, however they are kept."""
    layers = [module for module in model.modules() if isinstance(module, _Int8Layer)]
    kept = sum(layer.quantized.numel() + (0 if layer.bias is None else layer.bias.numel()) for layer in layers)
    return kept + sum(parameter.numel() for parameter in model.parameters())


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers."""
    return sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))
