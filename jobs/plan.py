"""Plans a service: replicas of each expert, the GPUs they share, bounds for autoscaling, expected latencies and cost.

    python jobs/plan.py RUN_DIR clusters/fleet.yaml [key=value ...] [--out serve.yaml]     then: serve deploy serve.yaml
    python jobs/plan.py RUN_DIR clusters/fleet.yaml --scale            images/s and GPU on 1 to 4096 GPUs, against other fleets
    python jobs/plan.py RUN_DIR clusters/fleet.yaml --trace FILE       a real service's latencies against the simulator's

The fleet file says which load, which promise and which GPUs; key=value changes it, e.g. load.images_per_s=50. RUN_DIR is a run
from the prune stage on: its routing.json has the experts' shares of the traffic. Every plan is simulated before it is written. A
trace is JSON lines {"arrival_s", "expert", "steps", "latency_s"}; it is replayed against the plan, or with --deployed against one
replica of each expert on the first device (serve.replicas of the run, if that is more). No cluster is needed.
"""

from __future__ import annotations

import argparse
import time
import warnings
from pathlib import Path
from typing import Any

import yaml

from aptp_ray.artifacts import RunDir, load_run
from aptp_ray.config import Config
from cli import errors_on_one_line, finish, say
from serve import storage_options


def parser() -> argparse.ArgumentParser:
    """Returns the job's arguments."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("run_dir", help="any fsspec URI")
    arguments.add_argument("fleet", help="YAML file, e.g. clusters/fleet.yaml")
    arguments.add_argument("overrides", nargs="*", metavar="key=value", help="of the fleet file, e.g. objective.p95_s=3")
    arguments.add_argument("--out", help="where the Serve config is written")
    arguments.add_argument("--host", default="0.0.0.0", help="of the written config: interface of every node's proxy")
    arguments.add_argument("--port", type=int, default=8000, help="likewise")
    arguments.add_argument("--scale", action="store_true", help="compare fleets of 1, 8, 64, 512 and 4096 of the first device")
    arguments.add_argument("--trace", help="JSON lines of a real service's requests")
    arguments.add_argument("--deployed", action="store_true", help="with --trace: the service of the run's config, not the plan")
    arguments.add_argument("--seed", type=int, default=0, help="of the simulated arrivals and dispatch")
    arguments.add_argument(
        "--storage-option", action="append", default=[], metavar="KEY=VALUE", help="of the run directory; repeatable"
    )
    return arguments


def planned(options: argparse.Namespace, run: RunDir, config: Config) -> dict[str, Any]:
    """Makes, simulates, prints and writes the plan; compares with a trace where one is given."""
    from aptp_ray.plan.checked import figures, plan_checked
    from aptp_ray.plan.deploy import table, to_yaml
    from aptp_ray.plan.fleet import load_fleet
    from aptp_ray.plan.sources import models_of

    fleet = load_fleet(options.fleet, options.overrides)
    models, teacher_macs = models_of(run, config, fleet)
    if options.scale:
        return scaled(fleet, models, teacher_macs, options.seed)
    if options.trace and options.deployed:
        return traced(options, *deployed(config, fleet, models, teacher_macs), fleet.replica.overhead_ms / 1000)
    plan, outcome = plan_checked(fleet, models, teacher_macs, say=say, seed=options.seed)
    found = figures(plan, outcome)
    say(table(plan))
    simulated = found["simulated"]
    say(
        f"simulated, {simulated['requests']} requests: {simulated['images_per_s']:.2f} images/s, median "
        f"{simulated['p50_s']:.2f} s, 95th percentile {simulated['p95_s']:.2f} s (of the slowest expert "
        f"{simulated['worst_expert_p95_s']:.2f}), devices busy {simulated['busy']:.0%}"
        + ("" if found["keeps_the_promise"] else "; THE PROMISE IS NOT KEPT: lower objective.utilisation")
    )
    if options.out:
        where = {"storage_options": config.storage_options, "host": options.host, "port": options.port}
        text = to_yaml(plan, run.uri, serve=config.serve, **where)
        validate(text)
        Path(options.out).write_text(text, encoding="utf-8")
        say(f"written: {options.out}; serve deploy {options.out}")
        found["serve_config"] = options.out
    if options.trace:
        from aptp_ray.plan.simulate import fleet_of

        found |= traced(options, *fleet_of(plan), fleet.replica.overhead_ms / 1000)
    return found


def validate(text: str) -> None:
    """Refuses a Serve config that Ray or our own application would refuse."""
    with warnings.catch_warnings():  # Ray's own deprecated pydantic fields, told of once at import
        warnings.simplefilter("ignore", DeprecationWarning)
        from ray.serve.config import AutoscalingConfig
        from ray.serve.schema import ServeDeploySchema

        from aptp_ray.sections import Serve
        from aptp_ray.serve.app import ServeArgs

    for application in ServeDeploySchema.model_validate(yaml.safe_load(text)).applications:
        Serve.model_validate(ServeArgs.model_validate(application.args).serve)
        for deployment in application.deployments:
            AutoscalingConfig.model_validate(deployment.autoscaling_config)


def scaled(fleet: Any, models: list[Any], teacher_macs: int, seed: int) -> dict[str, Any]:
    """Prints and returns images a second and GPU by the number of GPUs."""
    from aptp_ray.plan.scale import Workload, compare_fleets
    from aptp_ray.plan.times import Model, step_times

    device = fleet.devices[0]
    teacher = step_times(Model("teacher", 1.0, 1.0, 0.0), device, fleet, teacher_macs)
    experts = [step_times(model, device, fleet, teacher_macs) for model in models]
    say(f"{device.name}; step times {'measured' if all(t.measured for t in experts) else 'estimated from MACs'}")
    return compare_fleets(Workload([m.share for m in models], fleet.load.mix(), teacher, experts, seed), say=say)


def deployed(config: Config, fleet: Any, models: list[Any], teacher_macs: int) -> tuple[list[Any], list[Any]]:
    """Returns the hosts and step times of the service as the run's config has it, on the first device."""
    from aptp_ray.plan.simulate import host_of, simulated_times
    from aptp_ray.plan.times import step_times

    device, replicas = fleet.devices[0], max(1, config.serve.replicas)
    times = [simulated_times(step_times(model, device, fleet, teacher_macs), device) for model in models]
    dealt = [model for model in range(len(models)) for _ in range(replicas)]
    each = int(1 / config.serve.gpus_per_expert) if config.serve.gpus_per_expert else len(dealt)
    each = max(1, min(each, len(dealt)))
    return [host_of(device, dealt[at : at + each], fleet) for at in range(0, len(dealt), each)], times


def traced(options: argparse.Namespace, hosts: list[Any], times: list[Any], overhead_s: float) -> dict[str, Any]:
    """Prints and returns how the simulator's latencies compare with a trace's."""
    from aptp_ray.plan.trace import compare, read_trace

    found = compare(read_trace(options.trace), hosts, times, overhead_s=overhead_s, seed=options.seed)
    for name in ("p50", "p95"):
        say(f"{name}: measured {found[f'{name}_measured_s']:.3f} s, simulated {found[f'{name}_simulated_s']:.3f} s")
    return {"trace": found}


def main() -> None:
    options = parser().parse_intermixed_args()
    begun = time.monotonic()
    with errors_on_one_line():
        run, config = load_run(options.run_dir, storage_options(options.storage_option))
        found = planned(options, run, config)
    finish({"run_dir": run.uri, "stage": "plan", "seconds": round(time.monotonic() - begun, 1), **found})


if __name__ == "__main__":
    main()
