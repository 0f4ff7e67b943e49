from __future__ import annotations

import json

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

from aptp_ray.core.gates import GatedUNet
from aptp_ray.core.space import ArchitectureSpace
from tests.core.tiny import TINY_UNETS, tiny_sd21, tiny_sdxl


@pytest.fixture(scope="module")
def sd21_space() -> ArchitectureSpace:
    """The real Stable Diffusion 2.1, without weights."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=96,
            block_out_channels=(320, 640, 1280, 1280),
            attention_head_dim=[5, 10, 20, 20],
            cross_attention_dim=1024,
            use_linear_projection=True,
        )
    return ArchitectureSpace.of(unet)


def test_sd21_has_the_papers_sites(sd21_space: ArchitectureSpace) -> None:
    assert len(sd21_space.width_sites) == 70
    assert (sd21_space.num_width, sd21_space.num_depth, sd21_space.dim) == (1606, 14, 1620)
    assert sd21_space.depth_rank == (13, 12, 0, 1, 11, 10, 2, 3, 9, 8, 4, 5, 7, 6)
    assert {s.channels for s in sd21_space.sites if s.kind == "attention"} == {64}
    assert {s.width for s in sd21_space.sites if s.kind in ("resnet", "feed_forward")} == {32}


def test_width_sites_follow_the_forward_pass() -> None:
    unet = tiny_sdxl()
    space = ArchitectureSpace.of(unet)
    order: list[str] = []
    acts = {"resnet": "norm2", "attention": "to_out.0", "feed_forward": "net.2"}
    for site in space.width_sites:
        module = unet.get_submodule(f"{site.name}.{acts[site.kind]}")
        module.register_forward_hook(lambda *_, name=site.name: order.append(name))
    depth_order: list[str] = []
    for site in space.depth_sites:
        unet.get_submodule(site.name).register_forward_hook(lambda *_, name=site.name: depth_order.append(name))
    sample, text = torch.zeros(1, 4, 16, 16), torch.zeros(1, 5, 24)
    unet(sample, 1, text, added_cond_kwargs={"text_embeds": torch.zeros(1, 12), "time_ids": torch.zeros(1, 6)})
    assert order == [site.name for site in space.width_sites]
    assert depth_order == [site.name for site in space.depth_sites]


@pytest.mark.parametrize("name", TINY_UNETS)
def test_layout_is_contiguous_and_complete(name: str) -> None:
    unet = TINY_UNETS[name]()
    space = ArchitectureSpace.of(unet)
    assert [s.start for s in space.sites] == [sum(t.width for t in space.sites[:i]) for i in range(len(space.sites))]
    view = space.view(torch.arange(space.dim))
    assert torch.equal(torch.cat(list(view.values())), torch.arange(space.dim))
    for entry, (site_index, covering) in enumerate(zip(space.site_of_entry, space.depth_of_entry, strict=False)):
        site = space.sites[site_index]
        assert site.slice.start <= entry < site.slice.stop
        assert site.block == (None if covering < 0 else space.depth_sites[covering].name)
        assert site.block is None or site.name.startswith(site.block)
    # Each last resnet and transformer of a down or up block covers exactly the sites inside it.
    for site in space.width_sites:
        inside = [d.name for d in space.depth_sites if site.name == d.name or site.name.startswith(f"{d.name}.")]
        assert inside == ([site.block] if site.block else [])
    assert sorted(space.depth_rank) == list(range(space.num_depth))
    assert space.skipped == {}


def test_a_resnet_that_changes_channels_is_no_depth_site() -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            block_out_channels=(32, 64),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=4,
        )
    space = ArchitectureSpace.of(unet)
    names = {site.name for site in space.depth_sites}
    assert "down_blocks.0.resnets.0" in names
    assert "down_blocks.1.resnets.0" not in names
    assert "32 channels to 64" in space.skipped["down_blocks.1.resnets.0:depth"]
    # It is still a width site, which nothing covers; the transformer after it can be closed.
    assert next(s for s in space.width_sites if s.name == "down_blocks.1.resnets.0").block is None
    assert "down_blocks.1.attentions.0" in names


class _MixingProcessor(AttnProcessor2_0):
    """A processor that the space knows nothing about."""


def test_what_cannot_be_pruned_is_left_whole_with_a_reason() -> None:
    unet = tiny_sd21()
    odd = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    unet.get_submodule(odd).set_processor(_MixingProcessor())
    unet.mid_block.resnets[0].norm2 = torch.nn.Identity()
    space = ArchitectureSpace.of(unet)
    assert "_MixingProcessor" in space.skipped[odd]
    assert "Identity" in space.skipped["mid_block.resnets.0"]
    assert len(space.width_sites) == 68
    assert odd in space.describe() and "68 width sites" in space.describe()
    scale_shift = UNet2DConditionModel(
        block_out_channels=(8, 8), down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
        norm_num_groups=4, attention_head_dim=4, resnet_time_scale_shift="scale_shift",
    )  # fmt: skip
    assert not [s for s in ArchitectureSpace.of(scale_shift).width_sites if s.kind == "resnet"]


def test_the_plain_processor_does_not_change_the_space() -> None:
    unet = tiny_sd21()
    before = ArchitectureSpace.of(unet)
    unet.set_attn_processor(AttnProcessor())
    assert ArchitectureSpace.of(unet) == before


def test_json_round_trip() -> None:
    space = ArchitectureSpace.of(tiny_sdxl())
    again = ArchitectureSpace.from_dict(json.loads(json.dumps(space.to_dict())))
    assert again == space and again.depth_rank == space.depth_rank
    with pytest.raises(ValueError, match="format 7"):
        ArchitectureSpace.from_dict({"format": 7})


def test_random_codes_keep_their_share_and_every_site() -> None:
    space = ArchitectureSpace.of(tiny_sd21())
    draw = lambda keep, seed: space.random_code(keep, torch.Generator().manual_seed(seed))  # noqa: E731
    assert torch.equal(draw(0.5, 3), draw(0.5, 3)) and not torch.equal(draw(0.5, 3), draw(0.5, 4))
    assert torch.equal(draw(1.0, 0), space.full_code())
    lowest = draw(0.0, 0)
    assert int(lowest.sum()) == len(space.width_sites)
    space.validate(lowest)
    share = torch.stack([draw(0.65, seed) for seed in range(20)]).float().mean()
    assert abs(float(share) - 0.65) < 0.02
    with pytest.raises(ValueError, match=r"keep=1\.5"):
        draw(1.5, 0)


def test_effective_multiplies_widths_by_their_block() -> None:
    space = ArchitectureSpace.of(tiny_sd21())
    masks = torch.rand(3, space.dim, generator=torch.Generator().manual_seed(0))
    effective = space.effective(masks)
    view, parts = space.view(masks), space.view(effective)
    for site in space.width_sites:
        block = view[f"{site.block}:depth"] if site.block else torch.ones(3, 1)
        assert torch.equal(parts[site.key], view[site.key] * block)
    assert torch.equal(effective[:, space.num_width :], masks[:, space.num_width :])


def test_validate_names_what_is_wrong() -> None:
    space = ArchitectureSpace.of(tiny_sd21())
    assert space.validate(space.full_code().float()[None]).dtype == torch.bool
    with pytest.raises(ValueError, match="another UNet"):
        space.validate(torch.ones(3))
    with pytest.raises(ValueError, match="binarize"):
        space.validate(torch.full((space.dim,), 0.7))
    empty = space.full_code()
    empty[space.sites[5].slice] = False
    with pytest.raises(ValueError, match=space.sites[5].name.replace(".", r"\.")):
        space.validate(empty)


def test_only_a_bare_unet_is_accepted() -> None:
    with pytest.raises(TypeError, match=r"\.unet of a GatedUNet"):
        ArchitectureSpace.of(GatedUNet(tiny_sd21()))  # type: ignore[arg-type]
