from __future__ import annotations

import pytest
import torch
from torch import nn

from aptp_ray.core.packed import PackedLinear, can_pack, pack_linears


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 24), (3, 5, 24), (700, 24)])
def test_packed_is_linear(bias: bool, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    linear, rows = nn.Linear(24, 40, bias=bias), torch.randn(shape)
    with torch.no_grad():
        torch.testing.assert_close(PackedLinear(linear)(rows), linear(rows), atol=2e-6, rtol=0)


def test_all_linear_layers_of_a_model_are_packed_and_nothing_else() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 4))).requires_grad_(False)
    rows = torch.randn(6, 8)
    before = model(rows)
    assert can_pack(model)
    pack_linears(model)
    assert [type(module).__name__ for module in model.modules()].count("PackedLinear") == 2
    assert isinstance(model[1][0], nn.LayerNorm)
    torch.testing.assert_close(model(rows), before, atol=2e-6, rtol=0)


def test_other_precisions_stay_as_they_are() -> None:
    assert not can_pack(nn.Linear(8, 8).bfloat16())
