"""What a service offers, read once from the run directory, and how a request becomes jobs under it."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from typing import Any

from aptp_ray.serve.protocol import AUTO, TEACHER, ApiError, DrawJob, ImageGeneration


@dataclass(frozen=True)
class Catalog:
    """What the service offers.

    Attributes:
        name: of the run.
        created: when the routing was made, in seconds since 1970.
        routing: ``routing.json``.
        size: (width, height) of an image, where a request asks for none.
        num_inference_steps: default.
        guidance_scale: default.
        sizes: further ones that a request may ask for.
        teacher: whether the unpruned UNet is served, too.
        urls: whether images can be answered as URLs.
        max_images: of one request.
        timeout_s: longest, and default, deadline of a request.
        pixels_per_token: pixels of a side to one latent position; for ``usage``.
    """

    name: str
    created: int
    routing: dict[str, Any]
    size: tuple[int, int]
    num_inference_steps: int
    guidance_scale: float
    sizes: list[tuple[int, int]] = field(default_factory=list)
    teacher: bool = False
    urls: bool = False
    max_images: int = 32
    timeout_s: float = 300.0
    pixels_per_token: int = 8

    @property
    def experts(self) -> list[dict[str, Any]]:
        return self.routing["experts"]

    @property
    def size_text(self) -> str:
        return size_text(self.size)

    @property
    def models(self) -> list[str]:
        """Ids of all models, "auto" first; then by their numbers."""
        return [AUTO, *(f"expert-{entry['id']}" for entry in self.experts), *([TEACHER] if self.teacher else [])]

    def expert_of(self, model: str) -> int | None:
        """Returns the number of the expert that a model id pins; None for "auto".

        Raises:
            ApiError: 404, if there is no such model.
        """
        if model not in self.models:
            shown = model[:100].encode("ascii", "backslashreplace").decode()
            message = f"no model {shown!r}; there are {', '.join(self.models)}"
            raise ApiError(404, message, param="model", code="model_not_found")
        return None if model == AUTO else self.models.index(model) - 1

    def model_of(self, expert: int) -> str:
        """Returns the model id of an expert's number."""
        return self.models[expert + 1]

    def macs_ratio(self, expert: int) -> float:
        """Returns an expert's MACs over the teacher's."""
        return self.experts[expert]["macs_ratio"] if expert < len(self.experts) else 1.0

    def model(self, name: str) -> dict[str, Any]:
        """Returns one entry of GET /v1/models.

        Raises:
            ApiError: 404, if there is no such model.
        """
        number = self.expert_of(name)
        if number is None:
            facts = {key: value for key, value in self.routing.items() if key != "experts"}
            facts |= {
                "size": self.size_text,
                "sizes": [self.size_text, *map(size_text, self.sizes)],
                "experts": len(self.experts),
                "num_inference_steps": self.num_inference_steps,
                "guidance_scale": self.guidance_scale,
                "response_formats": ["b64_json", "url"] if self.urls else ["b64_json"],
            }
        elif name == TEACHER:
            facts = {"macs": self.routing["teacher_macs"], "macs_ratio": 1.0}
        else:
            facts = self.experts[number]
        return {"id": name, "object": "model", "created": self.created, "owned_by": self.name, "aptp": facts}

    def listing(self) -> dict[str, Any]:
        """Returns the body of GET /v1/models."""
        return {"object": "list", "data": [self.model(name) for name in self.models]}


def size_text(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def parse_size(text: str) -> tuple[int, int]:
    """"WxH" -> (width, height)."""
    width, height = text.split("x")
    return int(width), int(height)


def make_jobs(body: ImageGeneration, catalog: Catalog, request_id: str, timeout_s: float | None = None) -> list[DrawJob]:
    """Fills in defaults, a seed and the deadline; one job a prompt.

    Args:
        body: of the request.
        catalog: of the service.
        request_id: unique; the jobs' ids begin with it.
        timeout_s: in place of the body's.

    Raises:
        ApiError: 404 or 400, for a model, size, format or number of images that is not served.
    """
    expert = catalog.expert_of(body.model)
    known = {size_text(size): size for size in catalog.sizes} | {AUTO: None, catalog.size_text: None}
    if body.size not in known:
        shown = body.size.encode("ascii", "backslashreplace").decode()
        message = f"size {shown!r} is not served; there are {', '.join(sorted(known))}"
        raise ApiError(400, message, param="size", code="invalid_value")
    if body.response_format == "url" and not catalog.urls:
        message = "response_format 'url' needs a shared storage, and this service has none (serve.url_storage); send 'b64_json'"
        raise ApiError(400, message, param="response_format", code="invalid_value")
    images = len(body.prompts) * body.n
    if images > catalog.max_images:
        message = f"{len(body.prompts)} prompts of {body.n} images are {images}; at most {catalog.max_images} in one request"
        raise ApiError(400, message, param="n" if body.n > 1 else "prompt", code="too_many_images")
    timeout = body.timeout if timeout_s is None else timeout_s
    if timeout is not None and not 0 < timeout <= catalog.timeout_s:
        message = f"timeout is {timeout:g}; it must be above 0 and at most {catalog.timeout_s:g} seconds"
        raise ApiError(400, message, param="timeout", code="invalid_value")
    deadline = time.time() + (catalog.timeout_s if timeout is None else timeout)
    # 48 bits: what is sent back survives clients whose JSON numbers are doubles.
    seed = int.from_bytes(os.urandom(6), "big") if body.seed is None else body.seed
    steps, guidance = body.num_inference_steps, body.guidance_scale
    return [
        DrawJob(
            id=f"{request_id}-{index}",
            prompt=prompt,
            negative_prompt=body.negative_prompt,
            n=body.n,
            seed=seed,
            num_inference_steps=catalog.num_inference_steps if steps is None else steps,
            guidance_scale=catalog.guidance_scale if guidance is None else guidance,
            expert=expert,
            size=known[body.size],
            deadline=deadline,
            partial_images=body.partial_images,
        )
        for index, prompt in enumerate(body.prompts)
    ]
