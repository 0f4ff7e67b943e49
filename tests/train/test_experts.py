"""Experts' runs side by side: the largest first, so many at once, each failing alone and taken up again by the same command."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import ray.cloudpickle

from aptp_ray.artifacts import RunDir
from aptp_ray.config import Loop, load_config
from aptp_ray.train import experts
from aptp_ray.train.experts import ExpertRun, ExpertsFailed, train_experts
from aptp_ray.train.launch import record_outcome
from aptp_ray.train.side_by_side import side_by_side

ROWS = (10, 40, 30, 20)


def stay(number: int, folder: str) -> int:
    """Notes when it begins and ends; the second one fails."""
    begun = time.time()
    time.sleep(0.5)
    (Path(folder) / str(number)).write_text(f"{begun} {time.time()}")
    if number == 1:
        raise ValueError("number 1 breaks")
    return 10 * number


def pretend(worker: str, *, run: RunDir, name: str, extra: dict[str, Any], **_: Any) -> dict[str, Any]:
    """In place of a training run: notes that it was started; expert 2 fails as long as the file "broken" is there."""
    folder = Path(run.root)
    with (folder / "started.txt").open("a") as file:
        file.write(f"{extra['expert']}\n")
    if extra["expert"] == 2 and (folder / "broken").exists():
        raise RuntimeError("the disk is full")
    outcome = {"expert": extra["expert"], "train_seconds": 1.0}
    record_outcome(run, name, outcome)
    return outcome


@pytest.fixture(autouse=True)
def _by_value() -> None:
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])


def test_so_many_run_at_once_and_each_comes_with_its_own_end(ray_cluster: None, tmp_path: Path) -> None:
    found: dict[str, Any] = {}
    for name, task in side_by_side(stay, [(f"n{i}", {"number": i, "folder": str(tmp_path)}) for i in range(5)], 2):
        try:
            found[name] = ray.get(task)
        except ValueError as error:
            found[name] = str(error).splitlines()[-1]
    assert found.pop("n1").endswith("number 1 breaks") and found == {"n0": 0, "n2": 20, "n3": 30, "n4": 40}
    spans = [tuple(map(float, (tmp_path / str(i)).read_text().split())) for i in range(5)]
    under_way = [sum(begin <= at < end for begin, end in spans) for at, _ in spans]
    assert max(under_way) <= 2


def test_an_expert_fails_alone_and_is_taken_up_by_the_same_command(
    ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, said = RunDir(str(tmp_path)), list[str]()
    config = load_config("jobs/configs/smoke.yaml", [f"run_dir={tmp_path}"])
    runs = [ExpertRun(number, SimpleNamespace(num_rows=rows), Loop()) for number, rows in enumerate(ROWS)]  # type: ignore[arg-type]
    monkeypatch.setattr(experts, "launch", pretend)
    (tmp_path / "broken").touch()
    given: dict[str, Any] = {"validation": None, "config": config, "run": run, "at_once": 1, "say": said.append}
    with pytest.raises(ExpertsFailed, match=r"failed for expert 2 \(done: 0, 1, 3\); run the same .* the disk is full"):
        train_experts(runs, **given)
    started = (tmp_path / "started.txt").read_text().split()
    assert started == ["1", "2", "3", "0"]  # by their rows; one that fails stops no other
    assert any("expert 2 FAILED: " in line for line in said)
    (tmp_path / "broken").unlink()
    assert [outcome["expert"] for outcome in train_experts(runs, **given)] == [0, 1, 2, 3]
    assert (tmp_path / "started.txt").read_text().split() == [*started, "2"]
