"""The comparison says what the scores say: rows by compute, stars where intervals leave out zero, marks where values are."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aptp_ray.artifacts import RunDir
from aptp_ray.config import load_config
from aptp_ray.evaluate.comparison import comparison, tailoring
from aptp_ray.evaluate.plots import off_the_scale, side_by_side
from aptp_ray.evaluate.trained import trained_figures

SYSTEMS = {"mixture": (0.65, 20.0), "teacher": (1.0, 23.0), "static <one>": (0.65, 26.0), "blocks": (0.8, 33.0)}


def one(value: float, width: float) -> dict[str, float]:
    return {"value": value, "low": value - width, "high": value + width}


@pytest.fixture
def scores() -> dict[str, Any]:
    return {
        "images": 500,
        "labels": {"encoder": "an encoder & its label"},
        "better": {"frechet": "lower", "clip_score": "higher"},
        "systems": {
            name: {
                "steps": 20,
                "macs_per_image": cost * 30e9,
                "scores": {"frechet": one(value, 1.0), "clip_score": one(50 - value, 1.0)},
                "facts": {"seen": {"color": {"right": 0.75, "asked": 40}}, "held_out": {}},
            }
            for name, (cost, value) in SYSTEMS.items()
        },
        "differences": {
            "against": "mixture",
            "scores": {
                "frechet": {"teacher": one(3.0, 4.0), "static <one>": one(6.0, 2.0), "blocks": one(21.0, 2.0)},
                "clip_score": {"teacher": {"value": 1.0, "low": None, "high": None}},
            },
        },
    }


def test_rows_are_sorted_by_cost_and_starred_where_they_differ(scores: dict[str, Any]) -> None:
    page = comparison(scores)
    rows = re.findall(r"<tr><td class=name>(.*?)</td>(.*?)</tr>", page)[: len(SYSTEMS)]
    assert [name for name, _ in rows] == ["mixture", "static &lt;one&gt;", "blocks", "teacher"]
    starred = {name: re.findall(r"<td>([\d.]+) <small>.*?</small>(\*?)</td>", cells) for name, cells in rows}
    assert {name: cells[0] for name, cells in starred.items()} == {
        "mixture": ("20", ""), "static &lt;one&gt;": ("26", "*"), "blocks": ("33", "*"), "teacher": ("23", "")
    }  # fmt: skip
    assert all(cells[1][1] == "" for cells in starred.values())
    assert "an encoder &amp; its label" in page and "color (40)" in page and "75.0%" in page


def test_marks_stand_where_the_values_are_and_tell_systems_apart(scores: dict[str, Any]) -> None:
    plot = comparison(scores).split("<figure>")[1]
    marks = re.findall(
        r"<title>(.*?): Frechet distance ([\d.]+) at ([\d.]+) GMACs an image</title>"
        r'<line x1="([\d.]+)" x2="[\d.]+" y1="([\d.]+)" y2="([\d.]+)"/><(\w+) class=(\w+)',
        plot,
    )
    assert {(name, float(value)) for name, value, *_ in marks} == {
        (name.replace("<", "&lt;").replace(">", "&gt;"), value) for name, (_, value) in SYSTEMS.items()
    }
    by_value = sorted(marks, key=lambda mark: float(mark[1]))
    middles = [(float(low) + float(high)) / 2 for *_, low, high, _, _ in by_value]
    assert middles == sorted(middles, reverse=True)  # pixels grow downwards
    slope = {round((a - b) / (float(y[1]) - float(x[1])), 2) for (a, x), (b, y) in zip(
        zip(middles, by_value, strict=True), list(zip(middles, by_value, strict=True))[1:], strict=False)}  # fmt: skip
    assert max(slope) - min(slope) <= 0.02  # the axis is linear
    by_cost = sorted(marks, key=lambda mark: float(mark[2]))
    assert [float(mark[3]) for mark in by_cost] == sorted(float(mark[3]) for mark in by_cost)
    legend = plot.split("class=shapes")[1]
    looks = re.findall(r"<(?:circle|polygon)[^>]*/>", legend)
    assert len(set(looks)) == len(SYSTEMS)


def test_every_system_of_the_shipped_comparison_has_a_look_of_its_own(scores: dict[str, Any]) -> None:
    systems = load_config("jobs/configs/openmoji_comparison.yaml", []).evaluation.systems
    names = [system.name for system in systems if system.seed_of is None]
    one_of = scores["systems"]["teacher"]
    scores["systems"] = {name: one_of for name in names}
    legend = comparison(scores).split("<figure>")[1].split("class=shapes")[1]
    assert len(set(re.findall(r"<(?:circle|polygon)[^>]*/>", legend))) == len(names)


def test_scores_that_could_not_be_estimated_are_left_out_of_the_plot(scores: dict[str, Any]) -> None:
    scores["systems"]["blocks"]["scores"]["frechet"] = {"value": None, "low": None, "high": None}
    page = comparison(scores)
    assert "not a number" in page and "blocks: Frechet" not in page and "blocks: image-text" in page


def test_what_could_be_tailored_is_told_with_its_gain() -> None:
    page = tailoring(
        {
            "between": {"a | <b>": 0.91, "a | c": 0.98, "<b> | c": 0.97},
            "within": {"a": 0.985, "<b>": 0.99, "c": 0.994},
            "error": {"0.65": {"a": 0.001, "<b>": 0.002, "c": 0.003}, "0.5": {"a": 0.01, "<b>": 0.02, "c": 0.05}},
            "water_filling": {"0.5": {"ratios": {"a": 0.45, "<b>": 0.5, "c": 0.56}, "equal": 0.0267, "unequal": 0.0215}},
        }
    )
    assert "0.910 (a and &lt;b&gt;) to 0.980 (a and c)" in page and "0.985 to 0.994" in page
    assert "<th>&lt;b&gt;</th>" in page and "<td class=name>50%</td><td>0.01000</td>" in page
    assert "c 56%" in page and "0.02150 in place of 0.02670" in page


def test_marks_of_one_cost_stand_side_by_side() -> None:
    places = side_by_side([100.0, 400.0, 100.2, 101.0], 0.0, 500.0)
    assert places[1] == 400.0
    close = [places[0], places[2], places[3]]
    assert close == sorted(close) and min(b - a for a, b in zip(close, close[1:], strict=False)) >= 14.9
    assert sum(close) / 3 == pytest.approx((100.0 + 100.2 + 101.0) / 3)


def test_groups_of_marks_do_not_run_into_one_another_and_move_no_further_than_they_must() -> None:
    wanted = [100.0] * 6 + [150.0, 300.0]  # six of one cost take 75 pixels: up to where the next one belongs
    places = side_by_side(wanted, 0.0, 500.0)
    assert places == sorted(places) and np.diff(places).min() >= 15.0 - 1e-9
    assert places[-1] == 300.0
    moved = np.square(np.subtract(places, wanted)).sum()
    rng = np.random.default_rng(0)
    for _ in range(200):  # nothing near it that keeps the distances is better
        other = np.array(places) + rng.normal(size=len(places))
        if np.diff(other).min() >= 15.0:
            assert np.square(other - wanted).sum() >= moved
    cramped = side_by_side([490.0] * 4, 20.0, 500.0)
    assert cramped == pytest.approx([455.0, 470.0, 485.0, 500.0])


def test_one_system_far_off_does_not_squeeze_the_others(scores: dict[str, Any]) -> None:
    assert off_the_scale({"a": (0, 2), "b": (1, 3), "c": (2, 4)}) == []
    assert off_the_scale({"a": (0, 2), "b": (1, 3), "c": (90, 91), "d": (-40, -39), "e": (1, 2)}) == ["c", "d"]
    assert off_the_scale({"a": (0, 1), "b": (90, 91)}) == []  # two are no crowd
    scores["systems"]["blocks"]["scores"]["frechet"] = one(90.0, 1.0)
    plot = comparison(scores).split("<figure>")[1].split("</figure>")[0]
    assert "lower is better. Off the scale: blocks, 90." in plot
    assert "<title>blocks" not in plot and plot.count("<title>") == plot.count("<span>") == len(SYSTEMS) - 1
    ticks = [float(tick) for tick in re.findall(r'class=y x="\d+" y="[\d.]+">([\d.]+)<', plot)]
    assert max(ticks) < 30


def test_plots_show_what_was_run_with_several_seeds_once(scores: dict[str, Any]) -> None:
    scores["seeds"] = {
        "against": "mixture",
        "differences": {},
        "things": {
            "mixture": {"runs": ["mixture", "static <one>"], "scores": {"frechet": {**one(23.0, 1.0), "values": [20.0, 26.0]}}},
            "teacher": {"runs": ["teacher"], "scores": {"frechet": {**one(23.5, 1.0), "values": [23.5]}}},
        },
    }
    plot = comparison(scores).split("<figure>")[1]
    titles = re.findall(r"<title>(.*?)</title>", plot)
    assert titles == [
        "mixture: Frechet distance 23 at 19.5 GMACs an image", "teacher: Frechet distance 23.5 at 30.0 GMACs an image"
    ]  # fmt: skip


def test_pairs_are_told_with_a_star_where_they_differ(scores: dict[str, Any]) -> None:
    scores["pairs"] = {
        "static <one>": {
            "against": "blocks",
            "runs": [3, 1],
            "scores": {"frechet": one(-3.0, 1.0), "clip_score": one(0.5, 1.0)},
        }
    }
    row = next(row for row in comparison(scores).split("<tr>") if "static &lt;one&gt; minus blocks" in row)
    assert "<td>3 and 1</td>" in row and row.count("*") == 1 and "-3 " in row and "+0.5 " in row


def test_every_run_says_what_made_it_and_what_training_came_to(scores: dict[str, Any], tmp_path: Path) -> None:
    run = RunDir(str(tmp_path))
    assert "How they were trained" not in comparison(scores)
    experts = [{"id": 0, "share": 0.75}, {"id": 1, "share": 0.25}]
    run.write_json({"experts": experts}, "routing.json")
    assert trained_figures(run) == {"together": None, "end": None}  # an imported run
    for expert, error in ((0, 0.002), (1, 0.006)):
        run.write_json({"validation/distillation": error}, "experts", str(expert), "expert.json")
    assert trained_figures(run) == {"together": None, "end": pytest.approx(0.003)}
    run.write_json({"validation/distillation": 0.004}, "train", "finetune-shared", "outcome.json")
    scores["systems"]["static <one>"]["trained"] = trained_figures(run)
    scores["systems"]["teacher"]["trained"] = None
    scores["evaluation"] = {"systems": [{"name": "static <one>", "changes": ["prune.codes=norm"]}, {"name": "teacher"}]}
    page = comparison(scores).split("How they were trained")[1]
    assert re.findall(r"<tr><td class=name>(.*?)</td><td>(.*?)</td><td>(.*?)</td></tr>", page.split("</table>")[0]) == [
        ("<b>static &lt;one&gt;</b><small class=changes><code>prune.codes=norm</code></small>", "0.0040", "0.0030")
    ]
