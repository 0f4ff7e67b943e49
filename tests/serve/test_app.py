"""Building the application: what is checked before anything starts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from pydantic import ValidationError

from aptp_ray.artifacts import RunDirError, load_run
from aptp_ray.serve.app import build, read_catalog
from aptp_ray.serve.run import free_port, start


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


def test_port_zero_is_a_free_port() -> None:
    port = free_port("127.0.0.1", 0)
    assert 1024 <= port <= 65535 and free_port("127.0.0.1", port) == port
