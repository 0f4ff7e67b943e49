"""What a training run is started with."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aptp_ray.artifacts import RunDir
from aptp_ray.config import Config, ConfigError, Loop, parse_config
from aptp_ray.train import launch as module
from aptp_ray.train.feed import Ranges


class Reader:
    num_rows, groups = 8, (8,)

    def stream(self, requests: Iterable[Ranges], *, share: int = 1) -> Generator[dict[str, np.ndarray], None, None]:
        yield from ({"x": np.zeros(len(list(ranges)))} for ranges in requests)


def make_config(run: RunDir) -> Config:
    return parse_config(
        {
            "run_dir": run.uri,
            "data": {
                "source": {
                    "kind": "webdataset",
                    "train": "a.tar",
                    "validation": "b.tar",
                    "storage_options": {"secret": "hunter2"},
                }
            },
            "teacher": {"source": "somewhere"},
            "storage_options": {"secret": "hunter2"},
        }
    )


def test_ray_train_is_shown_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray Train keeps a run's settings as text for its dashboard."""
    run = RunDir(str(tmp_path))
    config, reader = make_config(run), Reader()
    given: dict[str, Any] = {}
    asked: dict[str, Any] = {}

    class Trainer:
        def __init__(self, worker: Any, **arguments: Any) -> None:
            given.update(arguments["train_loop_config"])
            asked.update(arguments)

        def fit(self) -> None:
            module.record_outcome(run, "prune", {"steps": 1})

    monkeypatch.setattr(module, "TorchTrainer", Trainer)
    outcome = module.launch(lambda settings: None, config=config, run=run, name="prune", loop=config.prune.loop, rows=reader)
    assert outcome == {"steps": 1} and given["run_uri"] == run.uri and given["rows"] is reader
    assert asked["run_config"].failure_config.max_preemption_failures == -1 and asked["scaling_config"].num_workers == 1
    assert "hunter2" not in str(given) and given["config"].storage_options == {"secret": "hunter2"}


def test_work_that_cannot_be_shared_evenly_is_refused_before_workers_start(tmp_path: Path) -> None:
    run = RunDir(str(tmp_path))
    loop = Loop(global_batch_size=32, workers=3)
    with pytest.raises(ValueError, match="3 workers of prune do not divide"):
        module.launch(lambda settings: None, config=make_config(run), run=run, name="prune", loop=loop, rows=Reader())


def test_gpus_that_will_never_come_are_refused_before_workers_start(ray_cluster: None, tmp_path: Path) -> None:
    """Ray Train would wait for them for ever."""
    run = RunDir(str(tmp_path))
    config = make_config(run)
    config = config.model_copy(update={"compute": config.compute.model_copy(update={"gpus_per_worker": 0.5, "workers": (4, 8)})})
    with pytest.raises(ConfigError, match="prune needs 2 GPUs .* and the cluster has 0"):
        module.launch(lambda settings: None, config=config, run=run, name="prune", loop=config.prune.loop, rows=Reader())


def test_elastic_workers_need_not_divide_the_lanes_but_each_needs_one() -> None:
    Loop(global_batch_size=8).check_division("prune", (2, 7))
    with pytest.raises(ValueError, match="9 workers of prune"):
        Loop(global_batch_size=8).check_division("prune", (2, 9))
