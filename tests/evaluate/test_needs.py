from __future__ import annotations

import torch

from aptp_ray.core.gates import GatedUNet
from aptp_ray.core.macs import MacsModel
from aptp_ray.evaluate.needs import KindSamples, measure_needs, noised
from tests.core.tiny import tiny_sd21

GATED = GatedUNet(tiny_sd21())
MACS = MacsModel.measure(GATED.unet, (8, 8), 5, GATED.space)
ALPHAS = torch.linspace(0.999, 0.01, 50)


def samples(scale: float, seed: int, rows: int = 6) -> KindSamples:
    draws = torch.Generator().manual_seed(seed)
    return KindSamples(scale * torch.randn(rows, 4, 8, 8, generator=draws), scale * torch.randn(rows, 5, 24, generator=draws))


def test_needs_by_kind_and_what_judging_anew_changes() -> None:
    kinds = {"plain": samples(0.1, 0), "rich": samples(2.0, 1)}
    arguments = {"alphas_cumprod": ALPHAS, "importance_samples": 2, "budgets": (0.9, 0.6)}
    once = measure_needs(GATED, MACS, kinds, **arguments)
    assert set(once) == {"between", "within", "error"} and -1 <= once["between"]["plain | rich"] <= 1
    assert all(once["error"]["0.9"][kind] < once["error"]["0.6"][kind] for kind in kinds)
    again = measure_needs(GATED, MACS, kinds, again=[0.8, 0.7], **arguments)
    assert again["error_once"] == once["error"] and again["importances_at"] == [0.8, 0.7]
    assert again["error"]["0.9"] == once["error"]["0.9"] and again["error"]["0.6"] != once["error"]["0.6"]


def test_every_kind_gets_the_same_noise_and_each_round_other_samples() -> None:
    still = KindSamples(torch.zeros(6, 4, 8, 8), torch.arange(6.0)[:, None, None].expand(6, 5, 24))
    moved = KindSamples(torch.ones(6, 4, 8, 8), torch.zeros(6, 5, 24))
    first, other = noised(still, ALPHAS, 0, 4), noised(moved, ALPHAS, 0, 4)
    assert torch.equal(first.timesteps, other.timesteps)
    scale = ALPHAS[first.timesteps].sqrt().view(-1, 1, 1, 1)
    torch.testing.assert_close(other.sample - first.sample, scale.expand_as(first.sample))
    later = noised(still, ALPHAS, 0, 4, before=1)
    assert later.text_states[:, 0, 0].tolist() == [4, 5, 0, 1] and not torch.equal(later.sample, first.sample)
