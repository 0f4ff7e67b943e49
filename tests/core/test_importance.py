from __future__ import annotations

import pytest
import torch
from scipy.stats import spearmanr

from aptp_ray.core.gates import GatedUNet
from aptp_ray.core.importance import ImportanceBatch, measure_importance, spearman
from aptp_ray.core.macs import MacsModel
from aptp_ray.core.prune import prune_unet
from tests.core.tiny import inputs_for, tiny_sd21

UNET = tiny_sd21()
PLAIN = tiny_sd21()
GATED = GatedUNet(UNET)
MACS = MacsModel.measure(PLAIN, (8, 8), 5, GATED.space)


def make_batch(rows: int = 2, seed: int = 0, labels: list[str] | None = None, masked: bool = False) -> ImportanceBatch:
    inputs = inputs_for(PLAIN, batch=rows, seed=seed, size=8)
    mask = None
    if masked:
        mask = torch.ones(rows, 5, dtype=torch.bool)
        mask[:, 3:] = False
    return ImportanceBatch(inputs["sample"], inputs["timestep"], inputs["encoder_hidden_states"], mask, labels)


def test_scores_are_the_errors_of_really_pruned_unets() -> None:
    batch, calls = make_batch(masked=True), []
    result = measure_importance(
        GATED, [batch], macs=MACS, chunk=97, progress=lambda done, total: calls.append((done, total))
    )
    assert result.score.shape == (GATED.space.dim,) and result.num_samples == 2 and result.per_group == {}
    assert calls[-1] == (2 * GATED.space.dim, 2 * GATED.space.dim) and len(calls) == -(-2 * GATED.space.dim // 97)
    inputs = {
        "sample": batch.sample, "timestep": batch.timesteps, "encoder_hidden_states": batch.text_states,
        "encoder_attention_mask": batch.text_mask,
    }  # fmt: skip
    kinds = {site.kind: site for site in GATED.space.sites}
    entries = [kinds[kind].start + kinds[kind].width - 1 for kind in ("resnet", "attention", "feed_forward", "depth")]
    with torch.no_grad():
        teacher = PLAIN(**inputs).sample
        for entry in entries:
            code = GATED.space.full_code()
            code[entry] = False
            expected = float((prune_unet(PLAIN, code)(**inputs).sample - teacher).pow(2).mean())
            assert float(result.score[entry]) == pytest.approx(expected, rel=1e-3)
    torch.testing.assert_close(result.per_mac, result.score / MACS.entry_macs())


def test_groups_are_means_over_their_own_samples() -> None:
    first, second = make_batch(1, seed=1, labels=["photo"]), make_batch(1, seed=2, labels=["line"])
    together = measure_importance(GATED, [first, second], macs=MACS, chunk=256)
    alone = measure_importance(GATED, [first], macs=MACS, chunk=200)
    torch.testing.assert_close(together.per_group["photo"], alone.score, rtol=1e-4, atol=1e-12)
    torch.testing.assert_close(together.score, (together.per_group["photo"] + together.per_group["line"]) / 2)
    expected = spearmanr(together.per_group["line"].numpy(), together.per_group["photo"].numpy()).statistic
    assert together.agreement() == {("line", "photo"): pytest.approx(expected, abs=1e-9)}


def test_spearman_is_scipys_with_ties() -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randint(0, 6, (50,), generator=generator).double()
    b = a + 3 * torch.randn(50, generator=generator).round()
    assert spearman(a, b) == pytest.approx(spearmanr(a.numpy(), b.numpy()).statistic, abs=1e-12)
    assert spearman(a, -a) == pytest.approx(-1) and spearman(a, torch.ones(50)) == 0.0
    with pytest.raises(ValueError, match="two vectors"):
        spearman(a, b[:-1])


def test_bad_inputs() -> None:
    with pytest.raises(ValueError, match="no samples"):
        measure_importance(GATED, [], macs=MACS)
    with pytest.raises(ValueError, match="3 labels for 1 samples"):
        measure_importance(GATED, [make_batch(1, labels=["a", "b", "c"])], macs=MACS, chunk=512)
    broken = make_batch(1)
    broken.sample.fill_(torch.nan)
    with pytest.raises(ValueError, match="teacher's output"):
        measure_importance(GATED, [broken], macs=MACS)
