"""Two training runs on a Ray cluster of its own, which loses a node in the second and gets it back: see test_elastic.py.

python elastic_driver.py FOLDER STEPS
"""

from __future__ import annotations

import json
import logging
import sys
import threading
import time
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import Cluster
from test_loop import train

from aptp_ray.train import launch

CPU = {"num_cpus": 1, "object_store_memory": 100_000_000}  # of a node: room for one worker


def last_sizes(folder: Path) -> list[int]:
    """How many workers made the latest three steps."""
    path = folder / "sizes.txt"
    return [int(size) for size in path.read_text().split()[-3:]] if path.exists() else []


def grow(cluster: Cluster) -> None:
    """Adds a node from a thread: only the main one may set handlers of signals, as a node does that is to end with its driver."""
    cluster._shutdown_at_exit = False
    cluster.add_node(**CPU)


def disturb(cluster: Cluster, spare: Any, folder: Path) -> None:
    """Takes a node away once the run has settled, adds one when it has again, and at last lets it come to its end."""
    for size, change in (
        (2, lambda: cluster.remove_node(spare)),
        (1, lambda: grow(cluster)),
        (2, lambda: (folder / "go").touch()),
    ):
        while last_sizes(folder) != [size] * 3:
            time.sleep(0.1)
        change()


def main(folder: Path, steps: int) -> None:
    launch.RESIZE_INTERVAL_S = 5.0
    cluster = Cluster(initialize_head=True, head_node_args=CPU)
    spare = cluster.add_node(**CPU)
    ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
    options = ["compute.cpus_per_worker=1"]
    runs: dict[str, dict[str, Any]] = {
        "calm": {"workers": 1, "loop": {"steps": steps}},
        "run": {"workers": [1, 2], "loop": {"steps": steps, "checkpoint_every_steps": 2}, "slow": True},
    }
    for name, settings in runs.items():
        if name == "run":
            threading.Thread(target=disturb, args=(cluster, spare, folder / name), daemon=True).start()
        outcome, _ = train(folder / name, options=options, **settings)
        (folder / name / "outcome.json").write_text(json.dumps(outcome["final"]))
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
