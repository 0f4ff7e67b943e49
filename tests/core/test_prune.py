from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from safetensors.torch import load_file, save_file
from torch import Tensor

from aptp_ray.core.gates import GatedUNet
from aptp_ray.core.prune import extract_code, prune_unet
from aptp_ray.core.pruned_model import PrunedUNet2DConditionModel
from aptp_ray.core.space import ArchitectureSpace
from tests.core.tiny import TINY_UNETS, inputs_for, tiny_sd15, tiny_sd21, tiny_sdxl


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def _codes(space: ArchitectureSpace) -> dict[str, Tensor]:
    depth_closed = space.full_code()
    depth_closed[space.num_width :] = False
    one_each = space.random_code(0.0, _generator(7))
    one_each[space.num_width :] = True
    return {
        "keep .2": space.random_code(0.2, _generator(1)),
        "keep .5": space.random_code(0.5, _generator(2)),
        "keep .8": space.random_code(0.8, _generator(3)),
        "depth closed": depth_closed,
        "one entry a site": one_each,
        "smallest": space.random_code(0.0, _generator(8)),
        "full": space.full_code(),
    }


@pytest.mark.parametrize("name", TINY_UNETS)
def test_pruned_equals_gated(name: str) -> None:
    unet = TINY_UNETS[name]()
    gated = GatedUNet(unet)
    inputs = inputs_for(unet)
    with torch.no_grad():
        teacher = unet(**inputs).sample
        for what, code in _codes(gated.space).items():
            pruned = prune_unet(unet, code)
            with gated.use(code):
                masked = gated(**inputs).sample
            assert _relative(pruned(**inputs).sample, masked) <= 1e-5, what
            assert torch.equal(extract_code(pruned), code), what
            if what == "full":
                assert _relative(masked, teacher) <= 1e-6
            else:
                assert _relative(masked, teacher) > 0.01, what  # the codes do something
                assert pruned.num_parameters() < unet.num_parameters(), what


def test_odd_latent_sizes_masks_and_the_plain_processor() -> None:
    """Latents that need the upsamplers' size argument, padded text, and non-fused attention."""
    unet = tiny_sd15()
    gated = GatedUNet(unet)
    inputs = inputs_for(unet, size=18)
    inputs["encoder_attention_mask"] = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    code = gated.space.random_code(0.5, _generator(4))
    pruned = prune_unet(unet, code)
    with torch.no_grad(), gated.use(code):
        masked = gated(**inputs).sample
        fused = pruned(**inputs).sample
        pruned.set_attn_processor(AttnProcessor())
        plain = pruned(**inputs).sample
    assert _relative(fused, masked) <= 1e-5
    assert _relative(plain, masked) <= 1e-5


@pytest.mark.parametrize("make", [tiny_sd15, tiny_sdxl])
@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
def test_save_and_load_round_trip(make, low_cpu_mem_usage: bool, tmp_path: Path) -> None:
    unet = make()
    code = ArchitectureSpace.of(unet).random_code(0.5, _generator(1))
    pruned = prune_unet(unet, code)
    pruned.save_pretrained(tmp_path)
    assert (tmp_path / "diffusion_pytorch_model.safetensors").exists()
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["_class_name"] == "PrunedUNet2DConditionModel"
    assert len((tmp_path / "config.json").read_text()) < 10_000
    loaded = PrunedUNet2DConditionModel.from_pretrained(tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    inputs = inputs_for(unet)
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).sample, pruned(**inputs).sample)
    assert torch.equal(extract_code(loaded), code)
    half = PrunedUNet2DConditionModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    # A second generation on disk is the same.
    loaded.save_pretrained(tmp_path / "again")
    assert load_file(tmp_path / "again" / "diffusion_pytorch_model.safetensors").keys() == pruned.state_dict().keys()


