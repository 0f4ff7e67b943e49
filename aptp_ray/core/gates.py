"""Masks on a stock diffusers model, by hooks: nothing forked, the state dict unchanged.

Each sample of a batch runs under its own code. A width mask acts where a zero is exactly an absent channel: after
`norm2`, before `to_out[0]` by head, before `ff.net[2]` by chunk. A depth mask m mixes (1 - m) * x + m * module(x).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from aptp_ray.core.backbones import Backbone
from aptp_ray.core.sites import Site
from aptp_ray.core.space import ArchitectureSpace

GatePlacement = Literal["after_norm", "before_norm"]


@dataclass(eq=False)
class _Masks:
    """What the hooks share. Apart from the module, so that codes that are Parameters are not registered on it."""

    codes: Tensor | None = None
    """[codes, dim] while inside `use`."""
    running: Tensor | None = None
    """[batch, dim] while the UNet's forward, or the recomputation of a part of it, runs."""

    def of(self, site: Site, like: Tensor) -> Tensor | None:
        """[batch, width] of a site in the dtype of `like`, or None when no codes are in use."""
        if self.running is None:
            return None
        if self.running.shape[0] != like.shape[0]:
            raise ValueError(
                f"{site.name} got a batch of {like.shape[0]} under codes for {self.running.shape[0]}: feed-forward "
                "chunking over the batch (enable_forward_chunking with dim=0) cannot tell samples apart; use dim=1"
            )
        return self.running[:, site.slice].to(like.dtype)

    @contextmanager
    def running_as(self, masks: Tensor | None) -> Iterator[None]:
        previous, self.running = self.running, masks
        try:
            yield
        finally:
            self.running = previous


