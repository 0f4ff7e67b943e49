"""What a training run is started with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from aptp_ray.artifacts import RunDir
from aptp_ray.config import parse_config
from aptp_ray.train import launch as module


def test_ray_train_is_shown_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray Train keeps a run's settings as text for its dashboard."""
    run = RunDir(str(tmp_path))
    config = parse_config(
        {
            "run_dir": run.uri,
            "data": {"source": {"kind": "openmoji", "storage_options": {"secret": "hunter2"}}},
            "teacher": {"source": "somewhere"},
            "storage_options": {"secret": "hunter2"},
        }
    )
    given: dict[str, Any] = {}

    class Trainer:
        def __init__(self, worker: Any, **arguments: Any) -> None:
            given.update(arguments["train_loop_config"])

        def fit(self) -> None:
            module.record_outcome(run, "prune", {"steps": 1})

    monkeypatch.setattr(module, "TorchTrainer", Trainer)
    outcome = module.launch(
        lambda settings: None, config=config, run=run, name="prune", loop=config.prune.loop, datasets={}, total_rows=1
    )
    assert outcome == {"steps": 1} and given["run_uri"] == run.uri
    assert "hunter2" not in str(given) and given["config"].storage_options == {"secret": "hunter2"}
