from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from diffusers import DDPMScheduler
from torch import Tensor

from aptp_ray.core.finetune_objective import FinetuneObjective
from aptp_ray.core.gates import GatedUNet
from aptp_ray.core.losses import (
    FINETUNE_LOSSES,
    PRUNE_LOSSES,
    add_noise,
    contrastive_loss,
    match_losses,
    min_snr_weights,
    prediction_target,
    prune_losses,
    weighted_sum,
)
from aptp_ray.core.macs import MacsModel
from aptp_ray.core.prune import prune_unet
from aptp_ray.core.prune_objective import PruneObjective
from aptp_ray.core.relaxation import binarize, gumbel, relax
from aptp_ray.core.router import PromptRouter
from aptp_ray.core.transport import balanced_assignment
from tests.core.tiny import tiny_sd21

SCHEDULER = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
ALPHAS = SCHEDULER.alphas_cumprod
WEIGHTS = dict(zip(PRUNE_LOSSES, (1.0, 0.2, 0.2, 2.0, 1.0, 1.0, 0.1, 0.1), strict=True))


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@cache
def teacher() -> tuple[GatedUNet, MacsModel]:
    """The frozen teacher that all prune steps share, and its MACs."""
    gated = GatedUNet(tiny_sd21())
    return gated, MacsModel.measure(gated.unet, (8, 8), 5, gated.space)


def make_objective(codes: int = 3, **options: Any) -> PruneObjective:
    gated, macs = teacher()
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(gated.space.dim, generator=generator) - 2.5
    router = PromptRouter(gated.space, z_dim=12, num_codes=codes, generator=generator, start_logits=start)
    z = randn(48, 12, seed=5)
    router.initialise_codes(z, generator=generator)
    with torch.no_grad():
        router.codes += 0.3 * torch.randn(router.codes.shape, generator=generator)
    return PruneObjective(
        router, gated, macs, **{"alphas_cumprod": ALPHAS, "prediction_type": "v_prediction", "budget": 0.65, **options}
    )


def make_batch(objective: PruneObjective, rows: int = 4, phase: str = "codes", seed: int = 0) -> dict[str, Any]:
    draws = torch.Generator().manual_seed(100 + seed)
    per_sample = phase == "warmup" or objective.noise_per == "sample"
    number = rows if per_sample else objective.router.num_codes
    return {
        "latents": randn(rows, 4, 8, 8, seed=seed + 1),
        "noise": randn(rows, 4, 8, 8, seed=seed + 2),
        "timesteps": torch.randint(0, 1000, (rows,), generator=draws),
        "text_states": randn(rows, 5, 24, seed=seed + 3),
        "text_mask": None,
        "z": randn(rows, 12, seed=seed + 4),
        "gumbel_noise": gumbel((number, objective.router.space.dim), draws),
        "phase": phase,
    }


def gradients(objective: PruneObjective, loss: Tensor) -> tuple[float, float]:
    """Largest gradient of the predictor and of the codes."""
    objective.zero_grad()
    loss.backward(retain_graph=True)
    assert all(p.grad is None for p in objective.gated.parameters())

    def largest(*parameters: Tensor) -> float:
        return max(0.0 if p.grad is None else float(p.grad.abs().max()) for p in parameters)

    return largest(*objective.router.predictor.parameters()), largest(objective.router.codes)


# -- diffusion ---------------------------------------------------------------------------------------------------------


def test_noise_and_targets_are_the_schedulers() -> None:
    x0, noise, t = randn(6, 4, 3, 3), randn(6, 4, 3, 3, seed=1), torch.tensor([0, 1, 250, 500, 998, 999])
    torch.testing.assert_close(add_noise(ALPHAS, x0, noise, t), SCHEDULER.add_noise(x0, noise, t))
    torch.testing.assert_close(
        prediction_target(ALPHAS, x0, noise, t, "v_prediction"), SCHEDULER.get_velocity(x0, noise, t)
    )
    assert prediction_target(ALPHAS, x0, noise, t, "epsilon") is noise
    assert prediction_target(ALPHAS, x0, noise, t, "sample") is x0
    with pytest.raises(ValueError, match="unknown prediction type 'flow'"):
        prediction_target(ALPHAS, x0, noise, t, "flow")  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_min_snr_weights(kind: Any) -> None:
    t = torch.arange(1000)
    snr = (ALPHAS / (1 - ALPHAS)).double().numpy()
    divisor = {"epsilon": snr, "v_prediction": snr + 1, "sample": np.ones_like(snr)}[kind]
    np.testing.assert_allclose(min_snr_weights(ALPHAS, t, 5.0, kind).numpy(), np.minimum(snr, 5) / divisor, rtol=1e-4)
    # Zero terminal SNR, and a clean first step: the limits, no NaN.
    ends = min_snr_weights(torch.tensor([1.0, 0.5, 0.0]), torch.tensor([0, 2]), 5.0, kind)
    assert ends.tolist() == {"epsilon": [0.0, 1.0], "v_prediction": [0.0, 0.0], "sample": [5.0, 0.0]}[kind]
    assert min_snr_weights(ALPHAS, t, None, kind).unique().tolist() == [1.0]
    with pytest.raises(ValueError, match="gamma"):
        min_snr_weights(ALPHAS, t, 0.0, kind)


