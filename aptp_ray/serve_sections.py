"""The section of the HTTP service."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from aptp_ray.section import MOST_IMAGES, Positive, Precision, Section


class Serve(Section):
    """The HTTP service."""

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    public_url: str | None = Field(
        None, pattern=r"^https?://\S+$", description="how clients reach the service, for image URLs; null: as the request did"
    )
    # -- what is offered
    teacher: bool = Field(False, description="deploy the unpruned UNet, too, as the model `teacher`")
    sizes: list[Annotated[str, Field(pattern=r"^[1-9]\d{1,3}x[1-9]\d{1,3}$")]] = Field(
        [], max_length=32, description="sizes that a request may ask for beside the run's own, e.g. [768x512]"
    )
    max_images: Annotated[int, Field(ge=1, le=256)] = Field(32, description="images of one request: its prompts times n")
    url_storage: str | None = Field(
        None, description="fsspec URI of a folder that all ingress replicas share; allows response_format url. It only grows"
    )
    api_keys: str | None = Field(
        None, pattern=r"^\S+$", description="env:NAME or a file with the keys that clients must send; null: open to all"
    )
    # -- replicas
    replicas: int = Field(1, ge=0, description="least replicas of one expert; 0: an idle one stops until its next prompt")
    max_replicas: Positive = Field(1, description="most replicas of one expert")
    router_replicas: Positive = 1
    ingress_replicas: Positive = 1
    upscale_delay_s: float = Field(5.0, ge=0.0, description="of lasting load before a replica is added")
    downscale_delay_s: float = Field(600.0, ge=0.0, description="of little load before a replica is stopped")
    drain_s: float = Field(120.0, gt=0.0, description="that a replica which is to stop has to finish its requests")
    retries: Annotated[int, Field(ge=0, le=10)] = Field(3, description="of jobs whose replica died, within their deadline")
    # -- batching and bounds
    max_batch_size: Positive | None = Field(
        None, description="images in one UNet call at most (null: 32); fewer where a measurement says that more do not pay"
    )
    max_queued_requests: Positive = Field(64, description="requests that wait beyond those being drawn; more get a 503")
    max_waiting_images: Positive = Field(64, description="likewise, images for each replica that one expert may have")
    route_batch_size: Positive = Field(16, description="prompts that the router embeds at once")
    route_wait_ms: float = Field(
        0.0, ge=0.0, le=1000.0, description="to wait for more prompts; at 0, what comes while a batch is embedded forms the next"
    )
    route_workers: Annotated[int, Field(ge=1, le=16)] = Field(
        2, description="threads of a router that embed the prompts of long lists; one of them also those of requests for images"
    )
    timeout_s: float = Field(300.0, gt=0.0, le=86400.0, description="deadline of a request, which may ask for less")
    spill: bool = Field(False, description="a cheaper expert may take a prompt whose own would break latency_budget_ms")
    latency_budget_ms: float | None = Field(None, gt=0.0, description="from arrival to image, for spill")
    # -- resources
    cpus_per_expert: float = Field(0.2, gt=0.0, description="logical CPUs of one expert's replica")
    gpus_per_expert: float = Field(0.0, ge=0.0)
    threads_per_expert: Positive = Field(1, description="torch threads of one expert's replica on CPU")
    precision: Precision = "fp32"
    weights: Literal["whole", "int8"] = Field(
        "whole", description="int8: the layers of the experts' blocks keep their weights in eight bits, which saves memory"
    )

    @property
    def batch_limit(self) -> int:
        """The largest batch that an expert may choose."""
        return self.max_batch_size or MOST_IMAGES

    @model_validator(mode="after")
    def _spill_has_a_budget(self) -> Serve:
        if self.spill and self.latency_budget_ms is None:
            raise ValueError("serve.spill is set without serve.latency_budget_ms: say how long a request may take")
        return self
