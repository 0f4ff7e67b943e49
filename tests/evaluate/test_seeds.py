from __future__ import annotations

import numpy as np
import pytest
from pydantic import ValidationError

from aptp_ray.evaluate.bootstrap import draws, estimate, replicate
from aptp_ray.evaluate.distances import mean_of
from aptp_ray.evaluate.seeds import over_seeds, pairs
from aptp_ray.evaluate_sections import Evaluation, System


def system(name: str, seed_of: str | None = None, run_dir: str | None = "elsewhere") -> System:
    return System(name=name, kind="mixture", run_dir=run_dir, seed_of=seed_of)


def test_a_mean_over_seeds_is_the_score_of_the_mean() -> None:
    generator = np.random.default_rng(0)
    values = {name: generator.normal(loc, 1.0, 200) for name, loc in (("ours", 0.5), ("ours-1", 0.7), ("one", 0.0))}
    counts = draws(200, 100, seed=0)
    found = {name: {"score": replicate(mean_of(value), counts)} for name, value in values.items()}
    systems = [system("ours", run_dir=None), system("ours-1", "ours"), system("one")]
    result = over_seeds(systems, found, "ours")
    joined = replicate(mean_of((values["ours"] + values["ours-1"]) / 2), counts)  # means are linear: an oracle
    ours = result["things"]["ours"]
    assert ours["runs"] == ["ours", "ours-1"] and result["against"] == "ours"
    assert {k: ours["scores"]["score"][k] for k in ("value", "low", "high")} == pytest.approx(estimate(*joined).to_json())
    assert ours["scores"]["score"]["values"] == pytest.approx([values["ours"].mean(), values["ours-1"].mean()])
    apart = result["differences"]["score"]["one"]
    assert apart["value"] == pytest.approx(values["one"].mean() - joined[0]) and apart["low"] < apart["value"] < apart["high"]
    assert set(result["differences"]["score"]) == {"one"}


def test_a_pair_is_compared_by_the_means_over_both_ones_runs() -> None:
    generator = np.random.default_rng(1)
    spread = {"ours": 0.5, "a": 0.3, "a-1": 0.4, "b": 0.1, "b-1": 0.0}
    values = {name: generator.normal(loc, 1.0, 200) for name, loc in spread.items()}
    counts = draws(200, 100, seed=0)
    found = {name: {"score": replicate(mean_of(value), counts)} for name, value in values.items()}
    found["a"]["likeness"] = found["a-1"]["likeness"] = found["b"]["likeness"] = found["a"]["score"]  # b-1 has none
    systems = [system("ours", run_dir=None), system("a"), system("a-1", "a"), system("b-1", "b")]
    systems.append(System(name="b", kind="mixture", run_dir="runs/b", against="a"))
    [(name, pair)] = pairs(systems, found).items()
    assert name == "b" and pair["against"] == "a" and pair["runs"] == [2, 2]
    apart = (values["b"] + values["b-1"] - values["a"] - values["a-1"]) / 2  # means are linear: an oracle
    assert pair["scores"] == {"score": pytest.approx(estimate(*replicate(mean_of(apart), counts)).to_json())}
    assert pairs(systems[:-2], found) == {}


def test_what_a_run_s_own_experts_draw_is_compared_with_that_run_alone() -> None:
    generator = np.random.default_rng(2)
    values = {name: generator.normal(loc, 1.0, 200) for name, loc in (("a", 0.3), ("a-1", 0.9), ("dealt", 0.2))}
    counts = draws(200, 100, seed=0)
    found = {name: {"score": replicate(mean_of(value), counts)} for name, value in values.items()}
    dealt = System(name="dealt", kind="random_routing", against="a")
    teacher = System(name="teacher", kind="teacher")
    found["teacher"] = found["dealt"]  # not drawn by any run's experts: against the mean
    systems = [system("a", run_dir=None), system("a-1", "a"), dealt, teacher]
    pair = pairs(systems, found)["dealt"]
    assert pair["runs"] == [1, 1]
    alone = estimate(*replicate(mean_of(values["dealt"] - values["a"]), counts)).to_json()
    mean = estimate(*replicate(mean_of(values["dealt"] - (values["a"] + values["a-1"]) / 2), counts)).to_json()
    assert pair["scores"]["score"] == pytest.approx(alone)
    apart = over_seeds(systems, found, "a")["differences"]["score"]
    assert apart == {"dealt": pytest.approx(alone), "teacher": pytest.approx(mean)}


@pytest.mark.parametrize(
    ("name", "against", "seed_of"), [("a", "a", None), ("a", "c", None), ("a", "a-1", None), ("a-1", "a", "a")]
)
def test_a_pair_needs_two_things_that_are_there(name: str, against: str, seed_of: str | None) -> None:
    wrong = System(name=name, kind="mixture", run_dir="elsewhere", against=against, seed_of=seed_of)
    others = [system("ours", run_dir=None), system("a"), system("a-1", "a")]
    with pytest.raises(ValidationError, match=f"{name} has against='{against}'"):
        Evaluation(systems=[wrong, *(one for one in others if one.name != name)])


def test_a_seed_of_something_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValidationError, match="'other', which is not among"):
        Evaluation(systems=[system("ours", run_dir=None), system("ours-1", "other")])
