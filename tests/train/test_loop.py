"""The parts of the training loop that need no cluster."""

from __future__ import annotations

import pytest

from aptp_ray.config import Optimizer
from aptp_ray.train.loop import learning_rate


@pytest.mark.parametrize(
    ("schedule", "step", "expected"),
    [
        ("constant", 50, 1.0),
        ("cosine", 10, 1.0),
        ("cosine", 55, 0.51),
        ("constant_cosine", 49, 1.0),
        ("constant_cosine", 75, 0.51),
    ],
)
def test_learning_rates(schedule: str, step: int, expected: float) -> None:
    settings = Optimizer(warmup_steps=10, schedule=schedule, final_lr_fraction=0.02)  # type: ignore[arg-type]
    assert learning_rate(step, 100, settings) == pytest.approx(expected, abs=1e-9)
    assert learning_rate(4, 100, settings) == pytest.approx(0.5)
