"""Eight-bit weights: what is computed, how far off it is, what it takes, and what stays whole."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from aptp_ray.core.backbones import bare
from aptp_ray.core.components import load_unet
from aptp_ray.core.int8 import Int8Conv2d, Int8Linear, count_weights, quantize_weights, weight_bytes
from aptp_ray.core.macs import count_macs
from aptp_ray.core.prune import prune_unet
from aptp_ray.core.space import ArchitectureSpace
from tests.core.tiny import inputs_for, tiny_pixart, tiny_sd15, tiny_sdxl

LAYERS = {
    "linear": (nn.Linear(64, 96), (3, 5, 64)),
    "no bias": (nn.Linear(64, 96, bias=False), (2, 64)),
    "convolution": (nn.Conv2d(16, 24, 3, stride=2, padding=1), (2, 16, 9, 9)),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_computes_with_rounded_weights(name: str, dtype: torch.dtype) -> None:
    layer, shape = LAYERS[name]
    layer = deepcopy(layer).to(dtype).requires_grad_(False)
    kept = Int8Linear(layer) if isinstance(layer, nn.Linear) else Int8Conv2d(layer)
    sample = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    # By hand: each output channel's weights are multiples of its largest over 127.
    rows = layer.weight.float().flatten(1)
    step = rows.abs().amax(1, keepdim=True) / 127
    rounded = deepcopy(layer).float()
    rounded.weight.copy_(((rows / step).round() * step).view_as(layer.weight))
    expected, found = rounded(sample.float()), kept(sample)
    assert found.dtype == dtype and kept.quantized.dtype == torch.int8
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert float((found.float() - expected).abs().max() / expected.abs().max()) < tolerance
    off = float((kept.weight.float() - layer.weight.float()).abs().max() / step.max())
    assert off <= (0.51 if dtype == torch.float32 else 1.5)  # half a step, and bfloat16's own rounding


@pytest.mark.parametrize("make", [tiny_sd15, tiny_sdxl, tiny_pixart])
@torch.no_grad()
def test_an_expert_with_int8_weights_is_near_the_expert(make: Any, tmp_path: Path) -> None:
    model = make()
    space = ArchitectureSpace.of(model)
    prune_unet(model, space.random_code(0.6, torch.Generator().manual_seed(2)), space).save_pretrained(tmp_path)
    whole = load_unet(tmp_path)
    small = quantize_weights(deepcopy(whole), least_weights=256)
    inputs = inputs_for(bare(whole))
    expected, found = bare(whole)(**inputs).sample, bare(small)(**inputs).sample
    assert 0 < float((found - expected).norm() / expected.norm()) < 0.05
    kinds = [module for module in small.modules() if isinstance(module, Int8Linear | Int8Conv2d)]
    saved = sum(3 * module.quantized.numel() for module in kinds)
    scales = sum(4 * module.scale.numel() for module in kinds)
    assert len(kinds) > 3 and weight_bytes(small) == weight_bytes(whole) - saved + scales
    assert count_weights(small) == count_weights(whole) == sum(p.numel() for p in whole.parameters())
    assert count_macs(small, (16, 16), 5) == count_macs(whole, (16, 16), 5)
    # What everything passes through is as it was, and so are precision and device as the rest of the package asks for them.
    first = "pos_embed.proj" if make is tiny_pixart else "conv_in"
    assert type(bare(small).get_submodule(first)) is nn.Conv2d
    assert bare(small).dtype == torch.float32 and next(small.parameters()).dtype == torch.float32


def test_weights_that_learn_are_refused() -> None:
    with pytest.raises(ValueError, match="freeze the model first"):
        quantize_weights(tiny_sd15())
