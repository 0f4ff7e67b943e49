"""Stages of another run are taken over as far as the same config made them, and no further."""

from __future__ import annotations

import uuid
from pathlib import Path

import pytest

from aptp_ray.artifacts import RunDir, RunDirError
from aptp_ray.config import Config
from aptp_ray.reuse import take_over
from tests.test_artifacts import make_config

MIXTURE, BASELINE = make_config(), make_config(prune={"codes": "norm"}, router={"experts": 1})


def finished(run: RunDir, config: Config) -> RunDir:
    """A run that is done up to pruning."""
    run.prepare(config)
    run.write_bytes(b"weights", "teacher", "unet", "w.bin")
    run.write_bytes(b"rows", "encoded", "train", "part-0.parquet")
    run.write_bytes(b"codes", "router", "model.bin")
    run.write_json({"experts": []}, "routing.json")
    for stage in ("teacher", "encode", "prune"):
        run.finish(config, stage, rows=3)
    return run


@pytest.mark.parametrize("place", ["local", "memory"])
def test_what_both_have_in_common_is_copied_and_the_rest_is_left(tmp_path: Path, place: str) -> None:
    where = str(tmp_path) if place == "local" else f"memory://{uuid.uuid4().hex}"
    other = finished(RunDir(f"{where}/mixture"), MIXTURE)
    run = RunDir(f"{where}/baseline")
    run.prepare(BASELINE)
    assert take_over(BASELINE, run, other) == ["teacher", "encode"]
    assert run.read_bytes("encoded", "train", "part-0.parquet") == b"rows"
    assert run.read_bytes("teacher", "unet", "w.bin") == b"weights"
    assert run.is_done(BASELINE, "encode") and not run.is_done(BASELINE, "prune")
    assert not run.exists("router") and not run.exists("routing.json")
    run.write_bytes(b"mine", "encoded", "train", "part-0.parquet")
    assert other.read_bytes("encoded", "train", "part-0.parquet") == b"rows"  # a copy
    assert take_over(BASELINE, run, other) == []  # nothing twice
    assert run.read_bytes("encoded", "train", "part-0.parquet") == b"mine"


def test_a_run_of_the_same_config_gets_the_router_too(tmp_path: Path) -> None:
    other, run = finished(RunDir(str(tmp_path / "a")), MIXTURE), RunDir(str(tmp_path / "b"))
    longer = MIXTURE.model_copy(update={"finetune": MIXTURE.finetune.model_copy(update={"parallel_experts": 1})})
    run.prepare(longer)
    assert take_over(longer, run, other) == ["teacher", "encode", "prune"]
    assert run.read_json("routing.json") == {"experts": []} and run.read_bytes("router", "model.bin") == b"codes"


def test_nothing_of_another_teacher_is_taken(tmp_path: Path) -> None:
    other, run = finished(RunDir(str(tmp_path / "a")), MIXTURE), RunDir(str(tmp_path / "b"))
    config = make_config(teacher={"source": "elsewhere"})
    run.prepare(config)
    assert take_over(config, run, other) == [] and not run.exists("encoded")
    with pytest.raises(RunDirError, match="is not there"):
        take_over(config, run, RunDir(str(tmp_path / "nowhere")))
