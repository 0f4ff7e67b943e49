"""Running a model and looking into it: its call in its own precision, what its blocks put out, and its compilation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from aptp_ray.core.backbones import blocks_of, model_inputs, prediction_of


class BlockRecorder:
    """Records the outputs of each block of a UNet (down, mid, up) or layer of a transformer, in forward order.

    The hooks stay, and put what they see into one list for good: a compiled UNet has traced them, and would not notice
    others that come later.
    """

    def __init__(self, unet: Any) -> None:
        """Puts the hooks on `unet`, a stock or pruned model."""
        self._outputs: list[Tensor] = []
        self._handles = [unet.register_forward_pre_hook(self._clear)]
        self._handles += [block.register_forward_hook(self._record) for block in blocks_of(unet)]

    def take(self) -> list[Tensor]:
        """The latest forward's tensors, part of its graph; lets go of them.

        [batch, channels, height, width], or of a transformer [batch, tokens, width].
        """
        taken = list(self._outputs)
        self._outputs.clear()
        return taken

    def remove(self) -> None:
        """Takes the hooks off."""
        for handle in self._handles:
            handle.remove()

    def _clear(self, *_: Any) -> None:
        self._outputs.clear()

    def _record(self, _module: nn.Module, _args: Any, output: Any) -> None:
        # A down block returns its hidden states and the skips.
        self._outputs.append(output[0] if isinstance(output, tuple) else output)


def run_unet(unet: Any, sample: Tensor, timesteps: Tensor, text_states: Tensor, text_mask: Tensor | None) -> Tensor:
    """Calls a model, stock, pruned or gated, in its own precision.

    Args:
        unet: UNet2DConditionModel, PixArtTransformer2DModel, pruned ones, or a GatedUNet.
        sample: [batch, channels, height, width].
        timesteps: [batch].
        text_states: [batch, tokens, text_dim]; see `backbones.model_inputs`.
        text_mask: bool [batch, tokens] of real tokens, or None.

    Returns:
        [batch, channels, height, width].
    """
    dtype = unet.dtype
    sample = sample.to(dtype)
    # diffusers turns `encoder_attention_mask` into a bias, (1 - mask) * -10000, so None and all ones are the same.
    inputs = model_inputs(unet, sample, timesteps, text_states.to(dtype), text_mask)
    return prediction_of(unet(**inputs).sample, sample)


def compile_unet(unet: Any, **options: Any) -> Any:
    """Compiles a UNet's forward, in place: class, state dict and files stay as they are.

    The hooks on the UNet as a whole, which hand a GatedUNet's masks to those inside, stay outside of the graph; all hooks
    inside have to be there already: wrap the UNet in a GatedUNet and give it to its objective first.

    Args:
        unet: stock or pruned, gated or not.
        **options: of `torch.compile`.
    """
    unet.forward = torch.compile(unet.forward, **options)
    return unet


@contextmanager
def eager(unet: Any) -> Iterator[Any]:
    """Takes a compiled UNet's compilation away for the time of the block: for calls of shapes that come but once."""
    compiled = vars(unet).pop("forward", None)
    try:
        yield unet
    finally:
        if compiled is not None:
            unet.forward = compiled
