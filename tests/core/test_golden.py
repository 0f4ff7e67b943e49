"""Twenty steps of each stage against losses on record. They find unnoticed changes; oracles elsewhere find wrong ones.

After a change that is meant to move them, write them anew and look at the difference:

    OMP_NUM_THREADS=1 python -m tests.core.test_golden

Tolerance: 1e-3 of a loss, or 1e-4 of the unit that losses have here. Twenty steps magnify what another build of torch rounds
differently; weights changed by 1e-6 of their size (some ten roundings) moved no loss by more than about a tenth of it. A
change of method moves them by far more: a learning rate by 1 %, for instance, is found (see the last test).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from aptp_ray.core.finetune_objective import FinetuneObjective
from aptp_ray.core.gates import GatedUNet
from aptp_ray.core.hardening import start_logits
from aptp_ray.core.losses import weighted_sum
from aptp_ray.core.macs import MacsModel
from aptp_ray.core.prune import prune_unet
from aptp_ray.core.prune_objective import PruneObjective
from aptp_ray.core.randomness import keyed_generator
from aptp_ray.core.relaxation import gumbel
from aptp_ray.core.router import PromptRouter
from tests.core.objectives import ALPHAS, WEIGHTS
from tests.core.tiny import tiny_sd21

STEPS, WARMUP, ROWS, CODES, Z_DIM = 20, 4, 6, 3, 12
FOLDER = Path(__file__).parent / "golden"
RELATIVE, ABSOLUTE = 1e-3, 1e-4


def perturbed_sd21(relative: float) -> Any:
    unet = tiny_sd21()
    generator = keyed_generator("golden", "perturbation")
    for parameter in unet.parameters():
        parameter.data *= 1 + relative * torch.randn(parameter.shape, generator=generator)
    return unet


def batch(stage: str, step: int) -> dict[str, Any]:
    generator = keyed_generator("golden", stage, step)
    return {
        "latents": torch.randn(ROWS, 4, 8, 8, generator=generator),
        "noise": torch.randn(ROWS, 4, 8, 8, generator=generator),
        "timesteps": torch.randint(0, 1000, (ROWS,), generator=generator),
        "text_states": torch.randn(ROWS, 5, 24, generator=generator),
    }


def record(losses: dict[str, torch.Tensor], **more: float) -> dict[str, float]:
    return {name: float(loss.detach()) for name, loss in losses.items()} | more


def prune_losses_of_20_steps(perturbation: float = 0.0, code_lr: float = 0.015) -> list[dict[str, float]]:
    unet = perturbed_sd21(perturbation)
    gated = GatedUNet(unet)
    macs = MacsModel.measure(unet, (8, 8), 5, gated.space)
    importance = torch.rand(gated.space.dim, generator=keyed_generator("golden", "importance")).double() * macs.entry_macs()
    start = start_logits(importance, macs, gated.space, budget=0.65, generator=keyed_generator("golden", "start"))
    router = PromptRouter(
        gated.space, z_dim=Z_DIM, num_codes=CODES, generator=keyed_generator("golden", "router"), start_logits=start
    )
    objective = PruneObjective(
        router, gated, macs, alphas_cumprod=ALPHAS, prediction_type="v_prediction", budget=0.65
    ).train()
    optimizer = torch.optim.AdamW(
        [{"params": list(router.predictor.parameters()), "lr": 2e-3}, {"params": [router.codes], "lr": code_lr}], weight_decay=0.0
    )
    prompts = torch.randn(48, Z_DIM, generator=keyed_generator("golden", "prompts"))
    rows = []
    for step in range(STEPS):
        if step == WARMUP:
            router.initialise_codes(prompts, generator=keyed_generator("golden", "codes"))
        warmup = step < WARMUP
        noise = gumbel((ROWS if warmup else CODES, gated.space.dim), keyed_generator("golden", "gumbel", step))
        losses, stats = objective(
            **batch("prune", step),
            text_mask=None,
            z=prompts[step : step + ROWS],
            gumbel_noise=noise,
            phase="warmup" if warmup else "codes",
        )
        rows.append(record(losses, macs_ratio=stats["macs_ratio"]))
        optimizer.zero_grad()
        weighted_sum(losses, WEIGHTS).backward()
        optimizer.step()
    return rows


def finetune_losses_of_20_steps(perturbation: float = 0.0, lr: float = 1e-3) -> list[dict[str, float]]:
    teacher = perturbed_sd21(perturbation)
    gated = GatedUNet(tiny_sd21())
    code = gated.space.random_code(0.65, keyed_generator("golden", "code"))
    student = prune_unet(perturbed_sd21(perturbation), code)
    objective = FinetuneObjective(student, teacher, alphas_cumprod=ALPHAS, prediction_type="v_prediction").train()
    optimizer = torch.optim.AdamW(student.parameters(), lr=lr)
    rows = []
    for step in range(STEPS):
        losses, stats = objective(**batch("finetune", step))
        rows.append(record(losses, match=stats["match"]))
        optimizer.zero_grad()
        weighted_sum(losses, {"denoising": 1.0, "distillation": 0.5, "block": 0.5}).backward()
        optimizer.step()
    return rows


STAGES = {"prune": prune_losses_of_20_steps, "finetune": finetune_losses_of_20_steps}


def one_thread(stage: str, **options: float) -> list[dict[str, float]]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return STAGES[stage](**options)
    finally:
        torch.set_num_threads(threads)


def differences(rows: list[dict[str, float]], expected: list[dict[str, float]]) -> list[str]:
    """What lies outside of the tolerance."""
    assert len(rows) == len(expected) == STEPS
    return [
        f"step {step}, {name}: {row[name]:.8g}, on record {value:.8g}"
        for step, (row, golden) in enumerate(zip(rows, expected, strict=True))
        for name, value in golden.items()
        if not abs(row[name] - value) <= ABSOLUTE + RELATIVE * abs(value)
    ]


@pytest.mark.parametrize("stage", STAGES)
def test_twenty_steps_give_the_losses_on_record(stage: str) -> None:
    expected = json.loads((FOLDER / f"{stage}.json").read_text())
    rows = one_thread(stage)
    assert [set(row) for row in rows] == [set(row) for row in expected]
    assert not differences(rows, expected), "\n".join(differences(rows, expected)[:10])


@pytest.mark.parametrize(("stage", "change"), [("prune", {"code_lr": 0.01515}), ("finetune", {"lr": 1.01e-3})])
def test_a_learning_rate_of_one_percent_more_is_found(stage: str, change: dict[str, float]) -> None:
    assert differences(one_thread(stage, **change), json.loads((FOLDER / f"{stage}.json").read_text()))


if __name__ == "__main__":
    for name in STAGES:
        text = ",\n".join(json.dumps({key: round(value, 9) for key, value in row.items()}) for row in one_thread(name))
        (FOLDER / f"{name}.json").write_text(f"[\n{text}\n]\n")
