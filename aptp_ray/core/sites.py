"""The prunable sites of a model: what one is, and how they are found (APTP, section 3.1).

Width sites are a ResNet's GroupNorm groups, an attention's heads and a feed-forward's chunks; depth sites are, in a UNet,
the last resnet and the last transformer of each down and up block, and in a transformer its layers. A module is a site
only if leaving an entry out is exactly the same as closing it: everything else stays whole, with the obstacle on record.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from diffusers.models.activations import GEGLU, GELU, ApproximateGELU
from diffusers.models.attention import BasicTransformerBlock, FeedForward
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor,
    AttnProcessor2_0,
    SlicedAttnProcessor,
    XFormersAttnProcessor,
)
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import nn

from aptp_ray.core.backbones import Backbone
from aptp_ray.core.pruned_model import site_width

SiteKind = Literal["resnet", "attention", "feed_forward", "depth"]
DepthSites = Literal["modules", "layers"]

# Processors that read the number of heads from the module and treat every head alike, so that a missing head is exact.
STANDARD_PROCESSORS = (AttnProcessor, AttnProcessor2_0, SlicedAttnProcessor, XFormersAttnProcessor)
# Between a resnet's mask and its second convolution: zero has to stay zero.
_ZERO_AT_ZERO = (nn.SiLU, nn.Mish, nn.GELU, nn.ReLU)


@dataclass(frozen=True, kw_only=True)
class Site:
    """One place that can be pruned.

    Attributes:
        name: Module path of the resnet, attention, feed-forward or (depth) whole resnet, transformer or layer.
            A block's last resnet is a width site and a depth site of the same name; `key` tells them apart.
        width: Number of entries; 1 for a depth site.
        kind: What an entry is: a norm group, a head, a chunk, or the whole module.
        start: Index of the first entry in a code.
        block: Name of the depth site that removes this width site as a whole, or None.
        channels: Channels that one kept entry stands for; 0 for a depth site.
    """

    name: str
    width: int
    kind: SiteKind
    start: int
    block: str | None
    channels: int

    @property
    def slice(self) -> slice:
        """Where the site's entries lie in a code."""
        return slice(self.start, self.start + self.width)

    @property
    def key(self) -> str:
        """Unique name: `name` for a width site, `name` + ":depth" for a depth site."""
        return f"{self.name}:depth" if self.kind == "depth" else self.name


def find_sites(model: Backbone, depth: DepthSites = "modules") -> tuple[tuple[Site, ...], dict[str, str]]:
    """Walks a model, on any device including meta.

    Args:
        model: UNet2DConditionModel or PixArtTransformer2DModel.
        depth: What of a UNet's transformers of several layers (Stable Diffusion XL) can be left out: the last of each down
            and up block as a whole ("modules"), or each layer of every one, the mid block's too ("layers").

    Returns:
        Width sites in forward order, then depth sites in forward order; and module path -> why it is left whole.

    Raises:
        ValueError: If nothing in it can be pruned.
    """
    walk = _Walk(depth)
    if isinstance(model, PixArtTransformer2DModel):
        walk.visit_layers("transformer_blocks", model.transformer_blocks)
    else:
        walk.visit_unet(model)
    return walk.sites(), walk.skipped


class _Walk:
    """Collects the sites of a model block by block."""

    def __init__(self, depth: DepthSites) -> None:
        self.by_layer = depth == "layers"
        self.width: list[dict[str, Any]] = []
        self.depth: list[dict[str, Any]] = []
        self.skipped: dict[str, str] = {}

    def sites(self) -> tuple[Site, ...]:
        if not self.width and not self.depth:
            raise ValueError(f"nothing in this model can be pruned; reasons: {self.skipped}")
        start, sites = 0, []
        for fields in (*self.width, *self.depth):
            sites.append(Site(start=start, **fields))
            start += fields["width"]
        return tuple(sites)

    def visit_unet(self, unet: UNet2DConditionModel) -> None:
        for stage, path, block in _blocks(unet):
            resnets = list(getattr(block, "resnets", ()))
            attentions = [a for a in getattr(block, "attentions", ()) if a is not None]
            for part, index in _forward_order(stage, len(resnets), len(attentions)):
                name, module = f"{path}.{part}.{index}", (resnets if part == "resnets" else attentions)[index]
                if self.by_layer and _num_layers(module) > 1:
                    self.visit_layers(f"{name}.transformer_blocks", module.transformer_blocks)
                    continue
                last = index == (len(resnets) if part == "resnets" else len(attentions)) - 1
                reason = self._depth_obstacle(stage, index, module)
                removable = stage != "mid_block" and last and reason is None
                if stage != "mid_block" and last and reason is not None:
                    self.skipped[f"{name}:depth"] = reason
                if removable:
                    self._add_depth(name)
                self._visit_module(name, module, name if removable else None)

    def visit_layers(self, path: str, layers: Any) -> None:
        """A transformer's layers, each one of which can be left out."""
        for i, layer in enumerate(layers):
            name = f"{path}.{i}"
            removable = type(layer) is BasicTransformerBlock
            if removable:
                self._add_depth(name)
            self._visit_layer(name, layer, name if removable else None)

    def _add_depth(self, name: str) -> None:
        self.depth.append({"name": name, "width": 1, "kind": "depth", "block": None, "channels": 0})

    @staticmethod
    def _depth_obstacle(stage: str, index: int, module: nn.Module) -> str | None:
        """Why the identity (or the leading channels of the input) cannot stand in for a module."""
        if isinstance(module, Transformer2DModel):
            return None if module.is_input_continuous else "not a transformer over image features"
        if not isinstance(module, ResnetBlock2D):
            return f"{type(module).__name__} is neither a ResnetBlock2D nor a Transformer2DModel"
        if module.upsample is not None or module.downsample is not None:
            return "changes the resolution"
        if stage == "down_blocks" and module.in_channels != module.conv2.out_channels:
            return f"changes {module.in_channels} channels to {module.conv2.out_channels}"
        # An up block's first resnet gets the previous block's channels before the skip's, in any number.
        if stage == "up_blocks" and index == 0:
            return "its leading input channels come from another block"
        return None

    def _visit_module(self, name: str, module: nn.Module, block: str | None) -> None:
        if isinstance(module, ResnetBlock2D):
            self._add(name, "resnet", block, _resnet_obstacle(module), module)
        elif isinstance(module, Transformer2DModel) and module.is_input_continuous:
            for i, layer in enumerate(module.transformer_blocks):
                self._visit_layer(f"{name}.transformer_blocks.{i}", layer, block)
        else:
            self.skipped[name] = f"{type(module).__name__} is neither a ResnetBlock2D nor a Transformer2DModel"

    def _visit_layer(self, name: str, layer: Any, block: str | None) -> None:
        if type(layer) is not BasicTransformerBlock:
            self.skipped[name] = f"{type(layer).__name__} is not a BasicTransformerBlock"
            return
        for part in ("attn1", "attn2"):
            attention = getattr(layer, part)
            if attention is not None:
                self._add(f"{name}.{part}", "attention", block, _attention_obstacle(attention), attention)
        self._add(f"{name}.ff", "feed_forward", block, _ff_obstacle(layer.ff), layer.ff)

    def _add(self, name: str, kind: SiteKind, block: str | None, obstacle: str | None, module: nn.Module) -> None:
        width, channels = (0, 0) if obstacle else site_width(module)
        if obstacle is None and width < 2:
            obstacle = "has a single entry, which has to stay"
        if obstacle is not None:
            self.skipped[name] = obstacle
            return
        self.width.append({"name": name, "width": width, "kind": kind, "block": block, "channels": channels})