# -- losses ------------------------------------------------------------------------------------------------------------


def numpy_contrastive(features: np.ndarray, z: np.ndarray, form: str, diagonal: bool) -> float:
    rows, z = [], z / np.linalg.norm(z, axis=1, keepdims=True)
    for i in range(len(z)):
        others = [j for j in range(len(z)) if diagonal or j != i]
        p = np.exp([features[i] @ features[j] / 0.03 for j in others])
        q = np.exp([z[i] @ z[j] / 0.03 for j in others])
        p, q = p / p.sum(), q / q.sum()
        value = -(q * np.log(p)).sum() if form == "softmax" else -(q * np.log(p) + (1 - q) * np.log(1 - p)).mean()
        rows.append(value)
    return float(np.mean(rows))


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("form", ["softmax", "binary"])
def test_contrastive_loss_is_the_formula(form: Any, diagonal: bool) -> None:
    features = torch.nn.functional.normalize(1 + 0.3 * randn(6, 9).double(), dim=1).requires_grad_()
    z = 1 + 0.3 * randn(6, 5, seed=1).double()

    def loss(x: Tensor) -> Tensor:
        return contrastive_loss(x, z, form=form, diagonal=diagonal)

    expected = numpy_contrastive(features.detach().numpy(), z.numpy(), form, diagonal)
    assert loss(features).item() == pytest.approx(expected, rel=1e-9)
    assert torch.autograd.gradcheck(loss, (features,))


def test_contrastive_diagonal_holds_nearly_all_the_mass() -> None:
    z = torch.nn.functional.normalize(randn(8, 32), dim=1)
    # With the diagonal even identical orderings cannot tell the batch's neighbours apart from strangers.
    p = (z @ z.T / 0.03).softmax(dim=1)
    assert float(p.diagonal().min()) > 0.98
    assert contrastive_loss(randn(1, 4), randn(1, 3)).item() == 0.0
    with pytest.raises(ValueError, match="contrastive form"):
        contrastive_loss(randn(2, 4), randn(2, 3), form="other")  # type: ignore[arg-type]


def test_match_losses_are_the_formulas() -> None:
    output, teacher, target = (randn(3, 4, 2, 2, seed=seed) for seed in range(3))
    weight = torch.tensor([0.1, 0.5, 2.0])
    students = [randn(3, 5, 2, 2, seed=3), 100 * randn(3, 2, 4, 4, seed=4)]
    teachers = [randn(3, 5, 2, 2, seed=5), 100 * randn(3, 2, 4, 4, seed=6)]
    arguments: dict[str, Any] = {
        "model_output": output, "teacher_output": teacher, "target": target, "snr_weight": weight,
        "student_blocks": students, "teacher_blocks": teachers,
    }  # fmt: skip
    losses = match_losses(**arguments)
    o, t, g, w = (x.numpy() for x in (output, teacher, target, weight))
    assert losses["denoising"].item() == pytest.approx(np.mean([w[i] * ((o[i] - g[i]) ** 2).mean() for i in range(3)]))
    assert losses["distillation"].item() == pytest.approx(((o - t) ** 2).mean(), rel=1e-5)
    errors = [
        ((s[i] - e[i]) ** 2).mean() / (e[i] ** 2).mean()
        for s, e in zip([x.numpy() for x in students], [x.numpy() for x in teachers], strict=True) for i in range(3)
    ]  # fmt: skip
    assert losses["block"].item() == pytest.approx(np.mean(errors), rel=1e-5)
    plain = [float((s - e).pow(2).mean()) for s, e in zip(students, teachers, strict=True)]
    assert match_losses(**arguments, normalise_blocks=False)["block"].item() == pytest.approx(np.mean(plain), rel=1e-5)
    # Scaling one block does not change the normalised loss.
    scaled = arguments | {
        "student_blocks": [students[0], students[1] / 50], "teacher_blocks": [teachers[0], teachers[1] / 50],
    }  # fmt: skip
    assert match_losses(**scaled)["block"].item() == pytest.approx(losses["block"].item(), rel=1e-5)
    alone = match_losses(model_output=output, target=target, snr_weight=weight)
    assert alone["distillation"].item() == alone["block"].item() == 0.0
    with pytest.raises(ValueError, match="2 student blocks against 1"):
        match_losses(**arguments | {"teacher_blocks": teachers[:1]})


