"""Hardness against MACs: correlations by scipy, which measure counts first, and when there is nothing to tell."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from scipy.stats import spearmanr

from aptp_ray.evaluate.hardness import hardness_figures, hardness_of
from aptp_ray.evaluate.learned import learned

N = 40
MACS = [40.0, 60.0, 80.0]


def system(kind: str, experts: list[int | None], run: str = "home", macs: float = 60.0) -> dict[str, Any]:
    costs = [100.0 if expert is None else MACS[expert] for expert in experts]
    unets = [{"expert": expert, "macs": cost, "run_dir": run} for expert, cost in zip(experts, costs, strict=True)]
    return {"kind": kind, "macs_per_image": macs, "unets": unets}


@pytest.fixture
def evaluated() -> tuple[pa.Table, dict[str, Any], np.ndarray]:
    """Errors of one code that grow with the expert's MACs, and an image-text score that does not care."""
    generator = np.random.default_rng(0)
    who = generator.integers(0, 3, N)
    columns: dict[str, Any] = {
        "key": [f"k{i}" for i in range(N)],
        "text": [f"prompt <{i}>" for i in range(N)],
        "unet:mixture": who.astype(np.int32),
        "error:mixture": np.zeros(N),
        "error:greedy": 0.01 * (who + generator.random(N)),
        "error:large": generator.random(N),
        "error:dealt": 0.01 * generator.random(N),
        "error:alone": 0.01 * generator.random(N),
        "image_text:teacher": generator.random(N).astype(np.float32),
        **{f"file:{name}": [f"evaluation/images/{name}.tar"] * N for name in ("mixture", "greedy", "dealt", "teacher")},
    }
    scores = {
        "images": N,
        "evaluation": {"replicates": 100, "seed": 0},
        "differences": {"against": "mixture"},
        "systems": {
            "mixture": system("mixture", [0, 1, 2]), "greedy": system("mixture", [1], "elsewhere", 50.0),
            "large": system("mixture", [2], "third", 90.0), "alone": system("one_expert", [0], macs=40.0),
            "dealt": system("random_routing", [0, 1, 2]), "teacher": system("teacher", [None], macs=100.0),
        },
    }  # fmt: skip
    return pa.table(columns), scores, who


def test_correlations_are_scipys_and_intervals_hold_them(evaluated: tuple[pa.Table, dict[str, Any], np.ndarray]) -> None:
    table, scores, who = evaluated
    found = hardness_figures(table, scores)
    assert found is not None and found["captions"] == N
    assert [(one["kind"], one["system"]) for one in found["measures"]] == [
        ("one_code", "greedy"), ("random_routing", "dealt"), ("one_expert", "alone"), ("image_text", "teacher")
    ]  # fmt: skip
    macs = np.array(MACS)[who]
    signs = {"error:greedy": 1, "error:dealt": 1, "error:alone": 1, "image_text:teacher": -1}
    for one, (name, sign) in zip(found["measures"], signs.items(), strict=True):
        assert one["correlation"]["value"] == pytest.approx(spearmanr(macs, sign * table[name].to_numpy()).statistic)
        assert one["correlation"]["low"] < one["correlation"]["value"] < one["correlation"]["high"]
    assert found["measures"][0]["correlation"]["low"] > 0.5  # planted
    # The plain percentile interval of scipy's own bootstrap is about as wide.
    generator, plain = np.random.default_rng(1), []
    for _ in range(400):
        rows = generator.integers(0, N, N)
        plain.append(spearmanr(macs[rows], -table["image_text:teacher"].to_numpy()[rows]).statistic)
    width = found["measures"][3]["correlation"]["high"] - found["measures"][3]["correlation"]["low"]
    assert width == pytest.approx(np.quantile(plain, 0.975) - np.quantile(plain, 0.025), rel=0.3)


def test_the_hardest_captions_are_those_of_the_largest_error(evaluated: tuple[pa.Table, dict[str, Any], np.ndarray]) -> None:
    table, scores, who = evaluated
    found = hardness_figures(table, scores)
    assert found is not None
    wrong = table["error:greedy"].to_numpy()
    order = sorted(range(N), key=lambda row: -wrong[row])[:6]
    assert [one["prompt"] for one in found["hardest"]] == [f"prompt <{row}>" for row in order]
    assert [one["macs_ratio"] for one in found["hardest"]] == [MACS[who[row]] / 100 for row in order]
    assert found["hardest"][0]["psnr"] == pytest.approx(-10 * np.log10(wrong[order[0]]))
    assert set(found["hardest"][0]["files"]) == {"mixture", "greedy", "teacher"}
    page = learned(found, [{}] * 6)
    assert "By the first measure they do" in page and page.count("<figure>") == 6 and "<img" not in page
    assert re.findall(r"prompt &lt;(\d+)&gt;", page) == [str(row) for row in order]


def test_experts_of_one_size_leave_nothing_to_correlate(evaluated: tuple[pa.Table, dict[str, Any], np.ndarray]) -> None:
    table, scores, _ = evaluated
    for unet in scores["systems"]["mixture"]["unets"]:
        unet["macs"] = 60.0
    found = hardness_figures(table, scores)
    assert found is not None and all(one["correlation"] is None for one in found["measures"])
    assert "all experts cost the same" in learned(found, [{}] * 6)


def test_without_a_measure_there_is_no_section(evaluated: tuple[pa.Table, dict[str, Any], np.ndarray]) -> None:
    table, scores, _ = evaluated
    assert hardness_figures(None, scores) is None and hardness_figures(table, None) is None
    bare = table.select(["key", "text", "unet:mixture", "file:mixture", "error:mixture"])
    assert hardness_of(bare, scores) == [] and hardness_figures(bare, scores) is None
    assert hardness_figures(table, scores | {"images": N + 1}) is None  # of another evaluation
    scores["systems"]["mixture"] = system("mixture", [0])
    assert hardness_figures(table, scores) is None