def _blocks(unet: UNet2DConditionModel) -> Iterator[tuple[str, str, nn.Module]]:
    for i, block in enumerate(unet.down_blocks):
        yield "down_blocks", f"down_blocks.{i}", block
    if unet.mid_block is not None:
        yield "mid_block", "mid_block", unet.mid_block
    for i, block in enumerate(unet.up_blocks):
        yield "up_blocks", f"up_blocks.{i}", block


def _num_layers(module: nn.Module) -> int:
    return len(module.transformer_blocks) if isinstance(module, Transformer2DModel) and module.is_input_continuous else 0


def _forward_order(stage: str, num_resnets: int, num_attentions: int) -> Iterator[tuple[str, int]]:
    """Resnets and attentions of a block as its forward runs them; the mid block starts with a resnet of its own."""
    lead = 1 if stage == "mid_block" else 0
    for i in range(max(num_resnets, num_attentions + lead)):
        if lead and 0 <= i - lead < num_attentions:
            yield "attentions", i - lead
        if i < num_resnets:
            yield "resnets", i
        if not lead and i < num_attentions:
            yield "attentions", i


def _plain(*layers: Any) -> bool:
    """True if every layer is exactly a torch layer: adapters and quantized layers do not shrink by slicing."""
    return all(type(layer) in (nn.Linear, nn.Conv2d) for layer in layers)


def _resnet_obstacle(resnet: ResnetBlock2D) -> str | None:
    if resnet.time_embedding_norm != "default":
        return f"time_embedding_norm {resnet.time_embedding_norm!r} acts after norm2, so a closed group is not absent"
    if type(resnet.norm2) is not nn.GroupNorm:
        return f"norm2 is a {type(resnet.norm2).__name__}, not a GroupNorm"
    if not _plain(resnet.conv1, resnet.conv2) or not (resnet.time_emb_proj is None or _plain(resnet.time_emb_proj)):
        return "its layers are not plain Conv2d and Linear (adapters or quantization: fuse or remove them first)"
    if resnet.conv1.groups != 1 or resnet.conv2.groups != 1:
        return "grouped convolutions"
    if type(resnet.nonlinearity) not in _ZERO_AT_ZERO:
        return f"activation {type(resnet.nonlinearity).__name__} may not be zero at zero"
    return None


def _attention_obstacle(attention: Any) -> str | None:
    if type(attention) is not Attention:
        return f"{type(attention).__name__} is not diffusers' Attention"
    if type(attention.processor) not in STANDARD_PROCESSORS:
        return f"processor {type(attention.processor).__name__} may mix heads"
    if attention.norm_q is not None or attention.norm_k is not None:
        return "query or key norms"
    if attention.group_norm is not None or attention.spatial_norm is not None or attention.add_k_proj is not None:
        return "a group norm, spatial norm or added key projection"
    if attention.fused_projections or attention.inner_dim != attention.inner_kv_dim:
        return "fused projections or fewer key heads than query heads"
    if attention.pre_only or not _plain(attention.to_q, attention.to_k, attention.to_v, attention.to_out[0]):
        return "its layers are not plain Linear (adapters or quantization: fuse or remove them first)"
    return None


def _ff_obstacle(ff: Any) -> str | None:
    if type(ff) is not FeedForward:
        return f"{type(ff).__name__} is not diffusers' FeedForward"
    if type(ff.net[0]) not in (GEGLU, GELU, ApproximateGELU):
        return f"activation {type(ff.net[0]).__name__} is neither GEGLU nor GELU"
    if not _plain(ff.net[0].proj, ff.net[2]):
        return "its layers are not plain Linear (adapters or quantization: fuse or remove them first)"
    return None
