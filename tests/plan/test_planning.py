"""From traffic and step times to replicas, devices, bounds and a Serve config, each against an oracle of its own."""

from __future__ import annotations

import itertools
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from aptp_ray.core.batch_profile import BatchProfile
from aptp_ray.plan.checked import figures, plan_checked, worst
from aptp_ray.plan.choose import PlanError, make_plan, placement
from aptp_ray.plan.deploy import serve_config, table, to_yaml
from aptp_ray.plan.expectation import expect, weighted_quantile
from aptp_ray.plan.fleet import Device, Fleet, Load, Objective, Replica, load_fleet
from aptp_ray.plan.options import best_option
from aptp_ray.plan.simulate import Host, check, poisson, simulate
from aptp_ray.plan.times import Model, StepTimes, estimated, from_profile, step_times
from aptp_ray.section import ConfigError

MACS = 100_000_000_000
TIMES = StepTimes(tuple(0.02 + 0.007 * n for n in range(1, 9)))


def device(name: str = "big", **changes: Any) -> Device:
    values = {"memory_gb": 48, "cpus": 12, "price_per_hour": 2.0, "available": 40, "tflops": 40, "accelerator_type": name}
    return Device(name=name, **(values | changes))


def fleet(*devices: Device, rate: float = 20.0, p95: float = 4.0, **changes: Any) -> Fleet:
    return Fleet(load=Load(images_per_s=rate), objective=Objective(p95_s=p95), devices=list(devices or [device()]), **changes)


def models(count: int = 4, memory: float = 6.0, seed: int = 0) -> list[Model]:
    draw = np.random.default_rng(seed)
    shares = draw.dirichlet(np.full(count, 3.0))
    return [Model(f"expert-{k}", float(shares[k]), float(draw.uniform(0.4, 0.9)), memory) for k in range(count)]


# -- step times ------------------------------------------------------------------------------------------------------------------


def test_a_profile_gives_its_times_up_to_the_batch_that_pays() -> None:
    profile = BatchProfile("x", (1, 2, 4, 8), (10.0, 12.0, 16.0, 32.0), (5.0, 6.0, 8.0, 16.0))
    times = from_profile(profile, 8)  # eight draw no more a second than four
    assert times.limit == 4 and times.seconds == pytest.approx((0.010, 0.012, 0.014, 0.016)) and times.measured
    assert from_profile(profile, 2).limit == 2


def test_an_estimate_is_the_formula() -> None:
    times = estimated(10**12, 100.0, 15.0, 4)
    # 10^12 MACs, two rows, two operations each: 4 * 10^12 at 10^14 a second
    assert times.seconds == pytest.approx((0.055, 0.095, 0.135, 0.175)) and not times.measured


def test_a_missing_experts_times_come_from_the_teachers_by_macs(tmp_path: Path) -> None:
    profile = BatchProfile("x", (1, 2), (10.0, 12.0), (5.0, 6.0))
    (tmp_path / "t.json").write_text(profile.to_json())
    own = device(profiles={"teacher": str(tmp_path / "t.json")}, tflops=None)
    ask = fleet(own, replica=Replica(side_ms=50.0))
    half = step_times(Model("expert-0", 1.0, 0.5, 1.0), own, ask, MACS)
    assert half.seconds == pytest.approx((0.005 + 0.002, 0.006 + 0.004)) and not half.measured  # 50 ms over 25 steps
    assert step_times(Model("teacher", 1.0, 1.0, 1.0), own, ask, MACS).measured


# -- expectations ----------------------------------------------------------------------------------------------------------------


def test_one_place_has_the_mean_of_an_m_m_1_queue() -> None:
    # The chain beyond a full batch is that of exponential service; with one place, all of it.
    found = expect(0.6, {1: 1.0}, StepTimes((1.0,)), 1)
    assert found is not None and found.busy == pytest.approx(0.6, rel=1e-3)
    assert found.in_flight == pytest.approx(0.6 / 0.4, rel=1e-3)


def test_steps_that_cost_nothing_more_together_make_a_queue_of_endless_servers() -> None:
    found = expect(3.0, {2: 1.0}, StepTimes((0.5,) * 40), 1)  # 3 a second stay for a second
    assert found is not None and found.in_flight == pytest.approx(3.0, rel=1e-3)
    assert found.quantile(0.5) == pytest.approx(1.0, abs=0.26)  # and half a step until the next one begins


