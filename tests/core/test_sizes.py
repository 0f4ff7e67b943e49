from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import brentq

from aptp_ray.core.sizes import water_filling

BUDGETS = (0.9, 0.8, 0.65, 0.5, 0.4)


def falling(levels: dict[str, tuple[float, float]]) -> dict[float, dict[str, float]]:
    """Errors a * exp(-b * budget), which are straight lines in the logarithm: interpolation is exact."""
    return {at: {kind: a * np.exp(-b * at) for kind, (a, b) in levels.items()} for at in BUDGETS}


def test_at_the_optimum_a_mac_buys_the_same_everywhere() -> None:
    levels = {"easy": (5.0, 12.0), "middle": (20.0, 14.0), "hard": (30.0, 11.0)}
    shares = {"easy": 0.5, "middle": 0.2, "hard": 0.3}
    found = water_filling(falling(levels), shares, 0.6)

    def ratios(level: float) -> dict[str, float]:  # a b exp(-b r) = level
        return {kind: np.log(a * b / level) / b for kind, (a, b) in levels.items()}

    level = np.exp(brentq(lambda log: sum(shares[k] * r for k, r in ratios(np.exp(log)).items()) - 0.6, -20, 5))
    assert found["ratios"] == pytest.approx(ratios(level), abs=2e-3)
    assert found["unequal"] == pytest.approx(
        sum(shares[k] * a * np.exp(-b * ratios(level)[k]) for k, (a, b) in levels.items()), rel=1e-4
    )
    assert (
        found["unequal"] < found["equal"] == pytest.approx(sum(shares[k] * a * np.exp(-b * 0.6) for k, (a, b) in levels.items()))
    )


def test_kinds_that_need_the_same_get_the_same() -> None:
    found = water_filling(falling({"a": (9.0, 12.0), "b": (9.0, 12.0)}), {"a": 0.7, "b": 0.3}, 0.65)
    assert found["ratios"] == pytest.approx({"a": 0.65, "b": 0.65}, abs=1e-3)
    assert found["unequal"] == pytest.approx(found["equal"])


def test_nothing_is_promised_outside_of_what_was_measured() -> None:
    with pytest.raises(ValueError, match=r"budget 0.3 lies outside .* 0.4 to 0.9"):
        water_filling(falling({"a": (1.0, 1.0)}), {"a": 1.0}, 0.3)
    found = water_filling(falling({"easy": (1e-9, 12.0), "hard": (9.0, 12.0)}), {"easy": 0.5, "hard": 0.5}, 0.6)
    assert min(found["ratios"].values()) >= 0.4 and max(found["ratios"].values()) <= 0.9
