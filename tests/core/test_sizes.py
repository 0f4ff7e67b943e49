from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import brentq

from aptp_ray.core.ablation import AblationPath, ablate
from aptp_ray.core.baselines import ablation_greedy
from aptp_ray.core.budget import HardCodes
from aptp_ray.core.gates import GatedUNet
from aptp_ray.core.importance import ImportanceBatch, measure_importance
from aptp_ray.core.macs import MacsModel
from aptp_ray.core.sizes import match_error, sized_codes, water_filling
from tests.core.tiny import tiny_sd21

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


# -- codes sized by what their prompts lose ------------------------------------------------------------------------------

UNET = tiny_sd21()
GATED = GatedUNet(UNET)
MACS = MacsModel.measure(UNET, (8, 8), 5, GATED.space)


def group(scale: float, seed: int, rows: int = 6) -> ImportanceBatch:
    draws = torch.Generator().manual_seed(seed)
    sample = scale * torch.randn(rows, 4, 8, 8, generator=draws)
    return ImportanceBatch(sample, torch.full((rows,), 500), scale * torch.randn(rows, 5, 24, generator=draws))


@pytest.fixture(autouse=True)
def few_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer sizes than in earnest: each costs a search for its code."""
    monkeypatch.setattr("aptp_ray.core.sizes._GRID", (0.8, 1.0, 1.2))


@pytest.fixture(scope="module")
def path() -> AblationPath:
    return ablate(MACS, lambda code, before: measure_importance(GATED, [group(1.0, 9, rows=2)], macs=MACS, code=code), [])


def sized(groups: list[ImportanceBatch], path: AblationPath, shares: list[float], budget: float = 0.7) -> HardCodes:
    return sized_codes(GATED, groups, path=path, budget=budget, shares=torch.tensor(shares))


def lost(groups: list[ImportanceBatch], codes: torch.Tensor, shares: list[float]) -> float:
    return sum(s * match_error(GATED, code, one) for s, code, one in zip(shares, codes, groups, strict=True))


def test_sizes_meet_the_budget_in_the_mean_and_lose_no_more_than_equal_ones(path: AblationPath) -> None:
    groups, shares = [group(0.02, 1), group(3.0, 2)], [0.6, 0.4]
    found = sized(groups, path, shares)
    mean = float(MACS.ratio(found.codes) @ torch.tensor(shares, dtype=torch.float64))
    assert found.macs_ratio == pytest.approx(mean) and mean == pytest.approx(0.7, rel=5e-3)
    equal = ablation_greedy(GATED.space, MACS, 0.7, importance=path.importances[0])
    assert lost(groups, found.codes, shares) <= lost(groups, equal.expand(2, -1), shares)


def test_groups_that_need_the_same_get_the_code_of_one(path: AblationPath) -> None:
    found = sized([group(1.0, 1), group(1.0, 1)], path, [0.25, 0.75])
    assert torch.equal(found.codes[0], found.codes[1])


def test_a_budget_that_no_code_meets_is_refused(path: AblationPath) -> None:
    with pytest.raises(ValueError, match="out of reach"):
        sized([group(1.0, 1)], path, [1.0], budget=0.01)
