"""What is predicted stands beside what was measured, with the signs that a reader expects, and only where the two compare."""

from __future__ import annotations

from math import log10
from typing import Any

import pytest

from aptp_ray.evaluate.comparison import tailoring
from aptp_ray.evaluate.gains import gains

NEEDS = {
    "between": {"a | b": 0.9},
    "within": {"a": 0.98, "b": 0.99},
    "error": {"0.5": {"a": 0.01, "b": 0.02}},
    "water_filling": {"0.5": {"ratios": {"a": 0.4, "b": 0.6}, "equal": 0.02, "unequal": 0.01}},
}


def system(macs: float, experts: list[int | None], steps: int = 20, kind: str = "mixture") -> dict[str, Any]:
    return {"kind": kind, "steps": steps, "macs_per_image": macs, "unets": [{"expert": expert} for expert in experts]}


def estimate(value: float, low: float, high: float) -> dict[str, float]:
    return {"value": value, "low": low, "high": high}


@pytest.fixture
def scores() -> dict[str, Any]:
    """Other minus mixture: "greedy" is 2 dB more like the teacher (worse for the mixture), and 3 further away by distance."""
    return {
        "systems": {
            "mixture": system(100.0, [0, 1]), "greedy": system(101.0, [0]), "teacher": system(200.0, [None], kind="teacher"),
            "fewer": system(100.0, [None], steps=10, kind="teacher"), "small <one>": system(80.0, [0]),
            "longer": system(100.0, [0], steps=10),
        },
        "better": {"teacher_psnr": "higher", "frechet": "lower"},
        "differences": {
            "against": "mixture",
            "scores": {
                "teacher_psnr": {name: estimate(2.0, 1.0, 3.5) for name in ("greedy", "fewer", "small <one>", "longer")},
                "frechet": {name: estimate(3.0, -1.0, 7.0) for name in ("greedy", "teacher", "fewer", "small <one>", "longer")},
            },
        },
        "seeds": None,
    }  # fmt: skip


def test_gains_count_for_the_mixture_and_against_one_code_at_its_macs_alone(scores: dict[str, Any]) -> None:
    found = gains(NEEDS, scores, 0.5)
    assert found is not None and found["at"] == 0.5
    assert found["predicted"]["decibels"] == pytest.approx(10 * log10(2))
    (greedy,) = found["measured"]
    assert greedy["system"] == "greedy" and greedy["runs"] == 1
    assert greedy["scores"] == {"teacher_psnr": estimate(-2.0, -3.5, -1.0), "frechet": estimate(3.0, -1.0, 7.0)}


def test_means_over_seeds_are_taken_where_there_are_some(scores: dict[str, Any]) -> None:
    scores["systems"]["greedy-1"] = system(99.0, [0])
    scores["seeds"] = {
        "against": "mixture",
        "things": {
            "mixture": {"runs": ["mixture"]},
            "greedy": {"runs": ["greedy", "greedy-1"]},
            "small": {"runs": ["small <one>"]},
        },
        "differences": {"frechet": {"greedy": estimate(4.0, 3.0, 5.0), "small": estimate(9.0, 8.0, 10.0)}},
    }
    found = gains(NEEDS, scores, 0.5)
    assert found is not None
    assert found["measured"] == [{"system": "greedy", "runs": 2, "scores": {"frechet": estimate(4.0, 3.0, 5.0)}}]


def test_nothing_is_put_side_by_side_that_does_not_compare(scores: dict[str, Any]) -> None:
    assert gains(NEEDS, None, 0.5) is None and gains(NEEDS, scores, 0.6) is None
    assert gains({**NEEDS, "water_filling": {}}, scores, 0.5) is None
    del scores["systems"]["greedy"]
    assert gains(NEEDS, scores, 0.5) is None


def test_the_page_shows_both_with_stars_where_zero_is_left_out(scores: dict[str, Any]) -> None:
    page = tailoring(NEEDS, gains(NEEDS, scores, 0.5))
    assert "a gain of 3.01 dB" in page
    row = page.split("<td class=name>greedy</td>")[1].split("</tr>")[0]
    assert row == (
        "<td>1</td><td>+3.01</td><td>-2 <small>[-3.5, -1]</small>*</td><td>+3 <small>[-1, +7]</small></td>"
    )
    assert "Predicted and measured" not in tailoring(NEEDS, None)
