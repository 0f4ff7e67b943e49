from __future__ import annotations

import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor

from aptp_ray.core.gates import GatedUNet
from aptp_ray.core.running import BlockRecorder
from tests.core.tiny import TINY_UNETS, inputs_for, tiny_sd15, tiny_sd21, tiny_sdxl


def _soft(gated: GatedUNet, batch: int, seed: int = 0) -> Tensor:
    return 0.1 + 0.9 * torch.rand(batch, gated.space.dim, generator=torch.Generator().manual_seed(seed))


def _relative(a: Tensor, b: Tensor) -> float:
    return float(((a - b).abs().max() / b.abs().max()).detach())


@pytest.mark.parametrize("name", TINY_UNETS)
def test_full_codes_and_no_codes_are_the_teacher(name: str) -> None:
    unet = TINY_UNETS[name]()
    inputs = inputs_for(unet)
    with torch.no_grad():
        plain = unet(**inputs).sample
        keys = list(unet.state_dict())
        gated = GatedUNet(unet)
        assert torch.equal(gated(**inputs).sample, plain)
        with gated.use(gated.space.full_code()):
            assert torch.equal(gated(**inputs).sample, plain)
            assert torch.equal(gated.unet(**inputs, return_dict=False)[0], plain)
        with gated.use(_soft(gated, 2)):
            assert _relative(gated(**inputs).sample, plain) > 0.05
        assert torch.equal(gated(**inputs).sample, plain)
    assert list(gated.unet.state_dict()) == keys


def test_each_sample_runs_under_its_own_code() -> None:
    gated = GatedUNet(tiny_sdxl())
    inputs = inputs_for(gated.unet, batch=3)
    codes = _soft(gated, 3)
    with torch.no_grad():
        with gated.use(codes):
            together = gated(**inputs).sample
        for i in range(3):
            alone = {k: v[i : i + 1] for k, v in inputs.items() if isinstance(v, Tensor)}
            added = {k: v[i : i + 1] for k, v in inputs["added_cond_kwargs"].items()}
            with gated.use(codes[i]):
                out = gated(**alone, added_cond_kwargs=added).sample
            assert _relative(together[i : i + 1], out) < 1e-5


def test_guidance_repeats_codes_in_diffusers_order() -> None:
    gated = GatedUNet(tiny_sd21())
    conditional, unconditional = inputs_for(gated.unet, batch=2, seed=1), inputs_for(gated.unet, batch=2, seed=2)
    codes = _soft(gated, 2)
    with torch.no_grad(), gated.use(codes):
        doubled = gated(**{k: torch.cat([unconditional[k], conditional[k]]) for k in conditional}).sample
        separate = torch.cat([gated(**unconditional).sample, gated(**conditional).sample])
    assert _relative(doubled, separate) < 1e-5


def test_a_batch_that_does_not_fit_is_refused_and_leaves_nothing_behind() -> None:
    gated = GatedUNet(tiny_sd21())
    inputs = inputs_for(gated.unet, batch=3)
    with torch.no_grad():
        plain = gated(**inputs).sample
        with gated.use(_soft(gated, 2)):
            with pytest.raises(ValueError, match="3 samples is no multiple of the 2 codes"):
                gated(**inputs)
        with gated.use(_soft(gated, 3)), pytest.raises(RuntimeError):
            gated(inputs["sample"], inputs["timestep"], torch.zeros(3, 5, 7))  # wrong text width, deep in the forward
        assert torch.equal(gated(**inputs).sample, plain)
        for module in gated.unet.modules():
            if isinstance(module, BasicTransformerBlock):
                module.set_chunk_feed_forward(1, dim=0)
        with gated.use(_soft(gated, 3)), pytest.raises(ValueError, match="chunking"):
            gated(**inputs)
    with pytest.raises(ValueError, match="another UNet"), gated.use(torch.ones(2, 5)):
        pass
    with pytest.raises(ValueError, match=r"\[codes, dim\]"), gated.use(torch.ones(1, 1, gated.space.dim)):
        pass