@pytest.mark.parametrize(("replicas", "tenants", "load"), [(1, 1, 0.5), (1, 1, 0.8), (4, 1, 0.8), (16, 1, 0.9), (2, 4, 0.5)])
def test_expectations_are_near_what_is_simulated(replicas: int, tenants: int, load: float) -> None:
    steps = {20: 0.5, 30: 0.5}
    rate = load * replicas * TIMES.images_steps_per_s / 25 / tenants
    found = expect(rate, steps, TIMES, replicas, tenants=tenants)
    assert found is not None and found.utilisation == pytest.approx(load)
    # Neighbours of the same kind and load, as the formula takes them to be.
    hosts = [Host(tuple(range(tenants)))] * replicas
    arrivals = poisson(rate * tenants, 12_000 / (rate * tenants), [1] * tenants, steps, seed=1)
    seen = simulate(hosts, [TIMES.seconds] * tenants, arrivals)
    for q in (0.5, 0.95):
        assert found.quantile(q) == pytest.approx(seen.quantile(q), rel=0.15)


def test_a_load_beyond_full_batches_has_no_expectation() -> None:
    most = TIMES.images_steps_per_s / 25
    assert expect(1.001 * most, {25: 1.0}, TIMES, 1) is None
    assert expect(0.99 * most, {25: 1.0}, TIMES, 1) is not None
    assert expect(0.51 * most, {25: 1.0}, TIMES, 1, tenants=2) is None


def test_weighted_quantiles() -> None:
    values, weights = np.array([3.0, 1.0, 2.0]), np.array([0.1, 0.6, 0.3])
    assert [weighted_quantile(values, weights, q) for q in (0.5, 0.6, 0.7, 0.95)] == [1.0, 1.0, 2.0, 3.0]


# -- choosing --------------------------------------------------------------------------------------------------------------------


def test_an_option_keeps_the_promise_and_one_replica_less_does_not() -> None:
    ask, model = fleet(rate=60.0, p95=1.5), Model("expert-0", 1.0, 1.0, 6.0)
    option = best_option(model, ask.devices[0], TIMES, ask, 1.5)
    assert option is not None and option.replicas > 3 and option.expectation.quantile(0.95) + 0.06 <= 1.5
    fewer = expect(60.0, ask.load.mix(), TIMES, option.replicas - 1, tenants=round(1 / option.fraction))
    too_slow = fewer is None or fewer.quantile(0.95) + 0.06 > 1.5
    assert too_slow or fewer.utilisation > ask.objective.utilisation


def test_small_experts_share_a_gpu_as_far_as_memory_and_cpus_allow() -> None:
    def fraction(**changes: Any) -> float:
        ask = fleet(device(**changes), rate=1.0, p95=30.0)
        option = best_option(Model("expert-0", 0.05, 0.5, 6.0), ask.devices[0], TIMES, ask, 30.0)
        assert option is not None
        return option.fraction

    assert fraction() == 0.125 and fraction(memory_gb=24) == 0.25 and fraction(cpus=2) == 0.5
    assert fraction(memory_gb=200, cpus=100) == 0.0625


def test_the_plan_is_as_cheap_as_the_cheapest_of_all_combinations() -> None:
    prices = {"a": (1.0, 15), "b": (2.3, 45), "c": (4.0, 90)}
    kinds = [device(name, price_per_hour=price, tflops=tflops) for name, (price, tflops) in prices.items()]
    ask, experts = fleet(*kinds, rate=24.0, p95=3.0), models(5)
    plan = make_plan(ask, experts, MACS)
    options = [
        [best_option(m, d, step_times(m, d, ask, MACS), ask, 3.0) for d in kinds] for m in experts
    ]
    costs = []
    for combination in itertools.product(*options):
        if all(combination):
            filled = {d.name: sum(o.devices for o in combination if o.device.name == d.name) for d in kinds}
            costs.append(sum(math.ceil(filled[d.name] - 1e-9) * d.price_per_hour for d in kinds))
    assert plan.cost_per_hour == pytest.approx(min(costs), rel=2e-3)


@pytest.mark.parametrize("count", [1, 5, 30])
def test_what_the_plan_places_fits(count: int) -> None:
    ask = fleet(device(), device("small", memory_gb=16, price_per_hour=0.6, tflops=12), rate=6.0 * count, p95=5.0)
    plan = make_plan(ask, models(count), MACS)
    placed = placement(plan)
    assert {name: sum(d.name == name for d, _ in placed) for name in plan.devices} == plan.devices
    for at, tenants in placed:
        assert sum(plan.parts[k].option.fraction for k in tenants) <= 1 + 1e-9
        assert sum(plan.parts[k].option.model.memory_gb for k in tenants) <= at.memory_gb
        assert len(tenants) * ask.replica.cpus <= at.cpus
    for number, part in enumerate(plan.parts):
        assert sum(tenants.count(number) for _, tenants in placed) == part.option.replicas
        assert 1 <= part.min_replicas <= part.option.replicas <= part.max_replicas


