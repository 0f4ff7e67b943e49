"""Hardening by measurement: one code for all experts."""

from __future__ import annotations

import pytest
import torch

from aptp_ray.core.ablation import AblationPath
from aptp_ray.core.baselines import ablation_greedy
from aptp_ray.core.importance import Importance
from aptp_ray.core.macs import MacsModel
from aptp_ray.core.router import PromptRouter
from aptp_ray.train.sizes import same_code
from tests.core.tiny import tiny_sd21


def test_experts_that_differ_by_weights_alone_keep_what_one_code_of_the_budget_keeps() -> None:
    macs = MacsModel.measure(tiny_sd21(), (8, 8), 5)
    score = torch.rand(macs.space.dim, generator=torch.Generator().manual_seed(0)).double() * macs.entry_macs()
    importance = Importance(score, macs.entry_macs())
    path = AblationPath(macs, (macs.space.full_code(),), (importance,), alignment=1)
    start = torch.zeros(macs.space.dim)
    router = PromptRouter(macs.space, z_dim=8, num_codes=3, generator=torch.Generator().manual_seed(0), start_logits=start)

    hard = same_code(router, path, 0.6)

    expected = ablation_greedy(macs.space, macs, 0.6, importance=importance, alignment=1)
    assert torch.equal(hard.codes, expected.expand(3, -1)) and torch.equal(router.hard_codes, hard.codes)
    exact = macs.exact(expected) / macs.total
    assert hard.ratios.tolist() == pytest.approx([exact] * 3) and hard.macs_ratio == pytest.approx(exact)
    assert abs(exact / 0.6 - 1) <= 0.005
    with pytest.raises(ValueError, match="budget"):
        same_code(router, path, 0.01)
