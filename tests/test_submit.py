"""A job that is submitted to a cluster, stopped, and submitted again: on a real head with its dashboard, behind a token."""

from __future__ import annotations

import json
import urllib.error
from collections.abc import Iterator
from pathlib import Path

import pytest
from nodes import Cluster, wait_for


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    made = Cluster(tmp_path)
    try:
        made.wait()
        yield made
    finally:
        made.close()


@pytest.mark.slow
def test_a_stopped_job_goes_on_where_it_was(cluster: Cluster, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    changes = [f"run_dir={run_dir}", "prune.loop.steps=60", "prune.loop.checkpoint_every_steps=4", "compute.max_failures=0"]
    options = ["--working-dir", ".", "--runtime-env", "jobs/runtime_env.yaml"]
    config = "jobs/configs/smoke.yaml"

    with pytest.raises(urllib.error.HTTPError, match="40[13]"):
        cluster.ask("/api/jobs/", token="0" * 32)

    pipeline = ["--", "python", "jobs/pipeline.py", config, *changes]
    begun = cluster.job("submit", "--no-wait", "--submission-id", "first", *options, *pipeline)
    assert begun.returncode == 0, begun.stdout + begun.stderr

    def checkpoints() -> list[Path]:
        return list(run_dir.glob("train/prune/checkpoint_*"))

    wait_for(lambda: checkpoints() or cluster.status("first") == "FAILED", 400, "no checkpoint of prune in time")
    assert checkpoints(), cluster.ask("/api/jobs/first/logs")
    assert cluster.job("stop", "first").returncode == 0
    wait_for(lambda: cluster.status("first") == "STOPPED", 60, "the job did not stop")
    manifest = json.loads((run_dir / "manifest.json").read_text())
    assert set(manifest["stages"]) == {"teacher", "encode"} and set(manifest["begun"]) == {"prune"}

    prune = ["--", "python", "jobs/prune.py", config, *changes]
    again = cluster.job("submit", "--submission-id", "second", *options, *prune)
    assert again.returncode == 0, again.stdout[-3000:] + again.stderr[-3000:]
    after = json.loads((run_dir / "manifest.json").read_text())
    assert {name: after["stages"][name] for name in ("teacher", "encode")} == manifest["stages"]
    assert set(after["stages"]) == {"teacher", "encode", "prune"} and not after["begun"]
    line = next(text for text in reversed(again.stdout.splitlines()) if text.startswith('{"run_dir"'))
    assert json.loads(line)["stage"] == "prune"
    assert (run_dir / "router" / "config.json").exists()