def test_no_more_devices_are_planned_than_there_are() -> None:
    cheap = device("cheap", price_per_hour=0.1, available=2)
    plan = make_plan(fleet(cheap, device("dear"), rate=40.0), models(6), MACS)
    assert plan.devices["cheap"] <= 2 and plan.devices["dear"] >= 1


def test_at_least_so_many_replicas_as_are_asked_for() -> None:
    plan = make_plan(fleet(rate=0.5, replica=Replica(least=2)), models(), MACS)
    assert all(part.min_replicas == part.option.replicas == 2 for part in plan.parts)


def test_the_planners_promise_holds_in_the_simulation() -> None:
    ask = fleet(device(), device("small", memory_gb=16, price_per_hour=0.6, tflops=12), rate=60.0, p95=3.0)
    plan, outcome = plan_checked(ask, models(8), MACS, say=lambda _: None)
    found = figures(plan, outcome)
    assert found["keeps_the_promise"] and worst(outcome, 8)[1] <= 3.0 * 1.02
    assert found["simulated"]["images_per_s"] == pytest.approx(60.0, rel=0.05)
    assert plan.quantile(0.95) == pytest.approx(outcome.quantile(0.95), rel=0.2)
    # With half of the load it does so the more.
    assert check(plan, requests=5000, rate=30.0).quantile(0.95) < outcome.quantile(0.95)


def test_a_plan_that_misses_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    from aptp_ray.plan import checked

    asked: list[float] = []

    def remember(*args: Any, objective_s: float, **rest: Any) -> Any:
        asked.append(objective_s)
        # The formulas are made blind, so that the simulation has something to say.
        return make_plan(*args, objective_s=objective_s if len(asked) > 1 else 30.0, **rest)

    monkeypatch.setattr(checked, "make_plan", remember)
    said: list[str] = []
    plan, outcome = plan_checked(fleet(rate=60.0, p95=1.2, replica=Replica(cpus=6.0)), models(2), MACS, say=said.append)
    assert len(asked) >= 2 and asked[1] < asked[0] == 1.2 and "planned again" in said[0]
    assert worst(outcome, 2)[1] <= 1.2 * 1.02


@pytest.mark.parametrize(
    ("ask", "told"),
    [
        (fleet(p95=0.2), "alone takes"),
        (fleet(device(memory_gb=4)), "do not fit"),
        (fleet(device(cpus=0.5)), "replica.cpus"),
        (fleet(device(available=1), rate=500.0), "too few"),
        (fleet(device(available=2), rate=14.0), "not enough devices"),
    ],
)
def test_no_plan_says_why(ask: Fleet, told: str) -> None:
    with pytest.raises(PlanError, match=told) as error:
        make_plan(ask, models(4), MACS)
    assert "\n" not in str(error.value)


def test_a_hundred_experts_on_ten_kinds_are_planned_in_seconds() -> None:
    kinds = [
        device(f"gpu{n}", memory_gb=24 + 8 * n, price_per_hour=1 + 0.7 * n, tflops=30 + 30 * n, available=400) for n in range(10)
    ]
    begun = time.process_time()
    plan = make_plan(fleet(*kinds, rate=300.0), models(100), 3 * MACS)
    assert time.process_time() - begun <= 5.0
    assert len(plan.parts) == 100 and plan.gap <= 0.01


# -- what comes out --------------------------------------------------------------------------------------------------------------


def test_the_serve_config_is_what_ray_and_our_application_take() -> None:
    import plan as job

    plan = make_plan(fleet(device(), device("small", memory_gb=16, price_per_hour=0.6, tflops=12)), models(), MACS)
    text = to_yaml(plan, "s3://bucket/run")
    job.validate(text)
    (application,) = yaml.safe_load(text)["applications"]
    assert application["args"]["run_dir"] == "s3://bucket/run"
    for part, deployment in zip(plan.parts, application["deployments"], strict=True):
        assert deployment["name"] == part.option.model.name
        assert deployment["ray_actor_options"]["num_gpus"] == part.option.fraction
        assert deployment["ray_actor_options"]["accelerator_type"] == part.option.device.name
        scaling = deployment["autoscaling_config"]
        assert scaling["min_replicas"] <= scaling["initial_replicas"] == part.option.replicas <= scaling["max_replicas"]
    lines = table(plan).splitlines()
    assert len(lines) == 6 and lines[1].startswith("expert-0") and "an hour" in lines[-1]


