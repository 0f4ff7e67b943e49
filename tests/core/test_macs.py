from __future__ import annotations

import json

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from aptp_ray.core.gates import GatedUNet
from aptp_ray.core.macs import MacsModel, count_macs
from aptp_ray.core.prune import prune_unet
from tests.core.tiny import TINY_UNETS, inputs_for, tiny_sd15, tiny_sd21


def _sd21_on_meta() -> UNet2DConditionModel:
    with torch.device("meta"):
        return UNet2DConditionModel(
            sample_size=96,
            block_out_channels=(320, 640, 1280, 1280),
            attention_head_dim=[5, 10, 20, 20],
            cross_attention_dim=1024,
            use_linear_projection=True,
        )


def test_sd21_has_the_known_size_and_cost() -> None:
    unet = _sd21_on_meta()
    assert round(sum(p.numel() for p in unet.parameters()) / 1e6, 1) == 865.9
    macs = MacsModel.measure(unet, latent_size=(96, 96), num_tokens=77)
    assert round(macs.total / 1e9, 2) == 1074.55
    assert macs.total == count_macs(unet, (96, 96), 77)
    code = macs.space.random_code(0.5, torch.Generator().manual_seed(0))
    assert macs.exact(code) == count_macs(prune_unet(unet, code), (96, 96), 77)


@pytest.fixture(scope="module")
def sd21_macs() -> MacsModel:
    """The tiny one."""
    return MacsModel.measure(tiny_sd21(), latent_size=(16, 16), num_tokens=5)


def _by_hand(unet: UNet2DConditionModel, **inputs: Tensor) -> int:
    """MACs of a real forward from the shapes that pass through its layers; no counter involved."""
    total = 0

    def layer(module: nn.Module, _args: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        total += output.numel() * module.weight[0].numel()  # each output is a sum over the weight's fan-in

    def attention(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], _output: Tensor) -> None:
        nonlocal total
        queries = args[0].shape[1]
        text = kwargs.get("encoder_hidden_states")
        keys = queries if text is None else text.shape[1]
        total += 2 * queries * keys * module.to_q.out_features

    handles = []
    for module in unet.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            handles.append(module.register_forward_hook(layer))
        if type(module).__name__ == "Attention":
            handles.append(module.register_forward_hook(attention, with_kwargs=True))
    with torch.no_grad():
        unet(**inputs)
    for handle in handles:
        handle.remove()
    return total


@pytest.mark.parametrize("name", TINY_UNETS)
def test_codes_cost_what_the_pruned_unet_costs(name: str) -> None:
    unet = TINY_UNETS[name]()
    macs = MacsModel.measure(unet, latent_size=(16, 24), num_tokens=7)
    codes = [macs.space.random_code(keep, torch.Generator().manual_seed(i)) for i, keep in enumerate((0.2, 0.5, 0.8))]
    smallest = macs.space.random_code(0.0, torch.Generator().manual_seed(9))
    only_depth_closed = macs.space.full_code()
    only_depth_closed[macs.space.num_width :] = False
    codes += [smallest, only_depth_closed, macs.space.full_code()]
    exact = [macs.exact(code) for code in codes]
    assert exact == [count_macs(prune_unet(unet, code), (16, 24), 7) for code in codes]
    # The differentiable formula is the same number, for soft types too.
    assert macs(torch.stack(codes)).dtype == torch.float64
    assert macs(torch.stack(codes).float()).tolist() == [float(x) for x in exact]
    assert macs.total == exact[-1] and macs.floor == exact[3] < min(exact[:3])
    inputs = inputs_for(unet, batch=1, tokens=7)
    inputs["sample"] = torch.zeros(1, 4, 16, 24)
    assert macs.total == _by_hand(unet, **inputs)
    assert exact[1] == _by_hand(prune_unet(unet, codes[1]), **inputs)


def test_gradient_is_what_an_entry_costs(sd21_macs: MacsModel) -> None:
    macs = sd21_macs
    full = macs.space.full_code().double().requires_grad_()
    macs(full).backward()
    assert torch.equal(full.grad, macs.entry_macs())
    # And closing an entry of the full model saves just that.
    for entry in [*range(0, macs.space.num_width, 37), *range(macs.space.num_width, macs.space.dim)]:
        code = macs.space.full_code()
        code[entry] = False
        assert macs.total - macs.exact(code) == int(macs.entry_macs()[entry])


def test_soft_codes_interpolate_and_keep_leading_dimensions(sd21_macs: MacsModel) -> None:
    macs = sd21_macs
    soft = torch.rand(2, 3, macs.space.dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    soft.requires_grad_()
    ratio = macs.ratio(soft)
    assert ratio.shape == (2, 3)
    assert bool(((ratio > macs.floor / macs.total) & (ratio < 1)).all())
    assert torch.autograd.gradcheck(lambda x: macs.ratio(x), (soft[:1, :1, :],), atol=1e-6)
    assert torch.equal(macs.macs(soft), macs(soft))


def test_cross_attention_is_charged_for_its_real_key_length() -> None:
    unet = tiny_sd15()
    shorter, longer = count_macs(unet, (16, 16), 5), count_macs(unet, (16, 16), 6)
    # One more token: per cross-attention, one row of keys and values and one more column of scores for each query.
    queries = {0: 256, 1: 64, 2: 16}
    expected = 0
    for name, module in unet.named_modules():
        if name.endswith("attn2"):
            block = name.split(".")
            level = (
                {"down_blocks": int(block[1]), "up_blocks": 3 - int(block[1])}[block[0]] if "blocks" in block[0] else 3
            )
            tokens = queries.get(level, 4)
            expected += 2 * module.inner_dim * 24 + 2 * tokens * module.inner_dim
    assert longer - shorter == expected


def test_json_round_trip(sd21_macs: MacsModel) -> None:
    again = MacsModel.from_dict(json.loads(json.dumps(sd21_macs.to_dict())))
    assert again == sd21_macs and again.total == sd21_macs.total
    with pytest.raises(ValueError, match="format None"):
        MacsModel.from_dict({})


def test_counting_leaves_the_unet_alone(sd21_macs: MacsModel) -> None:
    unet = tiny_sd21().train()
    gated = GatedUNet(unet)
    processors = dict(unet.attn_processors)
    calls: list[str] = []
    unet.mid_block.register_forward_hook(lambda *_: calls.append("ran"))
    before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    with gated.use(torch.rand(2, gated.space.dim)):
        inside = count_macs(unet, (16, 16), 5)
    assert inside == sd21_macs.total == count_macs(unet.to(torch.bfloat16), (16, 16), 5)
    assert calls == [] and unet.training and processors == unet.attn_processors
    assert all(torch.equal(tensor.bfloat16(), unet.state_dict()[name]) for name, tensor in before.items())


def test_bad_arguments_are_named(sd21_macs: MacsModel) -> None:
    macs = sd21_macs
    with pytest.raises(ValueError, match="num_tokens=0"):
        count_macs(tiny_sd21(), (16, 16), 0)
    with pytest.raises(ValueError, match=r"macs\(codes\)"):
        macs.exact(torch.ones(2, macs.space.dim))
    with pytest.raises(ValueError, match="binarize"):
        macs.exact(torch.full((macs.space.dim,), 0.5))
