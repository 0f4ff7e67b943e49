"""Truths 1 and 2 (pruned is gated, counted is computed) for every kind of teacher, and what is left whole in unusual ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from aptp_ray.core.backbones import as_unet, model_inputs, stock_class
from aptp_ray.core.gates import GatedUNet
from aptp_ray.core.macs import MacsModel, count_macs
from aptp_ray.core.prune import extract_code, prune_unet
from aptp_ray.core.running import run_unet
from aptp_ray.core.space import ArchitectureSpace
from tests.core.tiny import (
    TINY_MODELS,
    inputs_for,
    randomize,
    tiny_pixart,
    tiny_sd15,
    tiny_sd21,
    tiny_sdxl,
)

TEACHERS = {**TINY_MODELS, "sdxl by layer": tiny_sdxl, "pixart 1024": lambda: tiny_pixart(conditions=True)}


def _space(name: str, model: Any) -> ArchitectureSpace:
    return ArchitectureSpace.of(model, depth="layers" if "by layer" in name else "modules")


def _relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def _codes(space: ArchitectureSpace, randoms: int) -> Tensor:
    """[randoms + 4, dim]: random ones, all open, half open, one entry a site, all depth sites closed."""
    codes = [space.random_code((0.2, 0.5, 0.8)[i % 3], torch.Generator().manual_seed(i)) for i in range(randoms)]
    half, one, closed = space.full_code(), space.full_code(), space.full_code()
    for site in space.width_sites:
        half[site.start : site.start + site.width // 2] = False
        one[site.start + 1 : site.start + site.width] = False
    closed[space.num_width :] = False
    return torch.stack([*codes, space.full_code(), half, one, closed])


def _hold(name: str, randoms: int) -> None:
    model = TEACHERS[name]()
    space = _space(name, model)
    gated, codes = GatedUNet(model, space), _codes(space, randoms)
    macs = MacsModel.measure(model, latent_size=(16, 16), num_tokens=5, space=space)
    inputs = inputs_for(model, batch=1)
    everywhere = {k: v.expand(len(codes), *v.shape[1:]) if isinstance(v, Tensor) else v for k, v in inputs.items()}
    added = inputs.get("added_cond_kwargs", {})
    if added:
        everywhere["added_cond_kwargs"] = {k: None if v is None else v.expand(len(codes), *v.shape[1:]) for k, v in added.items()}
    with torch.no_grad():
        teacher = model(**inputs).sample
        with gated.use(codes):
            masked = gated(**everywhere).sample
        for code, expected in zip(codes, masked, strict=True):
            pruned = prune_unet(model, code, space)
            assert _relative(pruned(**inputs).sample[0], expected) <= 1e-5
            assert macs.exact(code) == count_macs(pruned, (16, 16), 5)
            assert torch.equal(extract_code(pruned, space), code)
            if not bool(code.all()):
                assert _relative(expected, teacher[0]) > 1e-3


@pytest.mark.parametrize("name", ["sdxl by layer", "pixart", "pixart 1024", "inpainting"])
def test_pruned_is_gated_and_costs_what_the_formula_says(name: str) -> None:
    _hold(name, randoms=1)


@pytest.mark.slow
@pytest.mark.parametrize("name", TEACHERS)
def test_twenty_random_codes_and_the_extremes(name: str) -> None:
    _hold(name, randoms=20)


def test_pixarts_sites_are_heads_chunks_and_layers() -> None:
    space = ArchitectureSpace.of(tiny_pixart())
    kinds = [site.kind for site in space.sites]
    assert kinds == ["attention", "attention", "feed_forward"] * 5 + ["depth"] * 5
    assert {(s.width, s.channels) for s in space.sites if s.kind == "attention"} == {(4, 6)}
    assert {(s.width, s.channels) for s in space.sites if s.kind == "feed_forward"} == {(32, 3)}
    assert all(s.block == ".".join(s.name.split(".")[:2]) for s in space.width_sites)
    # From the outside in, the output's side first.
    assert space.depth_rank == (4, 0, 3, 1, 2)
    assert space.skipped == {} and space.depth == "modules"


def test_layers_as_depth_sites_of_sdxl() -> None:
    model = tiny_sdxl()
    space = ArchitectureSpace.of(model, depth="layers")
    layers = [s.name for s in space.depth_sites if ".transformer_blocks." in s.name]
    several = [n for n, m in model.named_modules() if len(getattr(m, "transformer_blocks", ())) > 1]
    assert sorted(layers) == sorted(f"{name}.transformer_blocks.{i}" for name in several for i in range(2))
    # Of the same entries otherwise: width sites, resnets, and transformers of a single layer.
    default = ArchitectureSpace.of(model)
    assert [(s.name, s.width) for s in space.width_sites] == [(s.name, s.width) for s in default.width_sites]
    kept = {s.name for s in default.depth_sites} - set(several)
    assert {s.name for s in space.depth_sites} == kept | set(layers)
    assert sorted(space.depth_rank) == list(range(space.num_depth))
    # The mid block's layers are the least protected.
    assert [space.depth_sites[i].name.split(".")[0] for i in space.depth_rank[-2:]] == ["mid_block", "mid_block"]
    again = ArchitectureSpace.from_dict(space.to_dict())
    assert again == space and again.depth == "layers"
    pruned = prune_unet(model, space.random_code(0.5, torch.Generator().manual_seed(0)), space)
    assert torch.equal(extract_code(pruned), space.random_code(0.5, torch.Generator().manual_seed(0)))
    with pytest.raises(ValueError, match="unknown depth 'blocks'"):
        ArchitectureSpace.of(model, depth="blocks")  # type: ignore[arg-type]


UNUSUAL: dict[str, dict[str, Any]] = {
    "attention of images over text alone": {"only_cross_attention": True},
    "upcast attention": {"upcast_attention": True},
    "mish": {"act_fn": "mish"},
    "scaled residuals": {"resnet_out_scale_factor": 2.0},
    "normed text": {"cross_attention_norm": "layer_norm"},
    "time embedding scales": {"resnet_time_scale_shift": "scale_shift"},
    "activated skips": {"resnet_skip_time_act": True},
    "gated grounding": {"attention_type": "gated"},
    "no mid block": {"mid_block_type": None},
    "class embedding": {"class_embed_type": "timestep"},
    "simple cross-attention": {
        "down_block_types": ("SimpleCrossAttnDownBlock2D", "DownBlock2D"),
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
        "up_block_types": ("UpBlock2D", "SimpleCrossAttnUpBlock2D"),
    },
    "resnets that sample": {
        "down_block_types": ("ResnetDownsampleBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    },
    "attention blocks without text": {
        "down_block_types": ("AttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D"),
    },
    "k blocks": {
        "down_block_types": ("KDownBlock2D", "KCrossAttnDownBlock2D"),
        "up_block_types": ("KCrossAttnUpBlock2D", "KUpBlock2D"),
        "mid_block_type": None,
    },
}


@pytest.mark.parametrize("what", UNUSUAL)
def test_what_is_unusual_is_left_whole_or_cut_rightly(what: str) -> None:
    config = {
        "sample_size": 8, "block_out_channels": (8, 16), "norm_num_groups": 4, "cross_attention_dim": 12, "layers_per_block": 1,
        "attention_head_dim": 4, "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        unet = UNet2DConditionModel(**{**config, **UNUSUAL[what]}).eval()
    randomize(unet, 0)
    inputs = inputs_for(unet, batch=1, size=8, tokens=4)
    if what == "class embedding":
        inputs["class_labels"] = torch.tensor([3])
    try:
        gated = GatedUNet(unet)
    except ValueError as error:
        assert what == "k blocks" and "nothing in this model can be pruned" in str(error)
        return
    # Every resnet, attention and feed-forward is either a site or listed, by itself or inside of what is.
    named = {site.name for site in gated.space.width_sites} | set(gated.space.skipped)
    for name, module in unet.named_modules():
        if type(module).__name__ in ("ResnetBlock2D", "Attention", "FeedForward") and "samplers" not in name:
            assert any(name == n or name.startswith(f"{n}.") or n.startswith(f"{name}.") for n in named) or "fuser" in name
    code = gated.space.random_code(0.4, torch.Generator().manual_seed(1))
    with torch.no_grad():
        with gated.use(code):
            masked = gated(**inputs).sample
        pruned = prune_unet(unet, code)(**inputs).sample
        assert _relative(pruned, masked) <= 1e-5
        assert _relative(masked, unet(**inputs).sample) > 1e-4


def test_an_activation_that_is_not_zero_at_zero_is_left_whole() -> None:
    unet = tiny_sd21()
    unet.mid_block.resnets[0].nonlinearity = nn.Softplus()
    space = ArchitectureSpace.of(unet)
    assert "Softplus" in space.skipped["mid_block.resnets.0"]
    assert "mid_block.resnets.0" not in {site.name for site in space.width_sites}


def test_a_fused_lora_is_pruned_with_the_teacher() -> None:
    """What fusing leaves are plain layers; while adapters hang on them, the layers are listed and the cut is refused."""
    unet, low = tiny_sd15(), torch.Generator().manual_seed(3)
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    for module in unet.modules():
        if isinstance(module, nn.Linear):
            down, up = torch.randn(2, module.in_features, generator=low), torch.randn(module.out_features, 2, generator=low)
            module.weight.data += 0.02 * up @ down
    gated = GatedUNet(unet)
    inputs, code = inputs_for(unet), gated.space.random_code(0.5, low)
    with torch.no_grad(), gated.use(code):
        assert _relative(prune_unet(unet, code)(**inputs).sample, gated(**inputs).sample) <= 1e-5
    assert not torch.equal(unet.state_dict()["time_embedding.linear_1.weight"], before["time_embedding.linear_1.weight"])


def test_other_classes_are_refused_by_name() -> None:
    with pytest.raises(TypeError, match=r"UNet2DConditionModel or PixArtTransformer2DModel, got Linear"):
        ArchitectureSpace.of(nn.Linear(2, 2))  # type: ignore[arg-type]
    assert stock_class(prune_unet(tiny_sd21(), ArchitectureSpace.of(tiny_sd21()).full_code())) is UNet2DConditionModel


def test_further_conditions_travel_with_the_text() -> None:
    """A UNet that reads a pooled text and sizes is called as one that reads text alone, and gives the same."""
    unet = tiny_sdxl()
    inputs = inputs_for(unet, batch=2)
    pooled = inputs["added_cond_kwargs"]["text_embeds"]  # [2, 12]
    last = torch.cat([pooled, torch.zeros(2, 24 - 12)], dim=1)
    states = torch.cat([inputs["encoder_hidden_states"], last[:, None]], dim=1)
    inputs["added_cond_kwargs"]["time_ids"] = torch.tensor([[128.0, 128.0, 0, 0, 128.0, 128.0]] * 2)
    wrapped = as_unet(unet)
    with torch.no_grad():
        expected = unet(**inputs).sample
        assert torch.equal(wrapped(inputs["sample"], inputs["timestep"], states).sample, expected)
        kwargs = model_inputs(unet, inputs["sample"], inputs["timestep"], states)
        assert torch.equal(unet(**kwargs).sample, expected)
        assert torch.equal(run_unet(GatedUNet(unet), inputs["sample"], inputs["timestep"], states, None), expected)
    assert as_unet(tiny_sd21()).__class__ is UNet2DConditionModel
