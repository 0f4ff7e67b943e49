"""Building the application: what is checked before anything starts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from pydantic import ValidationError
from ray.serve.schema import ServeDeploySchema

from aptp_ray.artifacts import RunDirError, load_run
from aptp_ray.config import ConfigError
from aptp_ray.serve.app import ServeArgs, build, read_catalog
from aptp_ray.serve.run import free_port, start
from serve import serve_section


def test_the_application_is_built_from_the_run_directory_alone(run_dir: Path) -> None:
    assert build({"run_dir": str(run_dir)}) is not None  # type: ignore[arg-type]
    with pytest.raises(ValidationError, match="extra"):
        build({"run_dir": str(run_dir), "replicas": 2})  # type: ignore[arg-type]


def test_what_is_missing_is_named_before_anything_starts(run_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(RunDirError, match=r"config\.yaml"):
        start(str(tmp_path), port=0)
    copy = tmp_path / "copy"
    shutil.copytree(run_dir, copy)
    shutil.rmtree(copy / "experts" / "1")
    with pytest.raises(RunDirError, match="experts/1"):
        build({"run_dir": str(copy)})  # type: ignore[arg-type]
    routing = json.loads((copy / "routing.json").read_text())
    routing["experts"][0]["id"] = 5
    (copy / "routing.json").write_text(json.dumps(routing))
    with pytest.raises(RunDirError, match=r"\[5, 1\]"):
        build({"run_dir": str(copy)})  # type: ignore[arg-type]
    (copy / "routing.json").unlink()
    with pytest.raises(RunDirError, match=r"routing\.json"):
        build({"run_dir": str(copy)})  # type: ignore[arg-type]


def test_the_catalog_is_that_of_the_run(run_dir: Path) -> None:
    catalog = read_catalog(*load_run(str(run_dir)))
    assert (catalog.size, catalog.num_inference_steps, len(catalog.experts)) == ((16, 16), 4, 2)
    assert catalog.expert_of("auto") is None and catalog.expert_of("expert-1") == 1


def test_options_of_the_service_change_the_runs(run_dir: Path) -> None:
    options = {"replicas": 0, "max_replicas": 3, "teacher": True, "router_replicas": 2, "drain_s": 7.0, "max_batch_size": 5}
    app = build({"run_dir": str(run_dir), "serve": options})  # type: ignore[arg-type]
    ingress = app._bound_deployment
    router = ingress.init_args[3]._bound_deployment
    experts = {expert._bound_deployment.name: expert._bound_deployment for expert in router.init_args[3]}
    assert list(experts) == ["expert-0", "expert-1", "teacher"]
    scaling = experts["expert-1"]._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas) == (0, 3)
    assert router.num_replicas == 2 and ingress.num_replicas == 1
    for deployment in (ingress, router, *experts.values()):
        assert deployment._deployment_config.graceful_shutdown_timeout_s == 7.0
        assert deployment._deployment_config.max_surge_percent == 100  # an update never leaves a gap
    assert experts["expert-0"].max_ongoing_requests >= 5
    for bounded in (ingress, router):
        assert bounded.max_queued_requests > 0
    assert ingress.max_ongoing_requests > router.max_ongoing_requests  # so that a refusal has the right shape


def test_options_that_are_wrong_are_named(run_dir: Path) -> None:
    for options, named in (
        ({"replicas": -1}, "replicas"),
        ({"spill": True}, "latency_budget_ms"),
        ({"sizes": ["15x16"]}, "15x16.*multiples of 2"),
        ({"sizes": ["16"]}, "sizes"),
        ({"no_such_field": 1}, "no_such_field"),
    ):
        with pytest.raises(ConfigError, match=named):
            build({"run_dir": str(run_dir), "serve": options})  # type: ignore[arg-type]


def test_arguments_come_from_a_command_line_and_from_a_config_file(run_dir: Path) -> None:
    typed = ServeArgs.model_validate({"run_dir": "s3://b/r", "serve": "{replicas: 2}", "storage_options": "{anon: true}"})
    assert (typed.serve, typed.storage_options) == ({"replicas": 2}, {"anon": True})
    deployed = ServeDeploySchema.model_validate(
        {
            "http_options": {"host": "0.0.0.0", "port": 8000},
            "applications": [
                {
                    "name": "aptp",
                    "route_prefix": "/",
                    "import_path": "aptp_ray.serve.app:build",
                    "args": {"run_dir": str(run_dir), "serve": {"teacher": True}},
                    # What a config file may say of a deployment comes on top of what the builder says.
                    "deployments": [{"name": "expert-0", "num_replicas": 2}, {"name": "router", "num_replicas": 2}],
                }
            ],
        }
    )
    (application,) = deployed.applications
    built = build(application.args)  # type: ignore[arg-type]
    names = {node._bound_deployment.name for node in built._bound_deployment.init_args[3]._bound_deployment.init_args[3]}
    assert {entry.name for entry in application.deployments} - {"router"} <= names


def test_changes_of_the_service_on_jobs_serves_command_line() -> None:
    assert serve_section(["serve.replicas=2", "serve.sizes=[24x16]", "serve.api_keys=env:KEYS"]) == {
        "replicas": 2, "sizes": ["24x16"], "api_keys": "env:KEYS",
    }  # fmt: skip
    for wrong in ("replicas=2", "serve.replicas", "serve.=3", "prune.budget=0.5", "serve.sizes=[1"):
        with pytest.raises(ConfigError, match=wrong.split("=")[0].replace(".", r"\.")):
            serve_section([wrong])


def test_port_zero_is_a_free_port() -> None:
    port = free_port("127.0.0.1", 0)
    assert 1024 <= port <= 65535 and free_port("127.0.0.1", port) == port
