"""Encodes in a process of its own, to be killed: python resume_driver.py PATTERN RUN_DIR PIPELINE_DIR."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aptp_ray.data.layout import Unit
from aptp_ray.data.tar import WebDatasetLayout


@dataclass(frozen=True)
class Slow:
    """Shards from a slow disk. Each read of a shard leaves a mark, with the name of the shard, in ``marks``."""

    pattern: str
    marks: str
    seconds: float = 0.0
    stuck: str = ""  # name of a shard that never comes

    def units(self) -> list[Unit]:
        return WebDatasetLayout(self.pattern).units()

    def read(self, unit: Unit, positions: Sequence[int] | None = None) -> Iterator[dict[str, Any]]:
        Path(self.marks, f"{Path(unit.name).stem}-{time.time_ns()}-{os.getpid()}").touch()
        time.sleep(self.seconds)
        while Path(unit.name).stem == self.stuck:
            time.sleep(1.0)
        yield from WebDatasetLayout(self.pattern).read(unit, positions)


@dataclass(frozen=True)
class Deadly:
    """Shards of which one, on its first read, kills -9 the actors that encode for the same Ray node."""

    pattern: str
    marks: str
    deadly: str

    def units(self) -> list[Unit]:
        return WebDatasetLayout(self.pattern).units()

    def read(self, unit: Unit, positions: Sequence[int] | None = None) -> Iterator[dict[str, Any]]:
        for number, row in enumerate(WebDatasetLayout(self.pattern).read(unit, positions)):
            if number == 6 and Path(unit.name).stem == self.deadly and not list(Path(self.marks).iterdir()):
                for process in children(os.getppid()):
                    if "ChunkEncoder" in Path(f"/proc/{process}/cmdline").read_text():
                        Path(self.marks, str(process)).touch()
                        os.kill(process, 9)
            yield row


def children(parent: int) -> list[int]:
    """Processes that a process started."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(stat.read_text().rpartition(")")[2].split()[1]) == parent:
                found.append(int(stat.parent.name))
        except OSError:  # it has ended
            continue
    return found


if __name__ == "__main__":
    import ray
    from material import encode

    from aptp_ray.artifacts import RunDir

    pattern, run_dir, pipeline_dir, marks = sys.argv[1:]
    ray.init(address="local", num_cpus=3, num_gpus=0, object_store_memory=200_000_000, include_dashboard=False)
    encode(Slow(pattern, marks, seconds=0.5, stuck="000009"), RunDir(run_dir), Path(pipeline_dir))