def test_uses_nest() -> None:
    gated = GatedUNet(tiny_sd21())
    inputs = inputs_for(gated.unet)
    outer, inner = _soft(gated, 2, 0), _soft(gated, 2, 1)
    with torch.no_grad(), gated.use(outer):
        first = gated(**inputs).sample
        with gated.use(inner):
            assert not torch.equal(gated(**inputs).sample, first)
        assert torch.equal(gated(**inputs).sample, first)


@pytest.mark.parametrize("kind", ["resnet", "attention", "feed_forward"])
def test_a_width_mask_scales_the_channels_of_its_entry(kind: str) -> None:
    gated = GatedUNet(tiny_sd21())
    site = [s for s in gated.space.sites if s.kind == kind][-1]
    module = gated.unet.get_submodule(site.name)
    acts_on = {"resnet": "norm2", "attention": "to_out.0", "feed_forward": "net.2"}[kind]
    entry, channels = 1, slice(site.channels, 2 * site.channels)
    seen: list[Tensor] = []

    def see(_module: torch.nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        # Channels first: [channels, batch, ...]
        seen.append(output.movedim(1, 0) if kind == "resnet" else args[0].movedim(2, 0))

    module.get_submodule(acts_on).register_forward_hook(see)
    codes = torch.ones(1, gated.space.dim)
    codes[0, site.start + entry] = 0.25
    with torch.no_grad(), gated.use(codes):
        gated(**inputs_for(gated.unet, batch=1))
    with torch.no_grad():
        gated(**inputs_for(gated.unet, batch=1))
    masked, full = seen
    expected = full.clone()
    expected[channels] *= 0.25
    torch.testing.assert_close(masked, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("part", ["down_blocks.1.resnets.1", "up_blocks.2.resnets.2", "up_blocks.2.attentions.2"])
def test_a_depth_mask_mixes_input_and_output(part: str) -> None:
    gated = GatedUNet(tiny_sd21())
    site = next(s for s in gated.space.depth_sites if s.name == part)
    seen: list[tuple[Tensor, Tensor]] = []

    def see(_module: torch.nn.Module, args: tuple[Tensor, ...], output: Tensor | tuple[Tensor]) -> None:
        seen.append((args[0], output if isinstance(output, Tensor) else output[0]))

    gated.unet.get_submodule(part).register_forward_hook(see)
    codes = torch.ones(1, gated.space.dim)
    codes[0, site.start] = 0.25
    with torch.no_grad(), gated.use(codes):
        gated(**inputs_for(gated.unet, batch=1))
    with torch.no_grad():
        gated(**inputs_for(gated.unet, batch=1))
    (x, mixed), (_, output) = seen
    if part.startswith("up") and "resnets" in part:
        assert x.shape[1] > output.shape[1]  # [hidden, skip]
    torch.testing.assert_close(mixed, 0.75 * x[:, : output.shape[1]] + 0.25 * output, rtol=1e-5, atol=1e-6)


def test_gradients_of_all_kinds_have_the_same_order() -> None:
    gated = GatedUNet(tiny_sd21())
    inputs = inputs_for(gated.unet, batch=2)
    codes = torch.full((2, gated.space.dim), 0.9, requires_grad=True)
    with torch.no_grad():
        target = gated(**inputs).sample
    with gated.use(codes):
        loss = (gated(**inputs).sample - target).square().mean()
    loss.backward()
    assert codes.grad is not None
    sizes = {}
    for kind in ("resnet", "attention", "feed_forward", "depth"):
        grads = [codes.grad[:, site.slice].abs() for site in gated.space.sites if site.kind == kind]
        assert all(float(grad.max()) > 0 for grad in grads), kind
        sizes[kind] = float(torch.cat([grad.flatten() for grad in grads]).mean())
    assert max(sizes.values()) < 100 * min(sizes.values()), sizes


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("make", [tiny_sd15, tiny_sdxl])
def test_gradient_checkpointing_recomputes_under_the_codes_of_its_forward(make, inside: bool) -> None:
    """Two forwards under different codes, one backward: inside `use` under the second's codes, or after it."""

    def gradients(checkpointing: bool) -> tuple[Tensor, Tensor, list[Tensor]]:
        gated = GatedUNet(make())
        if checkpointing:
            gated.unet.enable_gradient_checkpointing()
        original = [m._gradient_checkpointing_func for m in gated.unet.down_blocks if checkpointing]
        inputs = inputs_for(gated.unet, batch=2)
        first, second = _soft(gated, 2, 0).requires_grad_(), _soft(gated, 2, 1).requires_grad_()
        with gated.use(first):
            loss = gated(**inputs).sample.square().mean()
        with gated.use(second):
            loss = loss + gated(**inputs).sample.square().mean()
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        assert original == [m._gradient_checkpointing_func for m in gated.unet.down_blocks if checkpointing]
        assert first.grad is not None and second.grad is not None
        return first.grad, second.grad, [p.grad for p in gated.unet.parameters() if p.grad is not None]

    plain, checkpointed = gradients(False), gradients(True)
    for a, b in zip(plain[:2], checkpointed[:2], strict=True):
        assert _relative(b, a) < 1e-5
    assert len(plain[2]) == len(checkpointed[2])
    for a, b in zip(plain[2], checkpointed[2], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_bfloat16_autocast_and_bool_codes() -> None:
    gated = GatedUNet(tiny_sd21())
    inputs = inputs_for(gated.unet)
    codes = torch.stack([gated.space.random_code(0.7, torch.Generator().manual_seed(s)) for s in range(2)])
    with torch.no_grad():
        with gated.use(codes):
            exact = gated(**inputs).sample
        with gated.use(codes.double()):
            assert torch.equal(gated(**inputs).sample, exact)
    soft = codes.float().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16), gated.use(soft):
        out = gated(**inputs).sample
    assert out.dtype == torch.bfloat16
    assert _relative(out.float(), exact) < 0.1
    out.float().square().mean().backward()
    assert soft.grad is not None and bool(soft.grad.isfinite().all()) and float(soft.grad.abs().max()) > 0


def test_a_learned_code_does_not_become_a_parameter_of_the_unet() -> None:
    gated = GatedUNet(tiny_sd21())
    codes = torch.nn.Parameter(_soft(gated, 2))
    with gated.use(codes):
        assert all(parameter is not codes for parameter in gated.parameters())
        assert len(gated.state_dict()) == len(gated.unet.state_dict())


def test_remove_takes_all_hooks_off() -> None:
    unet = tiny_sd21()
    inputs = inputs_for(unet)
    gated = GatedUNet(unet)
    assert gated.remove() is unet
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in unet.modules())
    with torch.no_grad(), gated.use(_soft(gated, 2)):
        assert torch.equal(gated(**inputs).sample, unet(**inputs).sample)


def test_a_recorder_holds_the_latest_forward() -> None:
    unet = tiny_sd21()
    inputs = inputs_for(unet)
    modules = [*unet.down_blocks, unet.mid_block, *unet.up_blocks]
    shapes = [(16, 8), (32, 4), (32, 2), (32, 2), (32, 2), (32, 4), (32, 8), (32, 16), (16, 16)]
    recorder = BlockRecorder(unet)
    with torch.no_grad():
        unet(**inputs_for(unet, seed=8))
        unet(**inputs)
        first = recorder.take()
        assert recorder.take() == []
        unet(**inputs_for(unet, seed=9))
        outputs = recorder.take()
        assert len(outputs) == len(modules) == 9
        assert not any(torch.equal(a, b) for a, b in zip(outputs, first, strict=True))
    assert [(t.shape[1], t.shape[2]) for t in first] == shapes
    recorder.remove()
    # The final block's output determines the UNet's: what comes after it is the norm, SiLU and convolution.
    with torch.no_grad():
        out = unet.conv_out(unet.conv_act(unet.conv_norm_out(first[-1])))
        assert torch.equal(out, unet(**inputs).sample)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in unet.modules())
