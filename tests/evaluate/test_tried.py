"""What was tried is shown as it is given: figures, ratios to the start, and what failed."""

from __future__ import annotations

import re
from typing import Any

import pytest

from aptp_ray.evaluate.tried import tried, with_ratios

FIGURES = {"error": 0.08, "error_after_finetuning": 0.02, "style_information": 0.2, "experts_in_use": 3.9, "largest_overlap": 0.9,
           "macs_ratio": 0.5}  # fmt: skip
ENTRIES: list[dict[str, Any]] = [
    {"name": "start", "changes": ["prune.budget=0.5"], "figures": FIGURES},
    {"name": "worse <one>", "changes": ["prune.start=zeros", "a=<b>"], "figures": FIGURES | {"error": 0.8}},
    {"name": "broken", "changes": ["router.experts=99"], "figures": {}, "failed": "too few <prompts>"},
    {"name": "better", "changes": [], "figures": FIGURES | {"error_after_finetuning": 0.015}},
]


def test_ratios_are_to_the_start() -> None:
    found = with_ratios(ENTRIES)
    assert [entry["name"] for entry in found] == [entry["name"] for entry in ENTRIES]
    assert found[0]["ratios"] == {"error": 1.0, "error_after_finetuning": 1.0}
    assert found[1]["ratios"]["error"] == pytest.approx(10)
    assert found[3]["ratios"]["error_after_finetuning"] == pytest.approx(0.75)
    assert found[2]["ratios"] == {} and found[1]["figures"] == ENTRIES[1]["figures"]


def test_every_variant_has_its_row_in_the_given_order() -> None:
    page = tried(with_ratios(ENTRIES))
    rows = re.findall(r"<tr><td class=name><b>(.*?)</b>(.*?)</tr>", page)
    assert [name for name, _ in rows] == ["start", "worse &lt;one&gt;", "broken", "better"]
    start, worse, broken, better = (row for _, row in rows)
    assert "&times;" not in start and "prune.budget=0.5" not in start and "<code>prune.budget=0.5</code>" in page
    assert "<td>0.8000 <small>&times;&nbsp;10.00</small></td>" in worse and "<code>a=&lt;b&gt;</code>" in worse
    assert "<td>0.0150 <small>&times;&nbsp;0.75</small></td>" in better and "90.0%" in better and "3.90" in better
    assert "failed: too few &lt;prompts&gt;" in broken
    assert {row.count("<td>") for _, row in rows} == {len(FIGURES)}


def test_nothing_tried_is_no_section() -> None:
    assert tried([]) == "" and with_ratios([]) == []


def test_a_start_that_failed_has_nothing_to_compare_with() -> None:
    found = with_ratios([{"name": "start", "changes": [], "figures": None}, ENTRIES[1]])
    assert found[1]["ratios"] == {} and "0.8000" in tried(found)