def test_prune_losses_on_ratios_and_codes() -> None:
    ratios = torch.tensor([0.4, 0.6, 0.8, 0.6], dtype=torch.float64, requires_grad=True)
    features = torch.nn.functional.normalize(randn(4, 7), dim=1)
    common: dict[str, Any] = {
        "model_output": randn(4, 2), "teacher_output": randn(4, 2), "target": randn(4, 2), "snr_weight": torch.ones(4),
        "student_blocks": [], "teacher_blocks": [], "z": randn(4, 5), "features": features, "budget": 0.5,
    }  # fmt: skip
    losses = prune_losses(**common, ratios=ratios, code_features=features.flip(0))
    assert tuple(losses) == PRUNE_LOSSES
    assert losses["resource"].item() == pytest.approx(abs(np.log(0.6 / 0.5)))
    assert losses["spread"].item() == pytest.approx(-np.std([0.4, 0.6, 0.8, 0.6]), rel=1e-5)
    assert losses["peak"].item() == pytest.approx(0.2)
    cosines = [float(features[i] @ features[3 - i]) for i in range(4)]
    assert losses["commitment"].item() == pytest.approx(1 - np.mean(cosines), rel=1e-5)
    under = prune_losses(**common | {"budget": 0.75}, ratios=ratios)
    assert under["resource"].item() == pytest.approx(np.log(0.75 / 0.6)) and under["commitment"].item() == 0.0
    # One code: no spread at all, and still a finite gradient.
    single = torch.full((4,), 0.6, dtype=torch.float64, requires_grad=True)
    prune_losses(**common, ratios=single)["spread"].backward()
    assert single.grad is not None and single.grad.isfinite().all()


def test_weighted_sum_wants_every_name_and_no_other() -> None:
    losses = {"a": torch.tensor(2.0), "b": torch.tensor(3.0)}
    assert weighted_sum(losses, {"a": 0.5, "b": 10}).item() == 31.0
    with pytest.raises(ValueError, match=r"unknown \['c'\], missing \['b'\]"):
        weighted_sum(losses, {"a": 1.0, "c": 1.0})


# -- the prune step ----------------------------------------------------------------------------------------------------


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
    assert losses["commitment"].item() == 0 and set(stats) == {"macs_ratio", "macs_ratio_std"}
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


@pytest.mark.parametrize(
    "switch",
    [
        {"unet_masks": "hard"}, {"resource_masks": "soft"}, {"noise_per": "sample"}, {"noisy_similarity": True},
        {"contrastive_form": "binary"}, {"contrastive_diagonal": True}, {"normalise_blocks": False}, {"gamma": None},
        {"assignment_epsilon": 0.05, "relative_epsilon": False},
    ],
    ids=lambda switch: next(iter(switch)),
)  # fmt: skip
def test_every_switch_changes_what_it_says(switch: dict[str, Any]) -> None:
    base, other = make_objective().eval(), make_objective(**switch).eval()
    batch = make_batch(base, rows=6)
    (losses, stats), (changed, changed_stats) = base(**batch), other(**batch | {
        "gumbel_noise": make_batch(other, rows=6)["gumbel_noise"]
    })  # fmt: skip
    differs = {name for name in PRUNE_LOSSES if not torch.allclose(losses[name], changed[name], rtol=1e-5, atol=1e-7)}
    expected = {
        "unet_masks": {"denoising", "distillation", "block"}, "resource_masks": {"resource", "spread", "peak"},
        "contrastive_form": {"contrastive"}, "contrastive_diagonal": {"contrastive"}, "normalise_blocks": {"block"},
        "gamma": {"denoising"},
    }.get(next(iter(switch)))  # fmt: skip
    if expected is not None:
        assert differs == expected
    elif "noise_per" in switch:
        assert {"denoising", "distillation", "spread"} <= differs
    elif "noisy_similarity" in switch:
        assert stats["similarity_std"] != changed_stats["similarity_std"]
    else:
        assert changed_stats["assignment_epsilon"] == 0.05 != stats["assignment_epsilon"]
    weighted_sum(changed, WEIGHTS).backward()
    assert float(other.router.codes.grad.abs().max()) > 0  # type: ignore[union-attr]


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


# -- two ranks against one process -------------------------------------------------------------------------------------


