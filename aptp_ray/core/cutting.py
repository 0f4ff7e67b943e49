"""Shrinks a full UNet in place to a hard code: slices the layers of its width sites, replaces its closed blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.activations import GEGLU
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel, Transformer2DModelOutput
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn

from aptp_ray.core.space import ArchitectureSpace


class ClosedResnet(nn.Module):
    """Stands where a resnet was removed: passes on the leading channels of its input (in an up block, those that are
    not the skip's). No parameters."""

    def __init__(self, out_channels: int) -> None:
        super().__init__()
        self.out_channels = out_channels

    def forward(self, input_tensor: Tensor, temb: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        """[batch, channels, height, width] -> [batch, out_channels, height, width]."""
        return input_tensor[:, : self.out_channels]


class ClosedTransformer(nn.Module):
    """Stands where a Transformer2DModel was removed: passes on its input in that module's return type."""

    def forward(
        self, hidden_states: Tensor, *args: Any, return_dict: bool = True, **kwargs: Any
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """[batch, channels, height, width] -> the same, wrapped."""
        return Transformer2DModelOutput(sample=hidden_states) if return_dict else (hidden_states,)


def cut(unet: UNet2DConditionModel, space: ArchitectureSpace, code: Tensor) -> None:
    """Shrinks a full UNet in place to a hard code [dim]; parameters that shrink are replaced by copies."""
    view = space.view(code)
    closed = {site.name for site in space.depth_sites if not view[site.key].item()}
    for site in space.width_sites:
        keep = view[site.key]
        if site.block in closed or bool(keep.all()):
            continue
        module: Any = unet.get_submodule(site.name)
        # [kept * channels]: which of the site's channels stay
        channels = keep.repeat_interleave(site.channels).nonzero().flatten()
        _CUTS[site.kind](module, channels, int(keep.sum()))
    for name in closed:
        parent, _, index = name.rpartition(".")
        module = unet.get_submodule(name)
        transformer = isinstance(module, Transformer2DModel)
        stand_in = ClosedTransformer() if transformer else ClosedResnet(module.conv2.out_channels)
        siblings: Any = unet.get_submodule(parent)
        siblings[int(index)] = stand_in.train(module.training)


def _cut_resnet(resnet: ResnetBlock2D, channels: Tensor, groups: int) -> None:
    _keep_outputs(resnet.conv1, channels)
    if resnet.time_emb_proj is not None:
        _keep_outputs(resnet.time_emb_proj, channels)
    # Groups stay or go whole, so the statistics of those that stay do not change.
    _keep_outputs(resnet.norm2, channels)
    resnet.norm2.num_groups = groups
    _keep_inputs(resnet.conv2, channels)


def _cut_attention(attention: Attention, channels: Tensor, heads: int) -> None:
    for projection in (attention.to_q, attention.to_k, attention.to_v):
        _keep_outputs(projection, channels)
    _keep_inputs(attention.to_out[0], channels)
    attention.heads = attention.sliceable_head_dim = heads
    attention.inner_dim = attention.inner_kv_dim = len(channels)


def _cut_feed_forward(ff: Any, channels: Tensor, _chunks: int) -> None:
    inner = ff.net[2].in_features
    # GEGLU projects to [values, gates]: both halves of a channel stay together.
    outputs = torch.cat([channels, channels + inner]) if isinstance(ff.net[0], GEGLU) else channels
    _keep_outputs(ff.net[0].proj, outputs)
    _keep_inputs(ff.net[2], channels)


_CUTS: dict[str, Callable[[Any, Tensor, int], None]] = {
    "resnet": _cut_resnet,
    "attention": _cut_attention,
    "feed_forward": _cut_feed_forward,
}
_OUTPUT_SIZES: dict[type, str] = {nn.Linear: "out_features", nn.Conv2d: "out_channels", nn.GroupNorm: "num_channels"}
_INPUT_SIZES: dict[type, str] = {nn.Linear: "in_features", nn.Conv2d: "in_channels"}


def _keep_outputs(layer: nn.Module, index: Tensor) -> None:
    for name in ("weight", "bias"):
        _select(layer, name, index, dim=0)
    setattr(layer, _OUTPUT_SIZES[type(layer)], len(index))


def _keep_inputs(layer: nn.Module, index: Tensor) -> None:
    _select(layer, "weight", index, dim=1)
    setattr(layer, _INPUT_SIZES[type(layer)], len(index))


def _select(layer: nn.Module, name: str, index: Tensor, dim: int) -> None:
    parameter = getattr(layer, name)
    if parameter is not None:
        kept = parameter.detach().index_select(dim, index.to(parameter.device))
        setattr(layer, name, nn.Parameter(kept, requires_grad=parameter.requires_grad))