def test_loading_never_invents_weights(tmp_path: Path) -> None:
    unet = tiny_sd21()
    space = ArchitectureSpace.of(unet)
    prune_unet(unet, space.random_code(0.5, _generator(1))).save_pretrained(tmp_path / "a")
    prune_unet(unet, space.random_code(0.5, _generator(2))).save_pretrained(tmp_path / "b")
    weights = tmp_path / "a" / "diffusion_pytorch_model.safetensors"
    good = load_file(weights)

    with pytest.raises(ValueError, match="ignore_mismatched_sizes"):
        PrunedUNet2DConditionModel.from_pretrained(tmp_path / "a", ignore_mismatched_sizes=True)
    for low_cpu_mem_usage in (True, False):
        load = {"low_cpu_mem_usage": low_cpu_mem_usage}
        # Another expert's weights.
        save_file(load_file(tmp_path / "b" / "diffusion_pytorch_model.safetensors"), weights)
        with pytest.raises((ValueError, RuntimeError)):
            PrunedUNet2DConditionModel.from_pretrained(tmp_path / "a", **load)
        # A weight missing, a weight too many.
        save_file({k: v for k, v in good.items() if k != "conv_in.bias"}, weights)
        with pytest.raises(ValueError, match=r"missing_keys: 1, such as \['conv_in.bias'\]"):
            PrunedUNet2DConditionModel.from_pretrained(tmp_path / "a", **load)
        save_file({**good, "extra": torch.zeros(1)}, weights)
        with pytest.raises(ValueError, match="unexpected_keys: 1"):
            PrunedUNet2DConditionModel.from_pretrained(tmp_path / "a", **load)
        save_file(good, weights)
        _, info = PrunedUNet2DConditionModel.from_pretrained(tmp_path / "a", output_loading_info=True, **load)
        assert not any(info.values())
        # The stock class does not know the shapes, and says so.
        with pytest.raises((ValueError, RuntimeError)):
            UNet2DConditionModel.from_pretrained(tmp_path / "a", **load)


def test_a_config_that_does_not_fit_is_refused() -> None:
    unet = tiny_sd21()
    pruned = prune_unet(unet, ArchitectureSpace.of(unet).random_code(0.5, _generator(1)))
    config = dict(pruned.config)

    def build(**pruning: object) -> None:
        PrunedUNet2DConditionModel.from_config({**config, "pruning": {**config["pruning"], **pruning}})

    with pytest.raises(ValueError, match="format 2"):
        build(format=2)
    with pytest.raises(ValueError, match=r"down_blocks\.9"):
        build(closed=["down_blocks.9.resnets.1"])
    with pytest.raises(ValueError, match="'3-99'"):
        build(kept={"down_blocks.0.resnets.0": "0,3-99"})


def test_teacher_weights_are_copied_not_shared() -> None:
    unet = tiny_sd21()
    space = ArchitectureSpace.of(unet)
    before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    for code in (space.full_code(), space.random_code(0.5, _generator(1))):
        pruned = prune_unet(unet, code)
        with torch.no_grad():
            for parameter in pruned.parameters():
                parameter.add_(1.0)
        assert all(torch.equal(tensor, before[name]) for name, tensor in unet.state_dict().items())


def test_settings_of_the_teacher_are_kept() -> None:
    unet = tiny_sd21().to(torch.bfloat16).train()
    unet.mid_block.eval()
    unet.conv_in.requires_grad_(False)
    unet.set_attn_processor(AttnProcessor())
    unet.enable_gradient_checkpointing()
    pruned = prune_unet(unet, ArchitectureSpace.of(unet).random_code(0.5, _generator(1)))
    assert {p.dtype for p in pruned.parameters()} == {torch.bfloat16}
    assert pruned.training and not pruned.mid_block.resnets[0].training
    assert not pruned.conv_in.weight.requires_grad and pruned.conv_out.weight.requires_grad
    assert {type(p) for p in pruned.attn_processors.values()} == {AttnProcessor}
    assert pruned.is_gradient_checkpointing
    assert next(iter(unet.attn_processors)) in pruned.attn_processors
    assert {
        type(p) for p in prune_unet(tiny_sd21(), ArchitectureSpace.of(unet).full_code()).attn_processors.values()
    } == {AttnProcessor2_0}


