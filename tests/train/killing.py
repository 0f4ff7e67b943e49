"""How training runs are killed in tests, once there is something to go on from."""

from __future__ import annotations

import json
import os
import signal
import time

import ray
from ray.train.v2._internal.execution.context import get_train_context

from aptp_ray.artifacts import RunDir


def recorded_step(run: RunDir, name: str) -> int:
    """The steps done in the newest checkpoint that a run would go on from; 0 without any.

    Ray Train's controller records a checkpoint a while after it was reported.
    """
    snapshot = ("train", name, "checkpoint_manager_snapshot.json")
    text = run.read_bytes(*snapshot) if run.exists(*snapshot) else b""
    if not text.endswith(b"}"):  # it is being written
        return 0
    newest = json.loads(text)["latest_checkpoint_result"]
    return run.read_json("train", name, newest["checkpoint_dir_name"], "facts.json")["step"] if newest else 0


def wait_for_checkpoint(run: RunDir, name: str, step: int = 1) -> None:
    """Returns when a checkpoint of at least so many steps is on record: a run that dies before it loses more."""
    for _ in range(600):
        if recorded_step(run, name) >= step:
            return
        time.sleep(0.1)
    raise AssertionError(f"no checkpoint of step {step} is on record after a minute")


def die(who: int | str) -> None:
    """Ends this worker, or "controller", which takes its workers along."""
    if who == "controller":
        ray.kill(get_train_context().controller_actor)
        time.sleep(600)
    os.kill(os.getpid(), signal.SIGKILL)
