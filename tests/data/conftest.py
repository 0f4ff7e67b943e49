"""A tiny pipeline with random weights, and shards with every kind of damage."""

from __future__ import annotations

import tarfile
from pathlib import Path

import numpy as np
import pytest
from material import DAMAGE, RESOLUTION, Shards, encode, make_pipeline, members_of, write_tar

from aptp_ray.artifacts import RunDir


@pytest.fixture(scope="session", params=["bert", "clip"])
def any_pipeline_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pipeline(tmp_path_factory.mktemp(request.param) / "teacher", request.param)


@pytest.fixture(scope="session")
def pipeline_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pipeline(tmp_path_factory.mktemp("pipeline") / "teacher", "bert")


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    """Two whole shards of 20 and 10 samples, with seven damaged samples, and a third that is cut short."""
    made = Shards(tmp_path_factory.mktemp("shards"))
    made.pattern = f"{made.folder}/{{00000..00002}}.tar"
    rng = np.random.default_rng(0)
    for shard, numbers in enumerate((range(20), range(20, 30), range(30, 34))):
        members = []
        for number in numbers:
            key = f"{number:05d}"
            shape = (RESOLUTION, RESOLUTION) if number % 4 else (20 + number, 37)
            pixels = rng.integers(0, 256, (*shape, 3), dtype=np.uint8)
            made.pixels[key] = pixels
            members += members_of(key, number, pixels)
            if number in DAMAGE:
                made.rejected[key] = DAMAGE[number]
            else:
                made.keys.append(key)
        path = made.folder / f"{shard:05d}.tar"
        write_tar(path, members)
        if shard == 2:  # cut between two members: tarfile itself sees nothing wrong here
            with tarfile.open(path) as archive:
                cut = next(member.offset for member in archive if member.name == "00032.png")
            path.write_bytes(path.read_bytes()[:cut])
            made.keys = [key for key in made.keys if key < "00032"]
            made.rejected[""] = "damaged after 2 samples"
    return made


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory, shards: Shards, pipeline_dir: Path, ray_cluster: None) -> RunDir:
    """A run directory with all of the shards encoded; tests that write to it write beside ``encoded``."""
    run = RunDir(str(tmp_path_factory.mktemp("run")))
    encode(shards.pattern, run, pipeline_dir, actors=2)
    return run