def test_hooks_stay_on_the_teacher() -> None:
    gated = GatedUNet(tiny_sd21())
    code = gated.space.random_code(0.5, _generator(1))
    with gated.use(torch.rand(3, gated.space.dim)):
        pruned = prune_unet(gated.unet, code)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in pruned.modules())
    with torch.no_grad():
        fresh = prune_unet(tiny_sd21(), code)
        inputs = inputs_for(fresh)
        assert torch.equal(pruned(**inputs).sample, fresh(**inputs).sample)


def test_a_pruned_unet_trains_with_gradient_checkpointing() -> None:
    unet = tiny_sdxl()
    space = ArchitectureSpace.of(unet)
    code = space.random_code(0.5, _generator(1))
    code[space.num_width :: 2] = False
    inputs = inputs_for(unet)

    def gradients(checkpointing: bool) -> dict[str, Tensor]:
        pruned = prune_unet(unet, code).train()
        if checkpointing:
            pruned.enable_gradient_checkpointing()
        pruned(**inputs).sample.square().mean().backward()
        assert all(p.grad is not None for p in pruned.parameters())
        return {name: p.grad for name, p in pruned.named_parameters() if p.grad is not None}

    plain, checkpointed = gradients(False), gradients(True)
    for name, grad in plain.items():
        torch.testing.assert_close(checkpointed[name], grad, rtol=1e-4, atol=1e-6)


def test_modules_report_their_new_sizes() -> None:
    unet = tiny_sd21()
    space = ArchitectureSpace.of(unet)
    code = space.random_code(0.5, _generator(5))
    pruned = prune_unet(unet, code)
    view = space.view(code)
    for site in space.width_sites:
        if site.block and not view[f"{site.block}:depth"]:
            continue
        module, kept = pruned.get_submodule(site.name), int(view[site.key].sum())
        size = kept * site.channels
        if site.kind == "resnet":
            assert (module.norm2.num_groups, module.norm2.num_channels) == (kept, size)
            assert (module.conv1.out_channels, module.conv2.in_channels) == (size, size)
            assert (
                module.conv1.weight.shape[0]
                == module.conv2.weight.shape[1]
                == module.time_emb_proj.out_features
                == size
            )
        elif site.kind == "attention":
            assert (module.heads, module.inner_dim, module.to_q.out_features) == (kept, size, size)
        else:
            assert (module.net[2].in_features, module.net[0].proj.out_features) == (size, 2 * size)


def test_what_cannot_be_pruned_is_refused() -> None:
    unet = tiny_sd21()
    space = ArchitectureSpace.of(unet)
    pruned = prune_unet(unet, space.random_code(0.5, _generator(1)))
    with pytest.raises(ValueError, match="pruned already"):
        prune_unet(pruned, ArchitectureSpace.of(pruned).full_code())
    with pytest.raises(ValueError, match="binarize"):
        prune_unet(unet, torch.full((space.dim,), 0.3))
    with pytest.raises(ValueError, match=r"one code \[dim\]"):
        prune_unet(unet, space.full_code()[None])
    unet.conv_in.register_parameter("lora", torch.nn.Parameter(torch.zeros(2)))
    with pytest.raises(ValueError, match=r"conv_in\.lora.*fuse or unload"):
        prune_unet(unet, space.full_code())


def test_a_directory_of_the_teacher_opens_as_a_full_unet(tmp_path: Path) -> None:
    unet = tiny_sd21()
    unet.save_pretrained(tmp_path)
    loaded = PrunedUNet2DConditionModel.from_pretrained(tmp_path)
    assert bool(extract_code(loaded).all())
    inputs = inputs_for(unet)
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).sample, unet(**inputs).sample)
