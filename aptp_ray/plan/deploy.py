"""A plan as text for people, and as the file that ``serve deploy`` takes."""

from __future__ import annotations

import math
from typing import Any

import yaml

from aptp_ray.credentials import masked
from aptp_ray.plan.choose import Part, Plan
from aptp_ray.sections import Serve

IMPORT_PATH = "aptp_ray.serve.app:build"


def serve_config(
    plan: Plan,
    run_dir: str,
    *,
    storage_options: dict[str, Any] | None = None,
    serve: Serve | None = None,
    host: str = "0.0.0.0",
    port: int = 8000,
) -> dict[str, Any]:
    """Returns Serve's config tree: the application, and for each expert its replicas, bounds and share of a device.

    Args:
        plan: what to deploy.
        run_dir: an address that every node can open.
        storage_options: with which they do; secrets are written as references to the environment, see ``credentials.py``.
        serve: the run's section; of it, how fast replicas come and go.
        host: on which the proxies listen; inside a cluster whose network is closed, all interfaces.
        port: likewise.
    """
    fleet, options = plan.fleet, [part.option for part in plan.parts]
    rate = fleet.load.images_per_s * fleet.load.surge
    gpu = [option.fraction for option in options if option.device.gpu]
    section = {
        "max_batch_size": fleet.max_batch_size,
        # The bounds that hold for an expert stand below; the router's queues are sized by the largest of them.
        "replicas": min(part.min_replicas for part in plan.parts),
        "max_replicas": max(part.max_replicas for part in plan.parts),
        "cpus_per_expert": fleet.replica.cpus,
        "gpus_per_expert": min(gpu, default=0.0),  # says that there are GPUs; each expert's own share stands below
        "router_replicas": math.ceil(rate / fleet.replica.requests_per_router),
        "ingress_replicas": math.ceil(rate / fleet.replica.requests_per_ingress),
    }
    Serve.model_validate(section)
    args: dict[str, Any] = {"run_dir": run_dir}
    if storage_options:
        args["storage_options"] = masked(storage_options, "storage_options")
    return {
        "proxy_location": "EveryNode",
        "http_options": {"host": host, "port": port},
        "applications": [
            {
                "name": "aptp",
                "route_prefix": "/",
                "import_path": IMPORT_PATH,
                "args": args | {"serve": section},
                "deployments": [_deployment(plan, part, serve or Serve()) for part in plan.parts],
            }
        ],
    }


def _deployment(plan: Plan, part: Part, serve: Serve) -> dict[str, Any]:
    option = part.option
    device, fleet = option.device, plan.fleet
    if device.gpu:
        actor: dict[str, Any] = {"num_cpus": fleet.replica.cpus, "num_gpus": option.fraction}
        if device.accelerator_type is not None:
            actor["accelerator_type"] = device.accelerator_type
    else:
        actor = {"num_cpus": round(option.fraction * device.cpus, 4)}
    return {
        "name": option.model.name,
        "autoscaling_config": {
            "min_replicas": part.min_replicas,
            "initial_replicas": option.replicas,
            "max_replicas": part.max_replicas,
            # As many as a replica has at the target load, where the promise is kept.
            "target_ongoing_requests": max(1.0, round(option.expectation.in_flight, 1)),
            # Said again: a config's section takes the place of the application's whole.
            "upscale_delay_s": serve.upscale_delay_s,
            "downscale_delay_s": serve.downscale_delay_s,
        },
        "ray_actor_options": actor,
    }


def to_yaml(plan: Plan, run_dir: str, **options: Any) -> str:
    """Returns the config as a file's text, with what it promises in its head."""
    fleet = plan.fleet
    head = [
        "# Written by jobs/plan.py; deploy with: serve deploy THIS_FILE",
        f"# For {fleet.load.images_per_s:g} images/s at a 95th percentile of {fleet.objective.p95_s:g} s: "
        + ", ".join(f"{count} {name}" for name, count in plan.devices.items())
        + f", {plan.cost_per_hour:.2f} an hour.",
        f"# Expected: median {plan.quantile(0.5):.2f} s, 95th percentile {plan.quantile(0.95):.2f} s.",
    ]
    if not all(part.option.times.measured for part in plan.parts):
        head.append("# Some step times are estimates from MACs: measure them (replicas do, when they start), and plan again.")
    return "\n".join(head) + "\n" + yaml.safe_dump(serve_config(plan, run_dir, **options), sort_keys=False)


def table(plan: Plan) -> str:
    """Returns the plan as lines for people."""
    head = ("expert", "share", "device", "part", "replicas", "bounds", "load", "in flight", "batch", "p50 s", "p95 s", "times")
    rows = [head]
    over = plan.fleet.replica.overhead_ms / 1000
    for part in plan.parts:
        option, expected = part.option, part.option.expectation
        rows.append(
            (
                option.model.name,
                f"{option.model.share:.3f}",
                option.device.name,
                f"1/{round(1 / option.fraction)}" if option.fraction < 1 else "1",
                str(option.replicas),
                f"{part.min_replicas}-{part.max_replicas}",
                f"{expected.utilisation:.2f}",
                f"{expected.in_flight:.1f}",
                str(option.times.limit),
                f"{expected.quantile(0.5) + over:.2f}",
                f"{expected.quantile(0.95) + over:.2f}",
                "measured" if option.times.measured else "estimated",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    devices = ", ".join(f"{count} {name}" for name, count in plan.devices.items())
    per_thousand = plan.cost_per_hour / 3.6 / plan.fleet.load.images_per_s
    lines.append(
        f"{devices}: {plan.cost_per_hour:.2f} an hour ({per_thousand:.4f} per 1000 images); "
        f"expected median {plan.quantile(0.5):.2f} s, 95th percentile {plan.quantile(0.95):.2f} s; "
        f"within {plan.gap:.2%} of the cheapest"
    )
    return "\n".join(lines)
