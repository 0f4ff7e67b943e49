"""A run whose cluster shrinks and grows goes on with as many workers as there is room for, and loses no row."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
STEPS = 60


@pytest.mark.slow
def test_a_run_goes_from_two_workers_to_one_and_back(tmp_path: Path) -> None:
    """On a cluster of two nodes, one of which is taken away and comes back, against a run that nothing happens to."""
    paths = [str(REPOSITORY), str(Path(__file__).parent)]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": "1",
        "RAY_worker_niceness": "0",
        # A node that is gone is noticed within seconds.
        "RAY_health_check_period_ms": "500",
        "RAY_health_check_failure_threshold": "4",
    }
    driver = Path(__file__).with_name("elastic_driver.py")
    done = subprocess.run(
        [sys.executable, str(driver), str(tmp_path), str(STEPS)], env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-3000:]
    calm, run = tmp_path / "calm", tmp_path / "run"
    sizes = [int(size) for size in (run / "sizes.txt").read_text().split()]
    changes = [size for index, size in enumerate(sizes) if index == 0 or size != sizes[index - 1]]
    assert changes == [2, 1, 2] and {*(calm / "sizes.txt").read_text().split()} == {"1"}
    # Each step's loss is that of the global batch: of all its rows, whoever read them.
    expected = {row[0]: row[1] for row in map(json.loads, (calm / "losses.jsonl").read_text().splitlines())}
    seen = [json.loads(line) for line in (run / "losses.jsonl").read_text().splitlines()]
    assert {row[0] for row in seen} == set(range(1, STEPS + 1))
    assert all(row[1] == pytest.approx(expected[row[0]], rel=1e-4) for row in seen)
    final = [json.loads((folder / "outcome.json").read_text()) for folder in (calm, run)]
    for name, value in final[0].items():
        assert final[1][name] == pytest.approx(value, abs=1e-5)