class GatedUNet(nn.Module):
    """A UNet whose samples each run under a code of their own.

    Codes act inside `use` only; outside, this is the plain UNet. `unet` is the wrapped module itself: its state dict
    keeps its keys, and calling `gated.unet(...)` (as a pipeline would) inside `use` is the same as calling this.

    With the UNet's own gradient checkpointing, backward may run after `use` has ended: what is recomputed runs under
    the codes of its forward. If you checkpoint the whole UNet yourself, call backward inside `use`.

    Attributes:
        unet: The wrapped UNet.
        space: Its sites.
    """

    def __init__(
        self,
        unet: Backbone,
        space: ArchitectureSpace | None = None,
        *,
        gate_placement: GatePlacement = "after_norm",
    ) -> None:
        """Puts the hooks on `unet`.

        Args:
            unet: The UNet to wrap, in place.
            space: Its sites, if already known.
            gate_placement: Where a resnet's mask acts, after its `norm2` or, as in the reference implementation, before:
                there the norm undoes what a mask scales, and a closed group still emits its norm's bias, so that under a
                hard code the output is *not* that of the pruned UNet. Sites, MACs, hardening and pruning stay the same.

        Raises:
            ValueError: If the placement is unknown.
        """
        super().__init__()
        if gate_placement not in ("after_norm", "before_norm"):
            raise ValueError(f"unknown gate_placement {gate_placement!r}; one of 'after_norm', 'before_norm'")
        self.space = ArchitectureSpace.of(unet) if space is None else space
        self.unet = unet
        self._masks = _Masks()
        self._handles: list[RemovableHandle] = _hook_run(unet, self._masks)
        for site in self.space.sites:
            self._handles.append(_hook_site(unet.get_submodule(site.name), site, self._masks, gate_placement))

    @property
    def config(self) -> Any:
        """The UNet's config."""
        return self.unet.config

    @property
    def dtype(self) -> torch.dtype:
        """The UNet's dtype."""
        return self.unet.dtype

    @property
    def device(self) -> torch.device:
        """The UNet's device."""
        return self.unet.device

    @contextmanager
    def use(self, codes: Tensor) -> Iterator[GatedUNet]:
        """Runs every forward inside the block under `codes`.

        Args:
            codes: bool or float [codes, dim], or [dim] for one code. The sample batch must be a multiple k of the
                number of codes, which then repeat whole, k times: the order of `torch.cat([uncond, cond])` in
                classifier-free guidance.

        Raises:
            ValueError: If the shape does not fit the space; on forward, if the batch is not a multiple.
        """
        if codes.ndim not in (1, 2):
            raise ValueError(f"codes must be [codes, dim] or [dim], got shape {tuple(codes.shape)}")
        self.space.check(codes)
        previous, self._masks.codes = self._masks.codes, codes.reshape(-1, self.space.dim)
        try:
            yield self
        finally:
            self._masks.codes = previous

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Same arguments and return value as the UNet's forward."""
        return self.unet(*args, **kwargs)

    def remove(self) -> Backbone:
        """Takes all hooks off and returns the UNet; afterwards `use` has no effect."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        return self.unet


def _hook_run(unet: Backbone, masks: _Masks) -> list[RemovableHandle]:
    """Hooks on the whole UNet: its batch decides how often codes repeat."""
    checkpointing: list[Any] = [module for module in unet.modules() if hasattr(module, "gradient_checkpointing")]
    originals: list[tuple[Any, Callable[..., Any]]] = []

    def capture(original: Callable[..., Any]) -> Callable[..., Any]:
        # diffusers calls `_gradient_checkpointing_func(module, *args)`; the recomputation comes in backward, when other
        # codes or none may be in use, so the part remembers the masks that it first ran under.
        def checkpoint(module: Callable[..., Any], *args: Any) -> Any:
            at_forward = masks.running

            def run(*inputs: Any) -> Any:
                with masks.running_as(at_forward):
                    return module(*inputs)

            return original(run, *args)

        return checkpoint

    def enter(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if masks.codes is None:
            return
        # A UNet names its input `sample`, a transformer `hidden_states`.
        sample: Tensor = args[0] if args else kwargs["sample" if "sample" in kwargs else "hidden_states"]
        batch, codes = sample.shape[0], masks.codes.shape[0]
        if codes == 0 or batch % codes:
            raise ValueError(
                f"a batch of {batch} samples is no multiple of the {codes} codes in use; give one code a sample "
                "(classifier-free guidance repeats them by itself)"
            )
        masks.running = masks.codes.to(sample.device).repeat(batch // codes, 1)
        for module in checkpointing:
            if module.gradient_checkpointing:
                originals.append((module, module._gradient_checkpointing_func))
                module._gradient_checkpointing_func = capture(module._gradient_checkpointing_func)

    def leave(*_: Any) -> None:
        masks.running = None
        while originals:
            module, original = originals.pop()
            module._gradient_checkpointing_func = original

    # always_call: an error in the middle of a forward must not leave masks behind.
    return [
        unet.register_forward_pre_hook(enter, with_kwargs=True),
        unet.register_forward_hook(leave, always_call=True),
    ]


def _hook_site(module: Any, site: Site, masks: _Masks, placement: GatePlacement) -> RemovableHandle:
    if site.kind == "resnet" and placement == "before_norm":
        return module.norm2.register_forward_pre_hook(_before_norm(site, masks))
    if site.kind == "resnet":
        return module.norm2.register_forward_hook(_after_norm(site, masks))
    if site.kind == "attention":
        return module.to_out[0].register_forward_pre_hook(_before_linear(site, masks))
    if site.kind == "feed_forward":
        return module.net[2].register_forward_pre_hook(_before_linear(site, masks))
    return module.register_forward_hook(_around_module(site, masks), with_kwargs=True)


def _after_norm(site: Site, masks: _Masks) -> Callable[..., Any]:
    def hook(_module: nn.Module, _args: Any, output: Tensor) -> Tensor | None:
        mask = masks.of(site, output)
        return None if mask is None else output * _by_channel(mask, site)

    return hook


def _before_norm(site: Site, masks: _Masks) -> Callable[..., Any]:
    def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        mask = masks.of(site, args[0])
        return None if mask is None else (args[0] * _by_channel(mask, site), *args[1:])

    return hook


def _by_channel(mask: Tensor, site: Site) -> Tensor:
    """[batch, groups] -> [batch, channels, 1, 1]."""
    return mask.repeat_interleave(site.channels, dim=1)[:, :, None, None]


def _before_linear(site: Site, masks: _Masks) -> Callable[..., Any]:
    def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        mask = masks.of(site, args[0])
        if mask is None:
            return None
        # [batch, entries] -> [batch, 1, entries * channels]
        return (args[0] * mask.repeat_interleave(site.channels, dim=1)[:, None, :], *args[1:])

    return hook


def _around_module(site: Site, masks: _Masks) -> Callable[..., Any]:
    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        # ResnetBlock2D names its input `input_tensor`, transformers and their layers `hidden_states`.
        x: Tensor = args[0] if args else kwargs["input_tensor" if "input_tensor" in kwargs else "hidden_states"]
        wrapped = not isinstance(output, Tensor)
        y: Tensor = output[0] if wrapped else output
        mask = masks.of(site, y)
        if mask is None:
            return None
        m = mask.reshape(-1, *[1] * (y.ndim - 1))  # [batch, 1, 1, 1], or [batch, 1, 1] for tokens
        # In an up block the input is [hidden, skip]: its leading channels are what flows on without the module.
        mixed = (1 - m) * x[:, : y.shape[1]].to(y.dtype) + m * y
        if not wrapped:
            return mixed
        return (mixed,) if isinstance(output, tuple) else Transformer2DModelOutput(sample=mixed)

    return hook
