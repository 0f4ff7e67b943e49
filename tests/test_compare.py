"""jobs/compare.py: which runs a comparison makes."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest
from pydantic import ValidationError

from aptp_ray.config import Config, ConfigError, load_config, stage_hash
from aptp_ray.evaluate_sections import System
from compare import other_runs

SHIPPED = "jobs/configs/openmoji_comparison.yaml"


def config_with(folder: Path, systems: str) -> str:
    path = folder / "some.yaml"
    base = Path("jobs/configs/openmoji.yaml").resolve()
    path.write_text(f"base: {base}\nrun_dir: runs/a\nevaluation:\n  systems:\n" + textwrap.indent(systems, "    "))
    return str(path)


def others_of(path: str, overrides: list[str]) -> dict[str, Config]:
    return other_runs(load_config(path, overrides), lambda changes: load_config(path, [*overrides, *changes]))


def budgets_named(config: Config) -> dict[str | None, float]:
    """The budgets that systems set for themselves, by run directory."""
    named = {system.run_dir: dict(change.split("=", 1) for change in system.changes) for system in config.evaluation.systems}
    return {where: float(changes["prune.budget"]) for where, changes in named.items() if "prune.budget" in changes}


def test_baselines_of_the_demo_differ_from_the_mixture_in_what_they_say_alone() -> None:
    config = load_config(SHIPPED, [])
    others = others_of(SHIPPED, [])
    assert {system.run_dir for system in config.evaluation.systems if system.run_dir} == set(others)
    budgets = budgets_named(config)
    for where, other in others.items():
        assert other.run_dir == where and other.prune.budget == budgets.get(where, config.prune.budget)
        assert stage_hash(other, "encode") == stage_hash(config, "encode")  # so that encoded rows are taken over
        assert stage_hash(other, "prune") != stage_hash(config, "prune")
        # The same number of training samples in all, or all four times as many.
        shared, own = other.finetune.shared, config.finetune.shared
        assert shared is not None and own is not None
        samples = [
            together.steps * together.global_batch_size
            + one.router.experts * one.finetune.apart.steps * one.finetune.apart.global_batch_size
            for one, together in ((config, own), (other, shared))
        ]
        assert samples[1] == (4 if where.endswith("-long") else 1) * samples[0], where


def test_overrides_of_the_command_line_reach_every_run() -> None:
    others = others_of(SHIPPED, ["prune.budget=0.45", "data.source.train_images=100"])
    budgets = budgets_named(load_config(SHIPPED, []))
    assert {where: other.prune.budget for where, other in others.items()} == {where: budgets.get(where, 0.45) for where in others}
    assert len(budgets) < len(others)  # a budget that a system sets for itself stays


def test_one_run_directory_is_made_once(tmp_path: Path) -> None:
    systems = "- {name: mixture, kind: mixture}\n- {name: b, kind: mixture, run_dir: runs/b, changes: [prune.budget=0.5]}\n"
    same = systems + "- {name: dealt, kind: random_routing, run_dir: runs/b, changes: [prune.budget=0.5]}\n"
    path = config_with(tmp_path, same)
    assert list(others_of(path, [])) == ["runs/b"]
    for other in ("runs/b, changes: [prune.budget=0.6]", "runs/a, changes: [prune.budget=0.6]"):
        path = config_with(tmp_path, systems + f"- {{name: c, kind: mixture, run_dir: {other}}}\n")
        with pytest.raises(ConfigError, match="system c: run_dir="):
            others_of(path, [])


def test_changes_need_a_run_of_their_own() -> None:
    with pytest.raises(ValidationError, match="say with run_dir where it lies"):
        System(name="b", kind="mixture", changes=["prune.budget=0.5"])


def test_a_code_by_a_rule_has_no_size_to_measure() -> None:
    changes = ["prune.codes=norm", "router.experts=1", "prune.hardening=needs"]
    with pytest.raises(ConfigError, match="prune.hardening=needs hardens learned codes"):
        load_config(SHIPPED, changes)
