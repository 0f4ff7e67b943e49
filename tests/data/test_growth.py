"""Encoding on a cluster whose nodes come when they are asked for: its size now says nothing about what it may use."""

from __future__ import annotations

from typing import Any

import pytest

from aptp_ray.config import ConfigError
from aptp_ray.data import encode

GPU_NODES, CPU_NODES = ({"CPU": 48.0, "GPU": 4.0}, 8), ({"CPU": 16.0}, 12)


def pool(monkeypatch: pytest.MonkeyPatch, have: dict[str, float], kinds: Any, **arguments: Any) -> dict[str, Any]:
    monkeypatch.setattr(encode.ray, "cluster_resources", lambda: have)
    monkeypatch.setattr(encode, "kinds_to_come", lambda: kinds)
    return encode._pool(arguments.pop("actors", None), arguments.pop("resources", None), **arguments)


def bounds(found: dict[str, Any]) -> tuple[int, int]:
    return found["compute"].min_size, found["compute"].max_size


def test_an_empty_cluster_that_may_grow_encodes_on_the_gpus_to_come(monkeypatch: pytest.MonkeyPatch) -> None:
    found = pool(monkeypatch, {"CPU": 0.0}, [GPU_NODES, CPU_NODES], on_gpu=True)
    assert bounds(found) == (1, 32) and (found["num_gpus"], found["num_cpus"]) == (1, 1)
    # The head has no CPUs: an actor that asked for none would run there.
    found = pool(monkeypatch, {"CPU": 0.0}, [CPU_NODES])
    assert bounds(found) == (1, 96) and found["num_cpus"] == 1 and "num_gpus" not in found
    found = pool(monkeypatch, {"CPU": 0.0}, None, on_gpu=True)
    assert bounds(found) == (1, 16) and found["num_gpus"] == 1


def test_a_cluster_that_stays_as_it_is_is_filled_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    assert bounds(pool(monkeypatch, {"CPU": 4.0}, [])) == (2, 2)
    assert pool(monkeypatch, {"CPU": 1.0}, [])["num_cpus"] == 0
    found = pool(monkeypatch, {"CPU": 64.0, "GPU": 8.0}, [], on_gpu=True)
    assert bounds(found) == (8, 8) and found["num_gpus"] == 1
    assert "num_gpus" not in pool(monkeypatch, {"CPU": 64.0}, [], on_gpu=True)
    assert bounds(pool(monkeypatch, {"CPU": 0.0}, [GPU_NODES], on_gpu=True, actors=4)) == (4, 4)


def test_a_custom_resource_may_be_one_of_nodes_to_come(monkeypatch: pytest.MonkeyPatch) -> None:
    encoders = ({"CPU": 8.0, "encoders": 1.0}, 2)
    assert pool(monkeypatch, {"CPU": 0.0}, [encoders], resources={"encoders": 1})["resources"] == {"encoders": 1}
    assert pool(monkeypatch, {"CPU": 0.0}, None, resources={"encoders": 1})["resources"] == {"encoders": 1}
    for kinds in ([], [GPU_NODES]):
        with pytest.raises(ConfigError, match="encoders"):
            pool(monkeypatch, {"CPU": 8.0}, kinds, resources={"encoders": 1})