def step(phase: str, rank: int | None) -> tuple[Tensor, list[Tensor], list[int]]:
    """Coupled losses, gradients and counts of one step on all 6 rows (rank None) or on a rank's 3 of them."""
    objective = make_objective().train()
    batch = make_batch(objective, rows=6, phase=phase)
    module: torch.nn.Module = objective
    if rank is not None:
        for name, value in batch.items():
            if isinstance(value, Tensor) and (name != "gumbel_noise" or phase == "warmup"):
                batch[name] = value[3 * rank : 3 * rank + 3]
        module = torch.nn.parallel.DistributedDataParallel(objective)
    losses, stats = module(**batch)
    weighted_sum(losses, WEIGHTS).backward()
    coupled = torch.stack([losses[name].detach() for name in PRUNE_LOSSES[3:]])
    grads = [p.grad for p in objective.router.parameters() if p.grad is not None]
    return coupled, [*grads, objective.router.mean_embedding], stats.get("assignment_counts", [])


def rank_main(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)
    torch.save({phase: step(phase, rank) for phase in ("warmup", "codes")}, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_give_what_one_process_gives(tmp_path: Path) -> None:
    mp.spawn(rank_main, args=(str(tmp_path),), nprocs=2)
    for phase in ("warmup", "codes"):
        coupled, grads, counts = step(phase, None)
        for rank in range(2):
            other = torch.load(tmp_path / f"rank{rank}.pt", weights_only=True)[phase]
            torch.testing.assert_close(other[0], coupled, atol=1e-5, rtol=1e-4)
            assert other[2] == counts and len(other[1]) == len(grads)
            for actual, expected in zip(other[1], grads, strict=True):
                torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-3)


# -- the fine-tuning step ----------------------------------------------------------------------------------------------


def finetune_batch(rows: int = 3) -> dict[str, Any]:
    return {
        "latents": randn(rows, 4, 8, 8, seed=1), "noise": randn(rows, 4, 8, 8, seed=2),
        "timesteps": torch.tensor([10, 500, 990])[:rows], "text_states": randn(rows, 5, 24, seed=3),
    }  # fmt: skip


def make_finetune(student: torch.nn.Module, teacher: torch.nn.Module | None) -> FinetuneObjective:
    return FinetuneObjective(student, teacher, alphas_cumprod=ALPHAS, prediction_type="epsilon").train()


def test_gated_and_pruned_students_have_the_same_losses() -> None:
    gated = GatedUNet(tiny_sd21())
    code = gated.space.random_code(0.6, torch.Generator().manual_seed(0))
    shared = make_finetune(gated, tiny_sd21())
    apart = make_finetune(prune_unet(tiny_sd21(), code), tiny_sd21())
    losses, stats = shared(**finetune_batch(), codes=code.repeat(3, 1))
    expected, expected_stats = apart(**finetune_batch())
    assert tuple(losses) == FINETUNE_LOSSES and stats["match"] == pytest.approx(expected_stats["match"], rel=1e-3)
    for name in FINETUNE_LOSSES:
        torch.testing.assert_close(losses[name], expected[name], rtol=1e-3, atol=1e-6)
    weighted_sum(losses, {"denoising": 1.0, "distillation": 0.2, "block": 0.2}).backward()
    assert all(p.grad is None for p in shared.teacher.parameters())  # type: ignore[union-attr]
    assert sum(p.grad is not None for p in gated.parameters()) == len(list(gated.parameters()))
    assert not shared.teacher.training and shared.student.training  # type: ignore[union-attr]


def test_an_unpruned_student_matches_its_teacher() -> None:
    losses, stats = make_finetune(tiny_sd21(), tiny_sd21())(**finetune_batch())
    assert losses["distillation"].item() == losses["block"].item() == stats["match"] == 0.0
    batch = finetune_batch()
    noised = SCHEDULER.add_noise(batch["latents"], batch["noise"], batch["timesteps"])
    output = tiny_sd21()(noised, batch["timesteps"], batch["text_states"]).sample
    error = (output - batch["noise"]).pow(2).mean((1, 2, 3))
    snr = ALPHAS[batch["timesteps"]] / (1 - ALPHAS[batch["timesteps"]])
    expected = (error * snr.clamp(max=5) / snr).mean()
    torch.testing.assert_close(losses["denoising"], expected, rtol=1e-4, atol=0)


def test_without_a_teacher_there_is_denoising_alone() -> None:
    losses, stats = make_finetune(tiny_sd21(), None)(**finetune_batch())
    assert losses["denoising"].item() > 0 and stats == {}
    assert losses["distillation"].item() == losses["block"].item() == 0


def test_finetune_objective_refuses_what_cannot_work() -> None:
    unet = tiny_sd21()
    with pytest.raises(ValueError, match="share weights"):
        make_finetune(GatedUNet(unet), unet)
    with pytest.raises(TypeError, match="GatedUNet"):
        make_finetune(unet, None)(**finetune_batch(), codes=torch.ones(3, 10))
