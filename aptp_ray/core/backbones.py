"""The denoising models that can be a teacher: how each is called, and what its blocks are.

`UNet2DConditionModel` (Stable Diffusion 1.x, 2.x, XL and their variants) and `PixArtTransformer2DModel` (PixArt-alpha and
-Sigma). The rest of the core calls either through `model_inputs`, and the sampler, which calls a UNet, through `as_unet`.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn

Backbone = UNet2DConditionModel | PixArtTransformer2DModel

STOCK_CLASSES: tuple[type, ...] = (UNet2DConditionModel, PixArtTransformer2DModel)

# Pixels to a latent position in Stable Diffusion XL and PixArt, whose models are told the image's size in pixels.
_PIXELS_PER_LATENT = 8


def stock_class(model: nn.Module) -> Any:
    """The diffusers class that a stock or pruned model is of.

    Raises:
        TypeError: If it is of none that can be a teacher (or is wrapped by something).
    """
    for kind in STOCK_CLASSES:
        if isinstance(model, kind):
            return kind
    raise TypeError(
        f"expected a diffusers {' or '.join(kind.__name__ for kind in STOCK_CLASSES)}, got {type(model).__name__}; "
        "unwrap it first (.unet of a GatedUNet, .module of a DDP model, ._orig_mod of a compiled one)"
    )


def bare(model: Any) -> Any:
    """The diffusers model inside of a GatedUNet or of what `as_unet` returned, or the model itself."""
    while not isinstance(model, STOCK_CLASSES) and hasattr(model, "unet"):
        model = model.unet
    return model


def blocks_of(model: Any) -> list[nn.Module]:
    """The blocks whose outputs the `block` loss compares, in forward order."""
    if isinstance(model, PixArtTransformer2DModel):
        return list(model.transformer_blocks)
    return [*model.down_blocks, *([] if model.mid_block is None else [model.mid_block]), *model.up_blocks]


def model_inputs(
    model: Any, sample: Tensor, timesteps: Tensor, text_states: Tensor, text_mask: Tensor | None = None
) -> dict[str, Any]:
    """Keyword arguments of a model's forward, its further conditions included.

    Args:
        model: Stock, pruned, or either of them wrapped.
        sample: [batch, channels, height, width].
        timesteps: [batch].
        text_states: [batch, tokens, width]. For a model that also reads a pooled text (Stable Diffusion XL), the last
            row is not a token's: it starts with the pooled text, and is filled up with zeros.
        text_mask: bool [batch, tokens] of real tokens, or None: of a transformer, tokens whose states are all zero are padding.
    """
    stock = bare(model)
    inputs: dict[str, Any] = {"timestep": timesteps, "encoder_hidden_states": text_states}
    height, width = (float(_PIXELS_PER_LATENT * size) for size in sample.shape[-2:])
    rows = sample.shape[0]
    if isinstance(stock, PixArtTransformer2DModel):
        text_mask = text_states.ne(0).any(dim=-1) if text_mask is None else text_mask
        inputs |= {"hidden_states": sample, "added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}
        if stock.use_additional_conditions:
            inputs["added_cond_kwargs"] = {
                "resolution": sample.new_tensor([[height, width]]).repeat(rows, 1),
                "aspect_ratio": sample.new_tensor([[height / width]]).repeat(rows, 1),
            }
    else:
        inputs["sample"] = sample
        pooled = pooled_width(stock)
        if pooled is not None:
            inputs["encoder_hidden_states"] = text_states[:, :-1]
            # Original size, upper left corner of the crop, and target size (Podell et al. 2023, section 2.2).
            ids = sample.new_tensor([[height, width, 0.0, 0.0, height, width]]).repeat(rows, 1)
            inputs["added_cond_kwargs"] = {"text_embeds": text_states[:, -1, :pooled], "time_ids": ids}
            text_mask = None if text_mask is None else text_mask[:, :-1]
    return inputs if text_mask is None else inputs | {"encoder_attention_mask": text_mask}


def pooled_width(model: Any) -> int | None:
    """Width of the pooled text that a model reads beside the tokens' states (Stable Diffusion XL), or None."""
    config = bare(model).config
    if config.get("addition_embed_type") != "text_time":
        return None
    # The embedding of six sizes stands beside the pooled text.
    return int(config["projection_class_embeddings_input_dim"]) - 6 * int(config["addition_time_embed_dim"])


def prediction_of(output: Tensor, sample: Tensor) -> Tensor:
    """The model's prediction [batch, channels, height, width]: PixArt's second half is a variance, which no sampler reads."""
    return output[:, : sample.shape[1]]


def as_unet(model: Any) -> Any:
    """A model that is called as `unet(sample, timesteps, encoder_hidden_states=...)`, by which alone it is conditioned.

    A stock Stable Diffusion 1.x or 2.x UNet is one already and comes back as it is, and so does what this has returned.
    """
    stock = bare(model)
    plain = isinstance(stock, UNet2DConditionModel) and pooled_width(stock) is None
    return model if plain or isinstance(model, AsUNet) else AsUNet(model)


class AsUNet(nn.Module):
    """Calls a model with further conditions as if it were a Stable Diffusion UNet.

    Text states carry all of the text's conditions: of a transformer that reads padded texts, tokens whose states are all
    zero are padding; of a UNet that reads a pooled text, the last row holds it (see `model_inputs`).

    Attributes:
        unet: The model itself.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.unet = model

    @property
    def config(self) -> Any:
        """The model's config; a transformer's says in a UNet's words how wide texts are and how often a side is halved."""
        config = bare(self.unet).config
        if "patch_size" not in config:
            return config
        halvings = int(config["patch_size"]).bit_length() - 1
        words = {
            "block_out_channels": (config["in_channels"],) * (1 + halvings),
            "cross_attention_dim": config["caption_channels"] or config["cross_attention_dim"],
        }
        return type(config)({**config, **words})

    @property
    def dtype(self) -> torch.dtype:
        return bare(self.unet).dtype

    @property
    def device(self) -> torch.device:
        return bare(self.unet).device

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        """[batch, channels, height, width] -> the same, in diffusers' output type or as a tuple of one."""
        inputs = model_inputs(self.unet, sample, timestep, encoder_hidden_states, encoder_attention_mask)
        output = prediction_of(self.unet(**inputs, return_dict=False)[0], sample)
        return Transformer2DModelOutput(sample=output) if return_dict else (output,)