def test_the_serve_config_opens_the_store_without_holding_its_secret() -> None:
    options = {"key": "env:STORE_KEY", "secret": "hunter2hunter2", "endpoint_url": "http://store:9000"}
    text = to_yaml(make_plan(fleet(), models(), MACS), "s3://bucket/run", storage_options=options)
    assert "hunter2" not in text
    written = yaml.safe_load(text)["applications"][0]["args"]["storage_options"]
    assert written == options | {"secret": "env:APTP_STORAGE_OPTIONS_SECRET"}


def test_a_config_that_ray_would_refuse_is_found() -> None:
    import plan as job

    tree = serve_config(make_plan(fleet(), models(), MACS), "runs/x")
    tree["applications"][0]["deployments"][0]["autoscaling_config"]["min_replicas"] = -1
    with pytest.raises(ValueError, match="min_replicas"):
        job.validate(yaml.safe_dump(tree))
    tree = serve_config(make_plan(fleet(), models(), MACS), "runs/x")
    tree["applications"][0]["args"]["serve"]["replica"] = 1
    with pytest.raises(ValueError, match="replica"):
        job.validate(yaml.safe_dump(tree))


def test_a_host_without_gpus_is_planned_in_cpus() -> None:
    host = device("host", gpu=False, lanes=8, cpus=8, accelerator_type=None, tflops=2)
    config = serve_config(make_plan(fleet(host, rate=0.2, p95=60.0), models(), MACS), "runs/x")
    (application,) = config["applications"]
    for deployment in application["deployments"]:
        assert set(deployment["ray_actor_options"]) == {"num_cpus"}
    assert application["args"]["serve"]["gpus_per_expert"] == 0.0


# -- the fleet file --------------------------------------------------------------------------------------------------------------


def write(folder: Path, **changes: Any) -> Path:
    tree = {
        "load": {"images_per_s": 5},
        "objective": {"p95_s": 4},
        "devices": [{"name": "a", "memory_gb": 24, "cpus": 8, "price_per_hour": 1, "tflops": 20}],
    } | changes
    (folder / "fleet.yaml").write_text(yaml.safe_dump(tree))
    return folder / "fleet.yaml"


def test_overrides_change_the_fleet_and_profiles_lie_beside_the_file(tmp_path: Path) -> None:
    devices = [{"name": "a", "memory_gb": 24, "cpus": 8, "price_per_hour": 1, "profiles": {"teacher": "a.json"}}]
    found = load_fleet(write(tmp_path, devices=devices), ["load.images_per_s=7", "replica.memory_gb=6"])
    assert found.load.images_per_s == 7 and found.replica.memory_gb == 6
    assert found.devices[0].profiles == {"teacher": str(tmp_path / "a.json")}
    with pytest.raises(ConfigError, match="cannot read the batch profile"):
        make_plan(found, models(), MACS)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"load": {}}, "load.images_per_s"),
        ({"colour": "red"}, "colour"),
        ({"devices": []}, "devices"),
        ({"devices": [{"name": "a", "memory_gb": 1, "cpus": 1, "price_per_hour": 1}]}, "tflops"),
        ({"devices": 2 * [{"name": "a", "memory_gb": 1, "cpus": 1, "price_per_hour": 1, "tflops": 1}]}, "one name"),
        (
            {"devices": [{"name": n, "memory_gb": 1, "cpus": 1, "price_per_hour": 1, "tflops": 1} for n in "ab"]},
            "accelerator_type",
        ),
        ({"load": {"images_per_s": 1, "steps": {20: -1.0, 30: 2.0}}}, "steps"),
    ],
)
def test_a_wrong_fleet_is_refused_on_one_line(tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named) as error:
        load_fleet(write(tmp_path, **changes))
    assert "\n" not in str(error.value)


def test_the_shipped_fleet_plans() -> None:
    shipped = load_fleet(Path(__file__).resolve().parents[2] / "clusters" / "fleet.yaml")
    plan = make_plan(shipped, models(8), 119_394_444_444)  # SD 2.1 at 256 pixels, about
    assert json.dumps(plan.devices) and plan.quantile(0.95) <= shipped.objective.p95_s
