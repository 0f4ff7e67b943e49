from __future__ import annotations

import numpy as np
import pytest
import torch

from aptp_ray.core.losses import PRUNE_LOSSES, weighted_sum
from aptp_ray.core.relaxation import binarize, relax
from aptp_ray.core.transport import balanced_assignment
from tests.core.objectives import SCHEDULER, WEIGHTS, gradients, make_batch, make_objective, randn


def test_what_each_loss_moves_after_the_warmup() -> None:
    objective = make_objective()
    losses, stats = objective(**make_batch(objective, rows=6))
    assert tuple(losses) == PRUNE_LOSSES and all(loss.isfinite() for loss in losses.values())
    for name in ("denoising", "distillation", "block", "resource", "spread", "peak"):
        predictor, codes = gradients(objective, losses[name])
        assert predictor == 0 and codes > 0, name
    for name in ("contrastive", "commitment"):
        predictor, codes = gradients(objective, losses[name])
        assert predictor > 0 and codes == 0, name
    assert sum(stats["assignment_counts"]) == 6 and len(stats["assignment_counts"]) == 3
    assert stats["assignment_converged"] and 0 <= stats["agreement"] <= 1 and stats["similarity_std"] > 0
    assert 0.2 < stats["macs_ratio"] < 1


def test_what_each_loss_moves_in_the_warmup() -> None:
    objective = make_objective()
    losses, stats = objective(**make_batch(objective, phase="warmup"))
    for name in ("denoising", "distillation", "block", "resource", "contrastive", "spread", "peak"):
        predictor, codes = gradients(objective, losses[name])
        assert predictor > 0 and codes == 0, name
    assert losses["commitment"].item() == 0 and set(stats) == {"macs_ratio", "macs_ratio_std", "embedding_spread"}
    objective.zero_grad()
    weighted_sum(losses, WEIGHTS).backward()
    assert all(p.grad is not None for p in objective.router.parameters())  # what DDP waits for


def test_losses_are_those_of_a_hand_made_step() -> None:
    objective = make_objective().eval()
    batch = make_batch(objective, rows=5)
    router, unet = objective.router, objective.gated
    with torch.no_grad():
        losses, stats = objective(**batch)
        routed = router.similarity(router.embed(batch["z"]))
        soft = relax(router.codes, router.space, noise=batch["gumbel_noise"])
        index = balanced_assignment(routed).index
        assert index.bincount(minlength=3).tolist() == stats["assignment_counts"]
        noised = SCHEDULER.add_noise(batch["latents"], batch["noise"], batch["timesteps"])
        expected = unet(noised, batch["timesteps"], batch["text_states"]).sample
        with unet.use(soft[index]):
            output = unet(noised, batch["timesteps"], batch["text_states"]).sample
        assert losses["distillation"].item() == pytest.approx(float((output - expected).pow(2).mean()), rel=1e-4)
        exact = [objective.macs.exact(code) for code in binarize(soft, router.space)[index]]
        ratio = np.mean(exact) / objective.macs.total
    assert losses["resource"].item() == pytest.approx(abs(np.log(ratio / 0.65)), rel=1e-5)
    assert stats["macs_ratio"] == pytest.approx(ratio)


def test_gradient_of_the_task_by_finite_differences() -> None:
    objective = make_objective().eval()
    batch = make_batch(objective)
    codes = objective.router.codes
    # In float32: along the gradient itself the loss changes enough to leave digits to compare.
    losses, _ = objective(**batch)
    losses["distillation"].backward()
    gradient = codes.grad.clone()  # type: ignore[union-attr]
    direction, step = gradient / gradient.norm(), 2e-2
    values = []
    with torch.no_grad():
        # The assignment must not change along the way: the codes move, the similarity with them.
        for sign in (1, -1):
            codes += sign * step * direction
            values.append(objective(**batch)[0]["distillation"].item())
            codes -= sign * step * direction
    assert (values[0] - values[1]) / (2 * step) == pytest.approx(float(gradient.norm()), rel=1e-2)


def test_masked_tokens_do_not_matter() -> None:
    objective = make_objective().eval()
    batch = make_batch(objective)
    batch["text_mask"] = torch.tensor([[True, True, True, False, False]]).repeat(4, 1)
    other = batch | {"text_states": torch.cat([batch["text_states"][:, :3], 9 * randn(4, 2, 24, seed=8)], dim=1)}
    with torch.no_grad():
        torch.testing.assert_close(objective(**batch)[0]["distillation"], objective(**other)[0]["distillation"])
        batch["text_mask"] = None
        assert not torch.allclose(objective(**batch)[0]["distillation"], objective(**other)[0]["distillation"])


def test_training_mode_moves_the_routers_running_state_only() -> None:
    objective = make_objective().train()
    assert not objective.gated.training and objective.router.training
    mean, steps = objective.router.mean_embedding.clone(), int(objective.router.mean_steps)
    objective(**make_batch(objective))
    assert not torch.equal(mean, objective.router.mean_embedding) and int(objective.router.mean_steps) == steps + 1
    assert float(objective.router.epsilon) > 0
    state = {name: value.clone() for name, value in objective.router.state_dict().items()}
    objective.eval()(**make_batch(objective))
    assert all(torch.equal(value, state[name]) for name, value in objective.router.state_dict().items())


def test_a_few_steps_bring_the_mean_to_the_budget() -> None:
    objective = make_objective(budget=0.6, gamma=None)
    optimizer = torch.optim.Adam(objective.router.parameters(), lr=0.05)
    ratios = []
    for step in range(25):
        losses, stats = objective(**make_batch(objective, rows=3, seed=10 * step))
        optimizer.zero_grad()
        (2 * losses["resource"] + 0.2 * losses["distillation"]).backward()
        optimizer.step()
        ratios.append(stats["macs_ratio"])
    assert abs(ratios[0] - 0.6) > 0.05 and abs(np.mean(ratios[-5:]) - 0.6) < 0.02


def test_prune_objective_refuses_what_cannot_work() -> None:
    with pytest.raises(ValueError, match=r"budget 0\.1 is outside"):
        make_objective(budget=0.1)
    with pytest.raises(ValueError, match="noise_per='code'"):
        make_objective(noise_per="sample", noisy_similarity=True)
    objective = make_objective()
    with pytest.raises(ValueError, match="gumbel_noise must be"):
        objective(**make_batch(objective, phase="warmup") | {"phase": "codes"})
    with pytest.raises(ValueError, match="unknown phase 'later'"):
        objective(**make_batch(objective) | {"phase": "later"})
