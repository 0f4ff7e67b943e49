"""What jobs say before they do anything, and how they end when they cannot."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import cli
import dry_run
from aptp_ray.artifacts import RunDir
from aptp_ray.config import STAGES, Config, ConfigError, load_config, parse_config
from aptp_ray.growth import kinds_of_ray_up, kinds_to_come
from dry_run import Ask, Cluster, asks_of

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "jobs" / "configs"
CPU_NODE, GPU_NODE = {"CPU": 16.0}, {"CPU": 48.0, "GPU": 4.0}


def demo(run: str, *overrides: str) -> Config:
    return load_config(CONFIGS / "smoke.yaml", [f"run_dir={json.dumps(run)}", *overrides])


# -- what the cluster has --------------------------------------------------------------------------------------------------------


def test_what_fits_what_fits_later_and_what_never_does() -> None:
    workers = Ask("prune's Train workers", 8, {"CPU": 4, "GPU": 1})
    assert Cluster([GPU_NODE, GPU_NODE], []).verdict(workers) == "fits"
    assert Cluster([{"CPU": 0.0}], [(GPU_NODE, 8)]).verdict(workers) == "fits once the cluster has grown"
    for nodes, kinds in (([GPU_NODE], []), ([CPU_NODE] * 9, []), ([{"CPU": 0.0}], [(GPU_NODE, 1), (CPU_NODE, 12)])):
        with pytest.raises(ConfigError, match="never be scheduled.*compute.workers") as error:
            Cluster(nodes, kinds).verdict(workers)
        assert "\n" not in str(error.value)


def test_an_autoscaler_that_does_not_say_what_it_may_add_is_given_the_benefit_of_the_doubt() -> None:
    assert "not known" in Cluster([{"CPU": 0.0}], None).verdict(Ask("x", 8, {"CPU": 4, "GPU": 1}))


@pytest.mark.parametrize("name", ["aws", "gcp"])
def test_what_ray_up_may_add_is_read_from_its_file(name: str) -> None:
    kinds = kinds_of_ray_up(ROOT / "clusters" / f"{name}.yaml")
    assert sorted((kind["CPU"], kind.get("GPU", 0), count) for kind, count in kinds) == [(16, 0, 12), (48, 4, 4), (48, 4, 8)]
    workers = asks_of(load_config(CONFIGS / "sd21_cc3m.yaml"), "prune")
    assert Cluster([{"CPU": 0.0}], kinds).verdict(workers[0]) == "fits once the cluster has grown"


@pytest.mark.parametrize(
    ("command", "known"),
    [("ulimit -n 65536; ray start --head --no-monitor --num-cpus=0", False), ("ray start --head --num-cpus=4", True)],
)
def test_kuberays_autoscaler_is_known_by_its_heads_command(
    command: str, known: bool, ray_cluster: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))  # where `ray up` would have left a file
    monkeypatch.setenv("KUBERAY_GEN_RAY_START_CMD", command)
    assert kinds_to_come() == ([] if known else None)
    (tmp_path / "ray_bootstrap_config.yaml").write_text((ROOT / "clusters" / "aws.yaml").read_text())
    assert len(kinds_to_come() or []) == 3


def test_resources_of_two_nodes_do_not_make_one_worker() -> None:
    with pytest.raises(ConfigError, match="never"):
        Cluster([{"CPU": 2.0}, {"CPU": 2.0}], []).verdict(Ask("x", 1, {"CPU": 3}))


def test_a_kind_of_gpu_counts_where_it_is_known() -> None:
    ask = Ask("x", 1, {"CPU": 1, "GPU": 1, "accelerator_type:L40S": 0.001})
    assert Cluster([GPU_NODE | {"accelerator_type:L40S": 1.0}], []).verdict(ask) == "fits"
    assert Cluster([], [(GPU_NODE, 1)]).verdict(ask) == "fits once the cluster has grown"  # files of clusters do not name it


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("s*.yaml")), ids=lambda path: path.stem)
def test_shipped_configs_fit_on_the_shipped_clusters(path: Path) -> None:
    import yaml

    types = yaml.safe_load((ROOT / "clusters" / "aws.yaml").read_text())["available_node_types"]
    kinds = [({k: float(v) for k, v in node["resources"].items()}, node.get("max_workers", 1)) for node in types.values()]
    for stage in STAGES:
        for ask in asks_of(load_config(path), stage):
            assert Cluster([], kinds).verdict(ask) == "fits once the cluster has grown"


def test_every_stage_asks_for_what_its_job_asks_for() -> None:
    config = load_config(CONFIGS / "sd21_coco.yaml", ["compute.accelerator_type=L40S", "compute.workers=[4, 8]"])
    (prune,), (apart,) = asks_of(config, "prune"), asks_of(config, "finetune")
    assert prune.count == 4 and prune.bundle == {"CPU": 4.0, "GPU": 1.0, "accelerator_type:L40S": 0.001}
    assert apart.count == 2 and not asks_of(config, "teacher")
    trained = load_config(CONFIGS / "openmoji_teacher.yaml")
    assert [ask.what.split("'")[0] for ask in asks_of(trained, "teacher")] == ["teacher.vae", "teacher.unet"]


# -- the report ------------------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _local(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_ADDRESS", "RAY_JOB_ID"):
        monkeypatch.delenv(name, raising=False)


def test_a_dry_run_says_what_would_run_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = demo(str(tmp_path / "run"))
    found = dry_run.dry_run(config, RunDir(config.run_dir), STAGES, overwrite=False)
    assert found["would_run"] == list(STAGES) and set(found["stages"].values()) == {"would run"}
    # 24 x 8 x 8 latents twice and 24 x 384 states in halves, a z of 384 floats.
    assert found["storage"]["row_bytes"] == 2 * (2 * 24 * 8 * 8 + 24 * 384) + 4 * 384 or found["storage"]["row_bytes"] is None
    assert not (tmp_path / "run").exists()
    assert "prune's Train workers: 2 times {CPU: 0.5, GPU: 0}; fits" in capsys.readouterr().err
    json.dumps(found)


def test_what_is_done_is_not_run_and_what_was_begun_goes_on(tmp_path: Path) -> None:
    config = demo(str(tmp_path / "run"))
    run = RunDir(config.run_dir)
    run.prepare(config, "teacher")
    run.finish(config, "teacher", seconds=1)
    run.prepare(config, "encode")
    found = dry_run.dry_run(config, run, STAGES, overwrite=False)["stages"]
    assert (found["teacher"], found["encode"], found["prune"]) == ("done", "would go on where it stopped", "would run")
    alone = dry_run.dry_run(config, run, ["prune"], overwrite=False)["stages"]
    assert alone == {"prune": "would be refused: encode must be made first"}
    again = dry_run.dry_run(config, run, ["teacher"], overwrite=True)
    assert again["stages"] == {"teacher": "would be made again"} and run.is_done(config, "teacher")


def test_secrets_are_masked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree = demo(str(tmp_path / "run")).model_dump(mode="json") | {"storage_options": {"secret": "hunter2hunter2"}}
    config = parse_config(tree)
    found = dry_run.dry_run(config, RunDir(config.run_dir), ["prune"], overwrite=False)
    assert "hunter2" not in json.dumps(found) + capsys.readouterr().err
    assert found["config"]["storage_options"]["secret"].startswith("env:")


def test_missing_data_and_impossible_workers_are_refused(tmp_path: Path) -> None:
    config = demo(str(tmp_path / "run"), "compute.cpus_per_worker=1000")
    with pytest.raises(ConfigError, match="prune's Train workers can never be scheduled"):
        dry_run.dry_run(config, RunDir(config.run_dir), ["prune"], overwrite=False)


@pytest.mark.parametrize("source", ["/nowhere/stable-diffusion-2-1", "memory://nowhere/sd21", "s3://bucket/sd21"])
def test_a_teacher_that_is_not_there_is_told_before_anything_runs(source: str, tmp_path: Path) -> None:
    # Nobody listens there: a store that is out of reach is a mistake to be mended, not a traceback.
    client = {"connect_timeout": 1, "retries": {"max_attempts": 0}}
    nobody = {"key": "a", "secret": "a", "endpoint_url": "http://127.0.0.1:9", "config_kwargs": client}
    options = [f"storage_options={json.dumps(nobody)}"] if source.startswith("s3") else []
    config = demo(str(tmp_path / "run"), f"teacher.source={source}", "teacher.text_encoder=null", *options)
    with pytest.raises(ConfigError, match=source):
        dry_run.check_teacher(config, STAGES)
    if "://" in source:
        dry_run.check_teacher(config, ["finetune"])  # which has the run's own copy


# -- how jobs end ----------------------------------------------------------------------------------------------------------------


def job(*arguments: str, **environment: str) -> tuple[int, dict[str, Any], str]:
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    lines = done.stdout.strip().splitlines()
    return done.returncode, json.loads(lines[-1]) if lines else {}, done.stderr


@pytest.mark.parametrize("name", ["pipeline", "quickstart"])
def test_a_dry_run_of_all_stages_ends_with_its_line(name: str, tmp_path: Path) -> None:
    code, line, error = job(f"jobs/{name}.py", "jobs/configs/smoke.yaml", "--run-dir", str(tmp_path / "run"), "--dry-run")
    assert code == 0 and line["stage"] == name and line["dry_run"] and line["would_run"] == list(STAGES), error[-2000:]
    assert not (tmp_path / "run").exists()


def test_a_mistake_ends_with_code_2_and_a_line(tmp_path: Path) -> None:
    code, line, error = job("jobs/prune.py", "jobs/configs/smoke.yaml", "prune.budget=7", "--run-dir", str(tmp_path), "--dry-run")
    assert code == 2 and line["stage"] == "prune" and line["exit_code"] == 2 and "prune.budget" in line["error"]
    assert "Traceback" not in error and line["error"] in error


@pytest.mark.parametrize("made", range(1, len(STAGES)))
def test_a_job_without_the_stage_before_is_refused_before_ray_starts(
    made: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With all stages but the one just before; the message names that stage and the job that makes it."""
    config = demo(str(tmp_path / "run"))
    run, stage, missing = RunDir(config.run_dir), STAGES[made], STAGES[made - 1]
    for name in STAGES[: made - 1]:
        run.prepare(config, name)
        run.finish(config, name)
    monkeypatch.setattr(sys, "argv", [f"{stage}.py", str(CONFIGS / "smoke.yaml"), f"run_dir={json.dumps(run.uri)}"])
    monkeypatch.setattr(cli, "ray_session", lambda config: pytest.fail("Ray was started"))
    with pytest.raises(SystemExit) as end:
        cli.main(stage, lambda config, run: pytest.fail("the stage ran"), None)
    told = capsys.readouterr()
    line = json.loads(told.out)
    assert end.value.code == line["exit_code"] == 2 and line["stage"] == stage and told.err == f"error: {line['error']}\n"
    (command,) = re.findall(r"python (jobs/\w+\.py) CONFIG", line["error"])
    assert f"stage '{missing}'" in line["error"] and f'main("{missing}"' in (ROOT / command).read_text()
    assert not {stage} & set(run.manifest().get("begun", {}))


@pytest.mark.parametrize(
    ("raised", "code"), [(KeyboardInterrupt(), 130), (ConfigError("mend it"), 2), (SystemExit(signal.SIGTERM), 143)]
)
def test_endings(raised: BaseException, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end, cli.errors_on_one_line("encode"):
        raise raised
    line = json.loads(capsys.readouterr().out)
    assert end.value.code == line["exit_code"] == code and line["stage"] == "encode" and line["error"]


def test_what_was_not_foreseen_keeps_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ZeroDivisionError), cli.errors_on_one_line("encode"):
        raise ZeroDivisionError("no\nsecond line")
    assert json.loads(capsys.readouterr().out) == {"stage": "encode", "error": "ZeroDivisionError: no", "exit_code": 1}


def test_sigterm_unwinds_the_job(capsys: pytest.CaptureFixture[str]) -> None:
    unwound: list[bool] = []
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as end, cli.errors_on_one_line("finetune"):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            signal.sigtimedwait([], 5)  # the handler interrupts it
        finally:
            unwound.append(True)
    assert unwound and end.value.code == 143 and "goes on" in json.loads(capsys.readouterr().out)["error"]
    assert signal.getsignal(signal.SIGTERM) is before
