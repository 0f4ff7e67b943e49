"""Which of Serve's settings reach whom: its processes get all, the process that starts them none."""

from __future__ import annotations

import os

import pytest

from aptp_ray.serve.environment import SERVE_ENVIRONMENT, for_driver, for_ray, way_of_calling

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
