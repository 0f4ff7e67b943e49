from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from aptp_ray.core.losses import (
    PRUNE_LOSSES,
    add_noise,
    contrastive_loss,
    match_losses,
    min_snr_weights,
    prediction_target,
    prune_losses,
    weighted_sum,
)
from tests.core.objectives import ALPHAS, SCHEDULER, randn


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
    matches = match_losses(
        model_output=randn(4, 2), teacher_output=randn(4, 2), target=randn(4, 2), snr_weight=torch.ones(4)
    )
    common: dict[str, Any] = {"z": randn(4, 5), "features": features, "budget": 0.5}
    losses = prune_losses(matches, **common, ratios=ratios, code_features=features.flip(0))
    assert tuple(losses) == PRUNE_LOSSES
    assert losses["resource"].item() == pytest.approx(abs(np.log(0.6 / 0.5)))
    assert losses["spread"].item() == pytest.approx(-np.std([0.4, 0.6, 0.8, 0.6]), rel=1e-5)
    assert losses["peak"].item() == pytest.approx(0.2)
    cosines = [float(features[i] @ features[3 - i]) for i in range(4)]
    assert losses["commitment"].item() == pytest.approx(1 - np.mean(cosines), rel=1e-5)
    under = prune_losses(matches, **common | {"budget": 0.75}, ratios=ratios)
    assert under["resource"].item() == pytest.approx(np.log(0.75 / 0.6)) and under["commitment"].item() == 0.0
    # One code: no spread at all, and still a finite gradient.
    single = torch.full((4,), 0.6, dtype=torch.float64, requires_grad=True)
    prune_losses(matches, **common, ratios=single)["spread"].backward()
    assert single.grad is not None and single.grad.isfinite().all()


def test_weighted_sum_wants_every_name_and_no_other() -> None:
    losses = {"a": torch.tensor(2.0), "b": torch.tensor(3.0)}
    assert weighted_sum(losses, {"a": 0.5, "b": 10}).item() == 31.0
    with pytest.raises(ValueError, match=r"unknown \['c'\], missing \['b'\]"):
        weighted_sum(losses, {"a": 1.0, "c": 1.0})
