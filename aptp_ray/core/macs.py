"""Multiply-accumulates (MACs) of a UNet, and of every code over it as a formula.

Only matrix products and convolutions count, attention with its real key length. A counter runs once on the meta device;
its figures, split by site, make the MACs of any code a polynomial in its masks: differentiable for soft codes, and for
hard codes equal, to the integer, to what the counter finds on the pruned UNet.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0, XFormersAttnProcessor
from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from aptp_ray.core.backbones import Backbone, bare, model_inputs
from aptp_ray.core.sites import Site
from aptp_ray.core.space import ArchitectureSpace


@dataclass(frozen=True)
class MacsModel:
    """MACs of codes over one UNet, for one sample and one step, at one resolution.

    MACs(code) = fixed + sum over depth entries d: code[d] * site_macs[d]
                       + sum over width entries e: code[e] * code[the depth entry covering e, if any] * site_macs[e]

    Attributes:
        space: Sites of the UNet.
        fixed: MACs that no code removes.
        site_macs: For each site in the space's order: MACs of one of its entries; for a depth site, of what its module
            computes outside width sites (projections, shortcut).
        latent_size: Height and width of the latents counted at.
        num_tokens: Length of the text sequence counted at.
    """

    space: ArchitectureSpace
    fixed: int
    site_macs: tuple[int, ...]
    latent_size: tuple[int, int]
    num_tokens: int

    @classmethod
    def measure(
        cls,
        unet: Backbone,
        latent_size: tuple[int, int],
        num_tokens: int = 77,
        space: ArchitectureSpace | None = None,
    ) -> MacsModel:
        """Counts a UNet once, on the meta device, and splits the count by site.

        Args:
            unet: The teacher.
            latent_size: Height and width of the latents that will be served.
            num_tokens: Length of the text sequence.
            space: The UNet's sites, if already known.

        Raises:
            ValueError: If a site's MACs do not divide evenly among its entries.
        """
        space = ArchitectureSpace.of(unet) if space is None else space
        counts = _count_modules(unet, latent_size, num_tokens)

        def macs_of(site: Site) -> int:
            parts = ("conv1", "time_emb_proj", "conv2") if site.kind == "resnet" else ()
            # A part that does not exist (a resnet without time embedding) counts nothing.
            return sum(counts.get(f"{site.name}.{part}", 0) for part in parts) if parts else counts[site.name]

        site_macs = {}
        inside = {site.name: 0 for site in space.depth_sites}
        for site in space.width_sites:
            total = macs_of(site)
            site_macs[site.key], remainder = divmod(total, site.width)
            if remainder:
                raise ValueError(f"{total} MACs of {site.name} do not divide evenly among its {site.width} entries")
            if site.block is not None:
                inside[site.block] += total
        site_macs |= {site.key: macs_of(site) - inside[site.name] for site in space.depth_sites}
        prunable = sum(site_macs[site.key] * site.width for site in space.sites)
        return cls(
            space=space,
            fixed=counts[""] - prunable,
            site_macs=tuple(site_macs[site.key] for site in space.sites),
            latent_size=(int(latent_size[0]), int(latent_size[1])),
            num_tokens=int(num_tokens),
        )

    @cached_property
    def total(self) -> int:
        """MACs of the full code, the teacher."""
        return self.exact(self.space.full_code())

    @cached_property
    def floor(self) -> int:
        """MACs of the smallest code: every depth entry closed, one entry in each width site (no alignment)."""
        code = torch.zeros(self.space.dim, dtype=torch.bool)
        code[[site.start for site in self.space.width_sites]] = True
        return self.exact(code)

    @cached_property
    def _own_macs(self) -> Tensor:
        """float64 [dim]: MACs of each entry by itself; integers below 2**53, so sums of them are exact."""
        return torch.tensor(self.site_macs, dtype=torch.float64)[self.space.site_of_entry]

    def macs(self, codes: Tensor) -> Tensor:
        """MACs of soft or hard codes: [..., dim] -> float64 [...], differentiable, exact for hard codes."""
        effective = self.space.effective(codes.to(torch.float64))
        return (effective * self._own_macs.to(codes.device)).sum(dim=-1) + self.fixed

    __call__ = macs

    def exact(self, code: Tensor) -> int:
        """MACs of one hard code [dim], in integers.

        Raises:
            ValueError: If the code is not a valid hard code of this space.
        """
        if code.ndim != 1:
            raise ValueError(f"exact takes one code [dim], got shape {tuple(code.shape)}; use macs(codes) for a batch")
        effective = self.space.effective(self.space.validate(code).long()).cpu()
        return self.fixed + sum(
            macs * int(effective[site.slice].sum()) for site, macs in zip(self.space.sites, self.site_macs, strict=True)
        )

    def ratio(self, codes: Tensor) -> Tensor:
        """MACs over the teacher's MACs: [..., dim] -> float64 [...], differentiable."""
        return self.macs(codes) / self.total

    def entry_macs(self, code: Tensor | None = None) -> Tensor:
        """float64 [dim]: the MACs that closing each entry saves in the full model, or in what a code has left of it.

        A depth entry saves its whole module, with all width entries inside that are open; what is closed saves nothing.

        Args:
            code: bool [dim] of what is open; None: everything.
        """
        full = self._own_macs.clone()
        if code is not None:
            full *= self.space.effective(code.to(full.device)).to(full.dtype)
        covering = self.space.depth_of_entry
        covered = covering >= 0
        depth = full[self.space.num_width :]
        depth.index_add_(0, covering[covered], full[: self.space.num_width][covered])
        return full

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return {
            "format": 1,
            "space": self.space.to_dict(),
            "fixed": self.fixed,
            "site_macs": list(self.site_macs),
            "latent_size": list(self.latent_size),
            "num_tokens": self.num_tokens,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> MacsModel:
        """Inverse of `to_dict`.

        Raises:
            ValueError: If the form is unknown.
        """
        if data.get("format") != 1:
            raise ValueError(f"unknown MACs format {data.get('format')!r}; this version reads format 1")
        height, width = data["latent_size"]
        return cls(
            space=ArchitectureSpace.from_dict(data["space"]),
            fixed=data["fixed"],
            site_macs=tuple(data["site_macs"]),
            latent_size=(height, width),
            num_tokens=data["num_tokens"],
        )


def count_macs(unet: Any, latent_size: tuple[int, int], num_tokens: int = 77) -> int:
    """MACs of one forward of any UNet (teacher or pruned) for one sample, by torch's counter on the meta device.

    Args:
        unet: The UNet; neither changed nor moved.
        latent_size: Height and width of the latents.
        num_tokens: Length of the text sequence.

    Raises:
        ValueError: If the UNet needs inputs that are not known here (projected class labels, image embeddings).
    """
    return _count_modules(unet, latent_size, num_tokens)[""]


def _count_modules(unet: Any, latent_size: tuple[int, int], num_tokens: int) -> dict[str, int]:
    """MACs by module path; "" is the whole UNet."""
    height, width = latent_size
    if min(height, width, num_tokens) < 1:
        raise ValueError(f"latent_size={latent_size} and num_tokens={num_tokens} must be positive")
    skeleton = _meta_copy(bare(unet))
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        skeleton(**_meta_inputs(skeleton, height, width, num_tokens))
    root = type(skeleton).__name__
    counts = {"": counter.get_total_flops() // 2}
    for path, by_operator in counter.get_flop_counts().items():
        if path.startswith(f"{root}."):
            # The counter charges two floating point operations to a multiply-accumulate.
            counts[path.removeprefix(f"{root}.")] = sum(by_operator.values()) // 2
    return counts


def _meta_copy(unet: nn.Module) -> Any:
    """Copy without storage, hooks or fused attention kernels: shapes only."""
    memo: dict[int, Any] = {}
    for tensor in (*unet.parameters(), *unet.buffers()):
        dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
        shape_only = torch.empty_like(tensor, device="meta", dtype=dtype)
        memo[id(tensor)] = nn.Parameter(shape_only, False) if isinstance(tensor, nn.Parameter) else shape_only
    for module in unet.modules():
        # Hooks may point at things outside the UNet, which a deep copy would drag along.
        for name, value in vars(module).items():
            if name.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called")):
                memo[id(value)] = OrderedDict()
    skeleton = copy.deepcopy(unet, memo).eval()
    for module in skeleton.modules():
        vars(module).pop("forward", None)  # a compiled forward is the original's
        if isinstance(module, Attention) and type(module.processor) in (AttnProcessor2_0, XFormersAttnProcessor):
            # Which fused kernel a device picks, and whether the counter knows it, varies; plain products do not.
            module.set_processor(AttnProcessor())
    return skeleton


def _meta_inputs(unet: Any, height: int, width: int, num_tokens: int) -> dict[str, Any]:
    """One sample's inputs, for the conditionings of Stable Diffusion 1.5, 2.1, XL, PixArt and the like."""
    config: Any = unet.config

    def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device="meta")

    if isinstance(unet, PixArtTransformer2DModel):
        text = zeros(1, num_tokens, config.caption_channels or config.cross_attention_dim)
        return model_inputs(unet, zeros(1, config.in_channels, height, width), zeros(1, dtype=torch.long), text)

    if config.encoder_hid_dim_type not in (None, "text_proj"):
        raise ValueError(f"encoder_hid_dim_type={config.encoder_hid_dim_type!r} needs image embeddings: not countable")
    if config.addition_embed_type not in (None, "text", "text_time"):
        raise ValueError(f"addition_embed_type={config.addition_embed_type!r} needs image embeddings: not countable")
    if config.class_embed_type not in (None, "timestep"):
        raise ValueError(f"class_embed_type={config.class_embed_type!r} needs projected labels: not countable")
    cross_dim = config.cross_attention_dim
    text_dim = config.encoder_hid_dim or (cross_dim if isinstance(cross_dim, int) else cross_dim[0])
    inputs: dict[str, Any] = {
        "sample": zeros(1, config.in_channels, height, width),
        "timestep": zeros(1, dtype=torch.long),
        "encoder_hidden_states": zeros(1, num_tokens, text_dim),
    }
    if config.addition_embed_type == "text_time":
        # Pooled text and embedded time ids are concatenated to this width; how it is split does not change the MACs.
        pooled = config.projection_class_embeddings_input_dim - config.addition_time_embed_dim
        inputs["added_cond_kwargs"] = {"text_embeds": zeros(1, pooled), "time_ids": zeros(1, 1)}
    if unet.class_embedding is not None:
        inputs["class_labels"] = zeros(1, dtype=torch.long)
    return inputs
