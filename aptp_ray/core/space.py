"""The layout of a code over a model's prunable sites (APTP, section 3.1).

A code is a vector with one entry for everything that can be removed: first the entries of all width sites in forward
order (a ResNet's GroupNorm groups, an attention's heads, a feed-forward's chunks), then one entry for each depth site
(of a UNet, the last resnet and the last transformer of each down and up block; of a transformer, each layer). What cannot
be pruned exactly is not a site; it is listed in `ArchitectureSpace.skipped` with the reason. `sites.py` finds both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from aptp_ray.core.backbones import Backbone, stock_class
from aptp_ray.core.sites import DepthSites, Site, find_sites


@dataclass(frozen=True)
class ArchitectureSpace:
    """All sites of one UNet; the layout of every code, mask and logit vector over it.

    Attributes:
        sites: Width sites in forward order, then depth sites in forward order.
        skipped: Module path -> why the module is left whole. Not part of the identity of a space.
    """

    sites: tuple[Site, ...]
    skipped: Mapping[str, str] = field(default_factory=dict, compare=False)

    @classmethod
    def of(cls, unet: Backbone, *, depth: DepthSites = "modules") -> ArchitectureSpace:
        """Finds the sites of a model, on any device including meta.

        Args:
            unet: A diffusers UNet2DConditionModel or PixArtTransformer2DModel.
            depth: What of a UNet's transformers of several layers can be left out: see `find_sites`.

        Raises:
            TypeError: If `unet` is of another class (or is wrapped by something).
            ValueError: If nothing in it can be pruned.
        """
        stock_class(unet)
        if depth not in ("modules", "layers"):
            raise ValueError(f"unknown depth {depth!r}; one of 'modules', 'layers'")
        sites, skipped = find_sites(unet, depth)
        return cls(sites=sites, skipped=skipped)

    @cached_property
    def depth(self) -> DepthSites:
        """How depth sites were asked for: a UNet's whole transformers, or their layers."""
        return "layers" if any(".transformer_blocks." in site.name for site in self.depth_sites) else "modules"

    @cached_property
    def width_sites(self) -> tuple[Site, ...]:
        """Sites of kind "resnet", "attention" or "feed_forward"."""
        return tuple(site for site in self.sites if site.kind != "depth")

    @cached_property
    def depth_sites(self) -> tuple[Site, ...]:
        """Sites of kind "depth"."""
        return tuple(site for site in self.sites if site.kind == "depth")

    @cached_property
    def num_width(self) -> int:
        """Number of width entries: `code[..., :num_width]` is a code's width part."""
        return sum(site.width for site in self.width_sites)

    @property
    def num_depth(self) -> int:
        """Number of depth entries: `code[..., num_width:]` is a code's depth part."""
        return len(self.depth_sites)

    @property
    def dim(self) -> int:
        """Length of a code."""
        return self.num_width + self.num_depth

    @cached_property
    def site_of_entry(self) -> Tensor:
        """int64 [dim]: index in `sites` of the site that each entry belongs to."""
        widths = torch.tensor([site.width for site in self.sites])
        return torch.repeat_interleave(torch.arange(len(self.sites)), widths)

    @cached_property
    def depth_of_entry(self) -> Tensor:
        """int64 [num_width]: for each width entry, the depth entry (0-based in the depth part) covering it, or -1."""
        index = {site.name: i for i, site in enumerate(self.depth_sites)}
        covering = [index[site.block] if site.block else -1 for site in self.width_sites]
        return torch.repeat_interleave(torch.tensor(covering), torch.tensor([s.width for s in self.width_sites]))

    @cached_property
    def depth_rank(self) -> tuple[int, ...]:
        """Depth entries (0-based in the depth part), most protected first.

        The blocks nearest to the model's input and output touch the finest resolution and matter most, so the rank goes
        from the outermost block in, and alternates: an up block, then the down block that mirrors it. Inside an up
        block the module nearest to the output comes first, inside a down block the one nearest to the input. Layers of
        the mid block come last. The second half of a transformer's layers stands for up blocks of one layer each.
        """
        down: dict[str, list[int]] = {}
        up: dict[str, list[int]] = {}
        middle: list[int] = []
        for index, site in enumerate(self.depth_sites):
            stage, block = site.name.split(".")[:2]
            if stage == "mid_block":
                middle.append(index)
            else:
                first = stage == "down_blocks" or (stage == "transformer_blocks" and 2 * index < self.num_depth)
                (down if first else up).setdefault(block, []).append(index)
        outermost_up: list[list[int]] = [entries[::-1] for entries in reversed(up.values())]
        pairs = zip_longest(outermost_up, down.values(), fillvalue=())
        return (*(index for pair in pairs for entries in pair for index in entries), *middle)

    def full_code(self) -> Tensor:
        """bool [dim], all ones: the teacher."""
        return torch.ones(self.dim, dtype=torch.bool)

    def random_code(self, keep: float, generator: torch.Generator) -> Tensor:
        """Draws a hard code: each entry open with probability `keep`, at least one entry open in every width site.

        Args:
            keep: Probability in [0, 1].
            generator: Source of the draws; the code lives on its device.

        Returns:
            bool [dim].
        """
        if not 0.0 <= keep <= 1.0:
            raise ValueError(f"keep={keep} is not a probability; give the share of entries to keep, between 0 and 1")
        draws = torch.rand(self.dim, generator=generator, device=generator.device)
        code = draws < keep
        for site in self.width_sites:
            # The entry with the smallest draw is the first to open as `keep` grows, so this adds no bias.
            code[site.start + int(draws[site.slice].argmin())] = True
        return code

    def check(self, code: Tensor) -> None:
        """Checks that a tensor is [..., dim].

        Raises:
            ValueError: If its last dimension is not this space's.
        """
        if code.ndim == 0 or code.shape[-1] != self.dim:
            raise ValueError(
                f"a code of this space has {self.dim} entries ({self.num_width} width + {self.num_depth} depth), "
                f"got shape {tuple(code.shape)}; was it made for another UNet?"
            )

    def view(self, code: Tensor) -> dict[str, Tensor]:
        """Splits [..., dim] into {site.key: view of [..., site.width]}."""
        self.check(code)
        return {site.key: code[..., site.slice] for site in self.sites}

    def effective(self, masks: Tensor) -> Tensor:
        """Multiplies each width entry by the depth entry that covers it: [..., dim] -> [..., dim], differentiable."""
        self.check(masks)
        width, depth = masks[..., : self.num_width], masks[..., self.num_width :]
        covering = self.depth_of_entry.to(masks.device)
        # A constant one in the last place is what -1 (no covering depth site) points at.
        depth_or_one = torch.cat([depth, depth.new_ones(*depth.shape[:-1], 1)], dim=-1)
        return torch.cat([width * depth_or_one[..., covering], depth], dim=-1)

    def validate(self, code: Tensor) -> Tensor:
        """Checks a hard code (or a batch of them) and returns it as bool [..., dim].

        Raises:
            ValueError: If the length is wrong, a value is neither 0 nor 1, or a width site has no open entry.
        """
        self.check(code)
        hard = code.bool()
        if not torch.equal(hard.to(code.dtype), code):
            raise ValueError("the code has values other than 0 and 1; use relaxation.binarize to harden a soft code")
        for site in self.width_sites:
            if not bool(hard[..., site.slice].any(dim=-1).all()):
                raise ValueError(
                    f"site {site.name} has no open entry among its {site.width}; a width site keeps at least one "
                    "(close its depth entry to remove it whole, or use relaxation.binarize)"
                )
        return hard

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form, so that codes can be read without their UNet."""
        sites = [[s.name, s.width, s.kind, s.block, s.channels] for s in self.sites]
        return {"format": 1, "sites": sites, "skipped": dict(self.skipped)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ArchitectureSpace:
        """Inverse of `to_dict`.

        Raises:
            ValueError: If the form is unknown.
        """
        if data.get("format") != 1:
            raise ValueError(f"unknown space format {data.get('format')!r}; this version reads format 1")
        sites, start = [], 0
        for name, width, kind, block, channels in data["sites"]:
            sites.append(Site(name=name, width=width, kind=kind, start=start, block=block, channels=channels))
            start += width
        return cls(sites=tuple(sites), skipped=dict(data.get("skipped", {})))

    def describe(self) -> str:
        """A few lines for a log: how many sites and entries of each kind, and what is left whole and why."""
        lines = [
            f"{len(self.width_sites)} width sites with {self.num_width} entries, {self.num_depth} depth entries, "
            f"{self.dim} in all"
        ]
        for kind in ("resnet", "attention", "feed_forward", "depth"):
            widths = [site.width for site in self.sites if site.kind == kind]
            lines.append(f"  {kind}: {len(widths)} sites, {sum(widths)} entries")
        lines += [f"  left whole: {name}: {reason}" for name, reason in self.skipped.items()]
        return "\n".join(lines)
