"""Fixtures that several rooms' tests share."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from aptp_ray.serve.environment import for_ray

if "PYTEST_XDIST_WORKER" in os.environ:  # two processes of two threads each would wait for one another on two cores
    os.environ["OMP_NUM_THREADS"] = "1"

REPOSITORY = Path(__file__).resolve().parents[1]


# Tests of these files take minutes, and do not need the session's Ray.
_LONG = ("test_readme.py", "test_ranks.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Parts the tests between two processes (``pytest -n 2``): files that use the session's Ray go to one, in one piece."""
    on_ray = {item.path for item in items if "ray_cluster" in getattr(item, "fixturenames", ())}

    def turn(item: pytest.Item) -> int:
        return 0 if item.path in on_ray else 1 if item.path.name in _LONG else 2

    for item in items:
        item.add_marker(pytest.mark.xdist_group("ray" if item.path in on_ray else str(item.path)))
    items.sort(key=turn)


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One local Ray for the whole session, with four logical CPUs whatever the machine has."""
    import ray
    import ray.data

    # Workers inherit these. (A runtime_env would do too, but then Ray starts each worker anew instead of reusing them.)
    paths = [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    os.environ["OMP_NUM_THREADS"] = "1"
    # Ray's workers are nice to the test by default, and starve beside it on two cores.
    os.environ["RAY_worker_niceness"] = "0"
    with for_ray():
        ray.init(
            address="local",  # not the cluster that another test, or its reader, may have started on this machine
            num_cpus=4,
            num_gpus=0,
            object_store_memory=500_000_000,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    with warnings.catch_warnings():  # Ray Data warns of its own deprecated fields when it first sets its defaults
        warnings.simplefilter("ignore", DeprecationWarning)
        ray.data.DataContext.get_current()
    yield
    ray.shutdown()
