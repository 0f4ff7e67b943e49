"""Builds the Serve application: ``serve run aptp_ray.serve.app:build run_dir=...``, or from a Serve config file."""

from __future__ import annotations

import calendar
import time
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.serve import Application

from aptp_ray.artifacts import RunDir, RunDirError, load_run
from aptp_ray.config import Config
from aptp_ray.serve.expert import Expert
from aptp_ray.serve.ingress import Ingress
from aptp_ray.serve.protocol import Catalog
from aptp_ray.serve.router import Router

# Ingress and router mostly wait; they ask for little, so that four experts fit beside them on two cores.
_SMALL = {"num_cpus": 0.1}


class ServeArgs(BaseModel):
    """Arguments of the application; all else stands in the run directory's config.

    Attributes:
        run_dir: any fsspec URI.
        storage_options: of the run directory. Serve keeps and shows an application's arguments, so write secrets as
            ``env:NAME``: every replica reads them from its own environment.
    """

    model_config = ConfigDict(extra="forbid")

    run_dir: str
    storage_options: dict[str, Any] = Field(default_factory=dict)


def build(args: ServeArgs) -> Application:
    """Returns the application that serves a finished run.

    Args:
        args: or a mapping of the same fields.

    Raises:
        RunDirError: if a stage that serving needs has not finished.
    """
    args = ServeArgs.model_validate(args)
    run, config = load_run(args.run_dir, args.storage_options)
    catalog = read_catalog(run, config)
    options = config.serve
    where = (run.uri, args.storage_options)
    experts = []
    for entry in catalog.experts:
        deployment = serve.deployment(
            Expert,
            name=f"expert-{entry['id']}",
            # A call is a group of jobs. Below the batch size a batch could never fill; twice that keeps a next one ready.
            max_ongoing_requests=2 * options.max_batch_size,
            ray_actor_options={"num_cpus": options.cpus_per_expert, "num_gpus": options.gpus_per_expert},
            **_replicas(config),
        )
        experts.append(deployment.bind(*where, entry["id"]))  # type: ignore[attr-defined]
    in_flight = max(len(experts) * options.max_replicas * options.max_batch_size, options.route_batch_size)
    router = serve.deployment(
        Router,
        name="router",
        max_ongoing_requests=in_flight,
        max_queued_requests=options.max_queued_requests,
        ray_actor_options=_SMALL,
    ).bind(*where, experts)  # type: ignore[attr-defined]
    # The limit stands before the router, where a refusal still gets an answer in the right shape.
    ingress = serve.deployment(
        Ingress,
        name="ingress",
        max_ongoing_requests=in_flight + 2 * options.max_queued_requests + 100,
        ray_actor_options=_SMALL,
    )
    return ingress.bind(catalog, router)  # type: ignore[attr-defined]


def _replicas(config: Config) -> dict[str, Any]:
    options = config.serve
    if options.max_replicas <= options.replicas:
        return {"num_replicas": options.replicas}
    return {
        "autoscaling_config": {
            "min_replicas": options.replicas,
            "max_replicas": options.max_replicas,
            "target_ongoing_requests": options.max_batch_size,
        }
    }


def read_catalog(run: RunDir, config: Config) -> Catalog:
    """Reads what the service offers, and checks that every expert of ``routing.json`` is there.

    Raises:
        RunDirError: if routing.json, the teacher or an expert is missing, or the ids are not 0 to K-1.
    """
    routing = run.read_json("routing.json")
    ids = [entry["id"] for entry in routing["experts"]]
    if ids != list(range(len(ids))) or not ids:
        raise RunDirError(f"{run.address('routing.json')} lists experts {ids}; expected 0, 1, ... in order")
    needed = [("teacher", "model_index.json"), ("router", "config.json"), *(("experts", str(k), "config.json") for k in ids)]
    missing = [run.address(*parts) for parts in needed if not run.exists(*parts)]
    if missing:
        raise RunDirError(f"cannot serve: {', '.join(missing)} missing; run jobs/pipeline.py with this run_dir to the end")
    finished = run.manifest()["stages"].get("finetune", {}).get("finished_at")
    side = config.data.resolution
    return Catalog(
        name=config.name,
        created=calendar.timegm(time.strptime(finished, "%Y-%m-%dT%H:%M:%SZ")) if finished else int(time.time()),
        routing=routing,
        size=(side, side),
        num_inference_steps=config.sampling.num_inference_steps,
        guidance_scale=config.sampling.guidance_scale,
    )
