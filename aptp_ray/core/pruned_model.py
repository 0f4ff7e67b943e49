"""Pruned diffusion models: stock diffusers classes with fewer groups, heads, chunks and blocks.

This file needs torch and diffusers alone. `save_pretrained` puts a copy of it beside the weights, so that what was saved
opens where nothing else of its makers is installed: `AutoModel.from_pretrained(directory, trust_remote_code=True)`.
"""

from __future__ import annotations

import inspect
import math
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock, FeedForward
from diffusers.models.attention_processor import Attention
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn

FEED_FORWARD_CHUNKS = 32
"""A feed-forward's inner width is pruned in this many chunks (fewer where the width does not divide)."""


def site_width(module: Any) -> tuple[int, int]:
    """How many entries a resnet, an attention or a feed-forward has, and how many channels one of them stands for."""
    if isinstance(module, ResnetBlock2D):
        return module.norm2.num_groups, module.norm2.num_channels // module.norm2.num_groups
    if isinstance(module, Attention):
        return module.heads, module.inner_dim // module.heads
    inner = module.net[2].in_features
    chunks = math.gcd(FEED_FORWARD_CHUNKS, inner)
    return chunks, inner // chunks


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


class ClosedLayer(nn.Module):
    """Stands where a transformer's layer was removed: passes on its input."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[batch, tokens, width] -> the same."""
        return hidden_states


def shrink(model: nn.Module, kept: Mapping[str, Tensor], closed: Iterable[str]) -> None:
    """Cuts a full model down, in place; parameters that shrink are replaced by copies.

    Args:
        model: Stock UNet2DConditionModel or PixArtTransformer2DModel.
        kept: Module path of a resnet, attention or feed-forward -> bool [entries], True for what stays.
        closed: Module paths of resnets, transformers and transformer layers that go as a whole.
    """
    closed = set(closed)
    for name, keep in kept.items():
        if bool(keep.all()) or any(name == gone or name.startswith(f"{gone}.") for gone in closed):
            continue
        module: Any = model.get_submodule(name)
        # [kept * channels]: which of the site's channels stay
        channels = keep.repeat_interleave(site_width(module)[1]).nonzero().flatten()
        _CUTS[_kind(module)](module, channels, int(keep.sum()))
    for name in closed:
        parent, _, index = name.rpartition(".")
        removed: Any = model.get_submodule(name)
        siblings: Any = model.get_submodule(parent)
        siblings[int(index)] = _stand_in(removed).train(removed.training)


def _stand_in(module: Any) -> nn.Module:
    if isinstance(module, ResnetBlock2D):
        return ClosedResnet(module.conv2.out_channels)
    return ClosedTransformer() if isinstance(module, Transformer2DModel) else ClosedLayer()


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
    attention.heads = heads
    # Of a single head, diffusers' attention slicing would make slices of half a head.
    attention.sliceable_head_dim = max(2, heads)
    attention.inner_dim = attention.inner_kv_dim = len(channels)


def _cut_feed_forward(ff: Any, channels: Tensor, _chunks: int) -> None:
    inner = ff.net[2].in_features
    # GEGLU projects to [values, gates]: both halves of a channel stay together.
    outputs = torch.cat([channels, channels + inner]) if isinstance(ff.net[0], GEGLU) else channels
    _keep_outputs(ff.net[0].proj, outputs)
    _keep_inputs(ff.net[2], channels)


_CUTS: dict[type, Callable[[Any, Tensor, int], None]] = {
    ResnetBlock2D: _cut_resnet,
    Attention: _cut_attention,
    FeedForward: _cut_feed_forward,
}
_OUTPUT_SIZES: dict[type, str] = {nn.Linear: "out_features", nn.Conv2d: "out_channels", nn.GroupNorm: "num_channels"}
_INPUT_SIZES: dict[type, str] = {nn.Linear: "in_features", nn.Conv2d: "in_channels"}


def _kind(module: nn.Module) -> type:
    return next(kind for kind in _CUTS if isinstance(module, kind))


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


def read_pruning(model: nn.Module, pruning: Mapping[str, Any]) -> tuple[dict[str, Tensor], list[str]]:
    """Reads the config's `pruning` for a full model: what `shrink` takes.

    Raises:
        ValueError: If it does not fit the model.
    """
    if pruning.get("format") != 1:
        raise ValueError(f"unknown pruning format {pruning.get('format')!r} in config.json; this version reads 1")
    modules = dict(model.named_modules())
    fits = [(name, tuple(_CUTS)) for name in pruning["kept"]]
    fits += [(name, (ResnetBlock2D, Transformer2DModel, BasicTransformerBlock)) for name in pruning["closed"]]
    unknown = sorted(name for name, kinds in fits if not isinstance(modules.get(name), kinds))
    if unknown:
        raise ValueError(
            f"config.json prunes {unknown[:3]}, which this model does not have: "
            "its other fields are not those of the teacher that was pruned"
        )
    kept = {name: _from_ranges(ranges, name, site_width(modules[name])[0]) for name, ranges in pruning["kept"].items()}
    return kept, list(pruning["closed"])


def _from_ranges(text: str, name: str, width: int) -> Tensor:
    """ "0-2,5" -> bool [width]."""
    mask = torch.zeros(width, dtype=torch.bool)
    for part in text.split(","):
        first, _, last = part.partition("-")
        start, stop = int(first), int(last or first) + 1
        if not 0 <= start < stop <= width:
            raise ValueError(f"config.json keeps {part!r} of {name}, which has entries 0 to {width - 1}")
        mask[start:stop] = True
    return mask


