"""An expert starts from the weights that it was cut out of."""

from __future__ import annotations

import pytest
import torch

from aptp_ray.core.gates import GatedUNet
from aptp_ray.core.prune import prune_unet
from aptp_ray.train.finetune import inherited_losses
from tests.core.objectives import finetune_batch, make_finetune
from tests.core.tiny import tiny_sd21


def test_an_expert_is_the_masked_model_before_its_first_step() -> None:
    whole, teacher = tiny_sd21(1), tiny_sd21()
    code = GatedUNet(tiny_sd21()).space.random_code(0.6, torch.Generator().manual_seed(0))
    objective = make_finetune(prune_unet(whole, code), teacher)
    hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in teacher.modules())
    found = inherited_losses(objective, GatedUNet(whole), code, finetune_batch(), "expert-0")
    assert set(found) == {"expert", "masked"} and found["expert"]["distillation"] > 1e-3
    assert found["expert"] == pytest.approx(found["masked"], rel=1e-4)
    assert objective.training and not teacher.training
    assert hooks == sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in teacher.modules())


def test_weights_that_were_not_inherited_are_noticed() -> None:
    """One matrix of many at a fresh start is enough."""
    code = GatedUNet(tiny_sd21()).space.random_code(0.6, torch.Generator().manual_seed(0))
    student = prune_unet(tiny_sd21(1), code)
    torch.nn.init.normal_(student.up_blocks[1].resnets[0].conv1.weight, generator=torch.Generator().manual_seed(0))
    objective = make_finetune(student, tiny_sd21())
    with pytest.raises(RuntimeError, match=r"\[expert-3\] the expert does not start from the weights"):
        inherited_losses(objective, GatedUNet(tiny_sd21(1)), code, finetune_batch(), "expert-3")
