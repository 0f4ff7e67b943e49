"""Builds the Serve application: ``serve run aptp_ray.serve.app:build run_dir=...``, or from a Serve config file."""

from __future__ import annotations

import calendar
import json
import time
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from ray import serve
from ray.serve import Application

from aptp_ray.artifacts import RunDir, RunDirError, load_run
from aptp_ray.config import Config, ConfigError
from aptp_ray.sections import Serve
from aptp_ray.serve.catalog import Catalog, parse_size
from aptp_ray.serve.expert import Expert
from aptp_ray.serve.ingress import Ingress
from aptp_ray.serve.protocol import TEACHER
from aptp_ray.serve.router import Router, most_jobs

# Ingress and router mostly wait; they ask for little, so that four experts fit beside them on two cores.
_SMALL = {"num_cpus": 0.1}
_HEALTH_PERIOD_S = 5.0


class ServeArgs(BaseModel):
    """Arguments of the application; all else stands in the run directory's config.

    Attributes:
        run_dir: any fsspec URI.
        storage_options: of the run directory, and of ``url_storage``. Serve keeps and shows an application's arguments, so
            write secrets as ``env:NAME``: every replica reads them from its own environment.
        serve: fields of the config's ``serve`` section to use in place of the run's; on a command line as YAML:
            ``serve="{replicas: 2, teacher: true}"``.
    """

    model_config = ConfigDict(extra="forbid")

    run_dir: str
    storage_options: dict[str, Any] = Field(default_factory=dict)
    serve: dict[str, Any] = Field(default_factory=dict)

    @field_validator("storage_options", "serve", mode="before")
    @classmethod
    def _from_a_command_line(cls, value: Any) -> Any:
        return yaml.safe_load(value) if isinstance(value, str) else value


def build(args: ServeArgs) -> Application:
    """Returns the application that serves a finished run.

    Args:
        args: or a mapping of the same fields.

    Raises:
        RunDirError: if a stage that serving needs has not finished.
        ConfigError: if ``args.serve`` is no such section.
    """
    return assemble(ServeArgs.model_validate(args))


def assemble(args: ServeArgs, expert: type[Expert] = Expert) -> Application:
    """Returns the application with another class in the experts' place; apart from the builder, which takes one argument.

    Raises:
        RunDirError: likewise.
        ConfigError: likewise.
    """
    run, config = load_run(args.run_dir, args.storage_options)
    options = serve_options(config, args.serve)
    catalog = read_catalog(run, config.model_copy(update={"serve": options}))
    models = catalog.models[1:]
    experts = [_expert(expert, args, run.uri, options, model) for model in models]
    held = most_jobs(len(models), options)  # by one router, which refuses more in a shape that clients understand
    ratios = [catalog.macs_ratio(number) for number in range(len(models))]
    router = serve.deployment(
        Router,
        name="router",
        num_replicas=options.router_replicas,
        # Beyond what it holds: those that it refuses, calls of /v1/route, and health checks.
        max_ongoing_requests=2 * held + 100,
        max_queued_requests=held + options.max_queued_requests,
        ray_actor_options=_SMALL,
        **_lifecycle(options),
    ).bind(run.uri, args.storage_options, args.serve, experts, models, ratios)  # type: ignore[attr-defined]
    total = held * options.router_replicas
    ingress = serve.deployment(
        Ingress,
        name="ingress",
        num_replicas=options.ingress_replicas,
        max_ongoing_requests=2 * total + 200,
        max_queued_requests=total + 200,
        backpressure_config={"status_code": 503, "retry_after_s": 1},
        ray_actor_options=_SMALL,
        **_lifecycle(options),
    )
    return ingress.bind(catalog, options, args.storage_options, router)  # type: ignore[attr-defined]


def _expert(expert: type[Expert], args: ServeArgs, uri: str, options: Serve, model: str) -> Any:
    deployment = serve.deployment(
        expert,
        name=model,
        # What the router lets through; the engine's own queue is where images wait, and merge. So never below a batch.
        max_ongoing_requests=2 * (options.batch_limit + options.max_waiting_images),
        ray_actor_options={"num_cpus": options.cpus_per_expert, "num_gpus": options.gpus_per_expert},
        **_replicas(options),
        **_lifecycle(options),
    )
    number = TEACHER if model == TEACHER else int(model.removeprefix("expert-"))
    return deployment.bind(uri, args.storage_options, number, args.serve)  # type: ignore[attr-defined]


def _lifecycle(options: Serve) -> dict[str, Any]:
    """What all deployments share of their coming and going."""
    return {
        # An update starts the new replica before it stops the old one, which then drains.
        "max_surge_percent": 100,
        "graceful_shutdown_timeout_s": options.drain_s,
        "graceful_shutdown_wait_loop_s": 0.5,
        "health_check_period_s": _HEALTH_PERIOD_S,
        # Serve would log every call of every part; the ingress's own line says more, once (access.py).
        "logging_config": {"enable_access_log": False},
    }


def _replicas(options: Serve) -> dict[str, Any]:
    if options.max_replicas <= options.replicas:
        return {"num_replicas": options.replicas}
    return {
        "autoscaling_config": {
            "min_replicas": options.replicas,
            "max_replicas": options.max_replicas,
            # Of calls, each of one image or more: a batch is full at this many or fewer.
            "target_ongoing_requests": max(1, options.batch_limit // 2),
            "upscale_delay_s": options.upscale_delay_s,
            "downscale_delay_s": options.downscale_delay_s,
        }
    }


def serve_options(config: Config, changes: dict[str, Any]) -> Serve:
    """Returns the run's ``serve`` section with some of its fields changed.

    Raises:
        ConfigError: naming the first field that is wrong.
    """
    try:
        return Serve.model_validate(config.serve.model_dump() | changes)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        raise ConfigError(f"serve.{'.'.join(map(str, first['loc']))}: {first['msg']}") from error


def read_catalog(run: RunDir, config: Config) -> Catalog:
    """Reads what the service offers, and checks that every expert of ``routing.json`` is there.

    Raises:
        RunDirError: if routing.json, the teacher or an expert is missing, or the ids are not 0 to K-1.
        ConfigError: if a size cannot be drawn.
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
    side, options = config.data.resolution, config.serve
    vae = json.loads(run.read_bytes("teacher", "vae", "config.json"))
    factor = 2 ** (len(vae["block_out_channels"]) - 1)
    sizes = [parse_size(text) for text in dict.fromkeys(options.sizes) if parse_size(text) != (side, side)]
    for size in sizes:
        if size[0] % factor or size[1] % factor:
            message = f"{size[0]}x{size[1]} cannot be drawn: sides must be multiples of {factor}, the VAE's factor"
            raise ConfigError(f"serve.sizes: {message}")
    return Catalog(
        name=config.name,
        created=calendar.timegm(time.strptime(finished, "%Y-%m-%dT%H:%M:%SZ")) if finished else int(time.time()),
        routing=routing,
        size=(side, side),
        num_inference_steps=config.sampling.num_inference_steps,
        guidance_scale=config.sampling.guidance_scale,
        sizes=sizes,
        teacher=options.teacher,
        urls=options.url_storage is not None,
        max_images=options.max_images,
        timeout_s=options.timeout_s,
        pixels_per_token=factor,
    )