def _with_base_parameters(base: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Spells out the base class's parameters: diffusers reads the config's fields from the signature."""

    def decorate(init: Callable[..., None]) -> Callable[..., None]:
        own, stock = inspect.signature(init), inspect.signature(base.__init__)  # type: ignore[misc]
        init.__signature__ = own.replace(  # type: ignore[attr-defined]
            parameters=[*stock.parameters.values(), own.parameters["pruning"]]
        )
        return init

    return decorate


class _Pruned:
    """What pruned models of all architectures share; stands before the stock class."""

    _auto_class = "AutoModel"  # config.json then names this file, which `save_pretrained` puts beside it

    @classmethod
    def extract_init_dict(cls, config_dict: Mapping[str, Any], **kwargs: Any) -> Any:
        """As diffusers' own, without what names this file: it would warn that no argument is called so."""
        known = {name: value for name, value in config_dict.items() if name != "auto_map"}
        return super().extract_init_dict(known, **kwargs)  # type: ignore[misc]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """As diffusers' `from_pretrained`, but every weight must be there, in the right shape.

        Raises:
            ValueError: If a weight is missing, left over, or of another shape, or `ignore_mismatched_sizes` is asked
                for: diffusers would leave such weights at random values with no more than a warning.
        """
        if kwargs.pop("ignore_mismatched_sizes", False):
            raise ValueError("a pruned model is never loaded with ignore_mismatched_sizes: weights would be random")
        wants_info = kwargs.pop("output_loading_info", False)
        loaded: Any = super().from_pretrained(  # type: ignore[misc]
            pretrained_model_name_or_path, output_loading_info=True, **kwargs
        )
        model, info = loaded
        wrong = {what: sorted(map(str, keys)) for what, keys in info.items() if keys}
        if wrong:
            raise ValueError(
                f"the weights in {pretrained_model_name_or_path} do not fit their config.json: "
                + "; ".join(f"{what}: {len(keys)}, such as {keys[:3]}" for what, keys in wrong.items())
                + ". The two files are probably not of the same expert; write both again with save_pretrained."
            )
        return (model, info) if wants_info else model

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """As diffusers' `save_pretrained`, with a copy of this file beside config.json and the weights."""
        source, target = Path(__file__), Path(save_directory) / f"{__name__.rpartition('.')[2]}.py"
        if kwargs.get("is_main_process", True):
            target.parent.mkdir(parents=True, exist_ok=True)
            if not (target.exists() and target.samefile(source)):
                shutil.copyfile(source, target)
        super().save_pretrained(save_directory, **kwargs)  # type: ignore[misc]

    def _cut(self, pruning: Mapping[str, Any] | None) -> None:
        if pruning is not None:
            shrink(self, *read_pruning(self, pruning))  # type: ignore[arg-type]


class PrunedUNet2DConditionModel(_Pruned, UNet2DConditionModel):
    """A UNet2DConditionModel with fewer groups, heads, chunks and blocks.

    Takes the arguments of `UNet2DConditionModel` (those of the teacher) and `pruning`. With `pruning=None` it is the
    full UNet.
    """

    @register_to_config
    @_with_base_parameters(UNet2DConditionModel)
    def __init__(self, *args: Any, pruning: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Builds the teacher's UNet and cuts it.

        Args:
            *args: Of UNet2DConditionModel.
            pruning: What to keep: {"format": 1, "kept": {width site: "0-3,7"}, "closed": [depth sites]}. A width site
                that is not named is whole.
            **kwargs: Of UNet2DConditionModel.

        Raises:
            ValueError: If `pruning` does not fit the UNet that the other arguments describe.
        """
        super().__init__(*args, **kwargs)
        self._cut(pruning)

    def _convert_ip_adapter_attn_to_diffusers(self, state_dicts: Any, **kwargs: Any) -> dict[str, Any]:
        """The processors of a teacher's IP-Adapter, with the heads that stayed; diffusers' own would have the teacher's."""
        own = ("pruning", "auto_map", "_class_name")
        with torch.device("meta"):
            full: Any = UNet2DConditionModel.from_config({k: v for k, v in self.config.items() if k not in own})
        processors = full._convert_ip_adapter_attn_to_diffusers(state_dicts, **kwargs)
        pruning = self.config.get("pruning") or {"format": 1, "kept": {}, "closed": []}
        for name, keep in read_pruning(full, pruning)[0].items():
            processor = processors.get(f"{name}.processor")
            channels = keep.repeat_interleave(site_width(full.get_submodule(name))[1]).nonzero().flatten()
            for layer in (*getattr(processor, "to_k_ip", ()), *getattr(processor, "to_v_ip", ())):
                _keep_outputs(layer, channels)
        return {name: processors[name] for name in self.attn_processors}


class PrunedPixArtTransformer2DModel(_Pruned, PixArtTransformer2DModel):
    """A PixArtTransformer2DModel with fewer heads, chunks and blocks; arguments as `PrunedUNet2DConditionModel`'s."""

    @register_to_config
    @_with_base_parameters(PixArtTransformer2DModel)
    def __init__(self, *args: Any, pruning: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Builds the teacher's transformer and cuts it; see `PrunedUNet2DConditionModel`."""
        super().__init__(*args, **kwargs)
        self._cut(pruning)


PRUNED_CLASSES: tuple[type, ...] = (PrunedUNet2DConditionModel, PrunedPixArtTransformer2DModel)
