"""Fleets of many sizes, and what a real service did against what is simulated."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import plan as job
from aptp_ray.artifacts import RunDir
from aptp_ray.config import ConfigError, parse_config
from aptp_ray.plan.scale import Workload, best_rate, compare_fleets, fleet
from aptp_ray.plan.simulate import Arrivals, Host, poisson, simulate
from aptp_ray.plan.times import StepTimes
from aptp_ray.plan.trace import compare, read_trace

TEACHER = StepTimes(tuple(0.02 + 0.007 * n for n in range(1, 9)))
SHARES = [0.4, 0.3, 0.2, 0.1]


def workload(factor: float = 0.65) -> Workload:
    return Workload(SHARES, {25: 1.0}, TEACHER, [TEACHER.scaled(factor)] * 4)


# -- scale -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("gpus", "tenants"), [(1, 4), (2, 2), (4, 1), (7, 2), (64, 1)])
def test_replicas_are_dealt_by_work_and_every_model_has_one(gpus: int, tenants: int) -> None:
    hosts = fleet(gpus, tenants, SHARES, [TEACHER.seconds] * 4)
    counts = [sum(host.tenants.count(model) for host in hosts) for model in range(4)]
    assert len(hosts) == gpus and all(len(host.tenants) == tenants for host in hosts) and min(counts) >= 1
    assert counts == sorted(counts, reverse=True)
    if gpus == 64:
        assert counts == pytest.approx([64 * share for share in SHARES], abs=1)


def test_a_models_work_counts_not_its_traffic_alone() -> None:
    slow, fast = (2.0,), (1.0,)
    hosts = fleet(9, 1, [0.5, 0.5], [slow, fast])
    assert sum(host.tenants == (0,) for host in hosts) == 6


def test_the_rate_that_is_found_keeps_the_promise_and_a_higher_one_does_not() -> None:
    work = workload()
    rate, tenants = best_rate(work, 8, SHARES, [times.seconds for times in work.experts])
    hosts = fleet(8, tenants, SHARES, [times.seconds for times in work.experts])

    def attained(factor: float) -> float:
        arrivals = poisson(8 * rate * factor, 12_000 / (8 * rate), SHARES, work.steps, seed=7)  # another draw
        return simulate(hosts, [times.seconds for times in work.experts], arrivals, seed=7).attainment(3 * work.alone_s)

    assert attained(0.95) >= 0.93 and attained(1.1) < 0.95
    most = TEACHER.images_steps_per_s / 25 / 0.65
    assert 0.5 * most < rate < most


def test_fleets_of_like_models_do_not_beat_a_single_one_and_scale_brings_them_near() -> None:
    said: list[str] = []
    found = compare_fleets(workload(factor=1.0), gpus=(8, 24), say=said.append)
    small, large = found["rows"]
    # With experts of the teacher's size, the mixture is the fleet of unrelated models, and only loses by being parted.
    assert small["mixture"] == small["unrelated"] <= small["single"] * 1.02
    assert large["unrelated"] / large["single"] > small["unrelated"] / small["single"]
    assert len(said) == 2 and "per_gpu_4096_vs_8" not in found


# -- traces ----------------------------------------------------------------------------------------------------------------------


def write_trace(path: Path, overhead: float = 0.1, factor: float = 1.0) -> tuple[list[Host], list[tuple[float, ...]]]:
    """Writes what a service like the simulated one would have done, its lines in the order in which requests ended."""
    hosts, times = [Host((0, 1), lanes=2)], [TEACHER.seconds, TEACHER.scaled(0.5).seconds]
    result = simulate(hosts, times, poisson(6, 200, [0.5, 0.5], {20: 0.5, 30: 0.5}, seed=3), overhead_s=overhead)
    rows = [
        {"arrival_s": 9 + at, "expert": int(k) if k else "expert-0", "steps": int(n), "latency_s": factor * t}
        for at, k, n, t in zip(
            result.arrivals.at, result.arrivals.model, result.arrivals.steps, result.latency_s, strict=True
        )
    ]
    rows.sort(key=lambda row: row["arrival_s"] + row["latency_s"])
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return hosts, times


def test_a_trace_of_the_simulated_service_is_matched(tmp_path: Path) -> None:
    hosts, times = write_trace(tmp_path / "t.jsonl")
    found = compare(read_trace(tmp_path / "t.jsonl"), hosts, times, overhead_s=0.1)
    assert found["p50_ratio"] == pytest.approx(1, abs=0.01) and found["p95_ratio"] == pytest.approx(1, abs=0.01)
    assert found["within_20_percent"] and found["overhead_s_by_trace"] >= 0.1


def test_a_trace_of_a_slower_service_is_not(tmp_path: Path) -> None:
    hosts, times = write_trace(tmp_path / "t.jsonl", factor=1.5)
    found = compare(read_trace(tmp_path / "t.jsonl"), hosts, times, overhead_s=0.1)
    assert found["p95_ratio"] == pytest.approx(1 / 1.5, rel=0.02) and not found["within_20_percent"]


@pytest.mark.parametrize(
    "line",
    ["{", "[]", '{"arrival_s": 1, "expert": 0, "steps": 3}', '{"arrival_s": 1, "expert": "x", "steps": 3, "latency_s": 1}'],
)
def test_a_line_that_is_no_request_is_named(tmp_path: Path, line: str) -> None:
    good = '{"arrival_s": 1, "expert": 0, "steps": 3, "latency_s": 1}'
    (tmp_path / "t.jsonl").write_text(f"{good}\n\n{line}\n")
    with pytest.raises(ConfigError, match="line 3"):
        read_trace(tmp_path / "t.jsonl")
    (tmp_path / "t.jsonl").write_text("\n")
    with pytest.raises(ConfigError, match="holds no requests"):
        read_trace(tmp_path / "t.jsonl")


# -- the job ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir(str(tmp_path / "run"))
    config = parse_config(
        {
            "run_dir": run.uri,
            "data": {"source": {"kind": "webdataset", "train": "a", "validation": "b"}},
            "teacher": {"source": "x"},
            "serve": {"precision": "fp16"},
        }
    )
    run.prepare(config)
    experts = [{"id": k, "macs": 1, "macs_ratio": 0.5 + 0.1 * k, "share": share} for k, share in enumerate((0.7, 0.3, 0.0))]
    run.write_json({"budget": 0.6, "macs_ratio": 0.6, "teacher_macs": 10**11, "experts": experts}, "routing.json")
    return run


def fleet_file(folder: Path, **replica: object) -> str:
    tree = {
        "load": {"images_per_s": 4},
        "objective": {"p95_s": 5},
        "replica": {"reserve_gb": 2.0, **replica},
        "devices": [{"name": "a", "memory_gb": 24, "cpus": 8, "price_per_hour": 1, "tflops": 40, "available": 9}],
    }
    (folder / "fleet.yaml").write_text(json.dumps(tree))
    return str(folder / "fleet.yaml")


def last_line(capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1])


def test_the_job_plans_writes_and_compares(
    run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for part in (("experts", "0"), ("experts", "1"), ("experts", "2"), ("teacher", "vae")):
        run.write_bytes(bytes(4_000), *part, "diffusion_pytorch_model.safetensors")
    write_trace(tmp_path / "t.jsonl")
    out = tmp_path / "serve.yaml"
    arguments = [run.uri, fleet_file(tmp_path), "load.images_per_s=6", "--out", str(out), "--trace", str(tmp_path / "t.jsonl")]
    monkeypatch.setattr("sys.argv", ["plan.py", *arguments])
    job.main()
    line = last_line(capsys)
    assert line["stage"] == "plan" and line["keeps_the_promise"] and set(line["replicas"]) == {f"expert-{k}" for k in range(3)}
    assert line["trace"]["requests"] > 1000 and out.read_text().startswith("# Written by jobs/plan.py")
    job.validate(out.read_text())


def test_memory_comes_from_the_files_in_the_precision_that_is_served(run: RunDir, tmp_path: Path) -> None:
    from aptp_ray.plan.fleet import load_fleet
    from aptp_ray.plan.sources import models_of

    for expert in range(3):
        run.write_bytes(bytes(4000), "experts", str(expert), "diffusion_pytorch_model.safetensors")
    run.write_bytes(bytes(2000), "teacher", "text_encoder", "model.safetensors")
    run.write_bytes(bytes(9000), "teacher", "unet", "diffusion_pytorch_model.safetensors")  # no replica of an expert holds it
    models, macs = models_of(run, run.config(), load_fleet(fleet_file(tmp_path)))
    assert macs == 10**11 and sum(model.share for model in models) == pytest.approx(1) and models[2].share > 0
    assert models[0].memory_gb == pytest.approx(2.0 + 3000 / 1e9)  # half of what is stored in float32


def test_without_files_the_memory_has_to_be_given(
    run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["plan.py", run.uri, fleet_file(tmp_path)])
    with pytest.raises(SystemExit) as end:
        job.main()
    line = last_line(capsys)
    assert end.value.code == 2 and line["exit_code"] == 2 and "replica.memory_gb" in str(line["error"])
    monkeypatch.setattr("sys.argv", ["plan.py", run.uri, fleet_file(tmp_path, memory_gb=5)])
    job.main()
    assert last_line(capsys)["devices"]


def test_a_service_as_deployed_is_replayed(run: RunDir, tmp_path: Path) -> None:
    from aptp_ray.plan.fleet import load_fleet
    from aptp_ray.plan.sources import models_of

    config, fleet_of_file = run.config(), load_fleet(fleet_file(tmp_path, memory_gb=5))
    models, macs = models_of(run, config, fleet_of_file)
    hosts, times = job.deployed(config, fleet_of_file, models, macs)
    assert hosts == [Host((0, 1, 2))] and np.all(np.array(times[1]) > np.array(times[0]))
    halves = config.model_copy(update={"serve": config.serve.model_copy(update={"gpus_per_expert": 0.5, "replicas": 2})})
    assert job.deployed(halves, fleet_of_file, models, macs)[0] == [Host((0, 0)), Host((1, 1)), Host((2, 2))]


def test_on_a_cpu_what_is_done_beside_the_steps_is_no_part_of_them(run: RunDir, tmp_path: Path) -> None:
    from aptp_ray.plan.fleet import load_fleet
    from aptp_ray.plan.simulate import host_of, simulated_times
    from aptp_ray.plan.times import Model, step_times

    fleet_of_file = load_fleet(fleet_file(tmp_path, memory_gb=5, side_ms=40))
    gpu = fleet_of_file.devices[0]
    cpu = gpu.model_copy(update={"gpu": False, "lanes": 2, "refill_ms": 9})
    found = step_times(Model("expert-0", 1.0, 0.5, 1.0), cpu, fleet_of_file, 10**11)
    assert host_of(cpu, [0, 1], fleet_of_file) == Host((0, 1), 2, 0.04, turns=True, refill_s=0.009)
    assert host_of(gpu, [0], fleet_of_file) == Host((0,))
    # 40 ms over 25 steps for each image of the batch.
    beside = np.array(found.seconds) - np.array(simulated_times(found, cpu))
    assert beside == pytest.approx(0.0016 * np.arange(1, found.limit + 1)) and simulated_times(found, gpu) == found.seconds


@pytest.mark.parametrize("refill_s", [0.0, 0.02])
def test_what_it_costs_to_alternate_is_found_from_a_saturated_service(refill_s: float) -> None:
    from aptp_ray.core.batch_profile import BatchProfile
    from benchmarks.serve_clients import Answer, Ask
    from benchmarks.simulator import refill_of

    profiles = {f"expert-{k}": BatchProfile("", (1, 8), (20.0 + k, 70.0), (1.0, 1.0)) for k in range(4)}
    times = [tuple(profile.step_ms(n) / 1000 for n in range(1, 9)) for profile in profiles.values()]
    draw = np.random.default_rng(5)
    arrivals = Arrivals(np.zeros(96), draw.integers(0, 4, 96), draw.choice([10, 20, 30], 96))
    done = simulate([Host((0, 1, 2, 3), 2, 0.05, turns=True, refill_s=refill_s)], times, arrivals)
    answers = [
        Answer(Ask(0.0, "", int(steps), 0), float(seconds), 0.0, {"model": f"expert-{model}"})
        for model, steps, seconds in zip(arrivals.model, arrivals.steps, done.latency_s, strict=True)
    ]
    assert refill_of(answers, profiles, 2, 0.05) == pytest.approx(refill_s, abs=0.001)
