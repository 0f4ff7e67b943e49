"""The bodies of answers: OpenAI's shapes, with what only this service knows under ``aptp``."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any

from aptp_ray.serve.catalog import Catalog, size_text
from aptp_ray.serve.protocol import DrawJob, Drawn, ImageGeneration, Partial, Placed
from aptp_ray.serve.routing import Route


def facts(job: DrawJob, drawn: Drawn, catalog: Catalog) -> dict[str, Any]:
    """Returns the ``aptp`` entry of one prompt: who drew it, why, and what took how long."""
    timings = drawn.outcome.timings
    return {
        **placing(job, drawn.placed, catalog),
        # Image i is drawn from (seed, i): the same request with this seed gives the same images.
        "seeds": [{"seed": job.seed, "index": index} for index in range(job.n)],
        "queue_ms": None if timings is None else round(timings.queue_ms, 2),
        "denoise_ms": None if timings is None else round(timings.denoise_ms, 2),
        "decode_ms": None if timings is None else round(timings.decode_ms, 2),
        "batch_size": None if timings is None else round(timings.batch_size, 2),
    }


def placing(job: DrawJob, placed: Placed, catalog: Catalog) -> dict[str, Any]:
    """Returns who draws a prompt, and why."""
    spilled = None if placed.spilled_from is None else catalog.model_of(placed.spilled_from)
    return {
        "model": catalog.model_of(placed.expert),
        "expert": placed.expert if placed.expert < len(catalog.experts) else None,
        "routed": job.expert is None,
        "similarity": placed.similarity,
        "scores": placed.scores,
        "macs_ratio": catalog.macs_ratio(placed.expert),
        "spilled": spilled is not None,
        "spilled_from": spilled,
    }


def usage(jobs: Sequence[DrawJob], placed: Sequence[Placed], catalog: Catalog) -> dict[str, Any]:
    """Counts tokens: those that the text encoder reads, and the latent positions of the images."""
    text = sum(entry.text_tokens for entry in placed)
    pixels = catalog.pixels_per_token
    image = 0
    for job in jobs:
        width, height = job.size or catalog.size
        image += job.n * (width // pixels) * (height // pixels)
    return {
        "input_tokens": text,
        "input_tokens_details": {"text_tokens": text, "image_tokens": 0},
        "output_tokens": image,
        "output_tokens_details": {"text_tokens": 0, "image_tokens": image},
        "total_tokens": text + image,
    }


def generation(
    body: ImageGeneration,
    jobs: Sequence[DrawJob],
    drawn: Sequence[Drawn],
    data: Sequence[dict[str, Any]],
    catalog: Catalog,
    seconds: float,
) -> dict[str, Any]:
    """Returns the body of POST /v1/images/generations.

    Args:
        body: the request.
        jobs: one a prompt.
        drawn: what became of them.
        data: one entry an image, those of the first prompt first.
        catalog: of the service.
        seconds: from arrival to the last image.
    """
    job = jobs[0]
    entries = [facts(*pair, catalog) for pair in zip(jobs, drawn, strict=True)]
    return {
        "created": int(time.time()),
        "data": list(data),
        "output_format": body.output_format,
        "size": size_text(job.size or catalog.size),
        "usage": usage(jobs, [entry.placed for entry in drawn], catalog),
        "aptp": {
            # One prompt's facts stand here; those of a list of prompts in a list, in the same order.
            **(entries[0] if isinstance(body.prompt, str) else {"results": entries}),
            "experts": len(catalog.experts),
            "num_inference_steps": job.num_inference_steps,
            "guidance_scale": job.guidance_scale,
            "seconds": round(seconds, 4),
        },
    }


def image_event(
    body: ImageGeneration, job: DrawJob, image: dict[str, str], catalog: Catalog, extra: dict[str, Any], partial: Partial | None
) -> bytes:
    """Returns the server-sent event of a preview, or of a finished image.

    Args:
        body: the request.
        job: of the prompt.
        image: ``{"b64_json": ...}`` or ``{"url": ...}``.
        catalog: of the service.
        extra: what goes under ``aptp``, and ``usage`` of a finished image.
        partial: None: the image is finished.
    """
    event: dict[str, Any] = {
        "type": "image_generation.completed" if partial is None else "image_generation.partial_image",
        **image,
        "created_at": int(time.time()),
        "size": size_text(job.size or catalog.size),
        "quality": "auto",
        "background": "opaque",
        "output_format": body.output_format,
    }
    if partial is not None:
        event["partial_image_index"] = partial.number
    return server_sent(event["type"], event | extra)


def server_sent(name: str, data: dict[str, Any]) -> bytes:
    """Returns one event of a text/event-stream."""
    return f"event: {name}\ndata: {json.dumps(data)}\n\n".encode()


def routes(found: Sequence[Route], catalog: Catalog) -> dict[str, Any]:
    """Returns the body of POST /v1/route."""
    data = [
        {
            "index": index,
            "expert": route.expert,
            "model": catalog.model_of(route.expert),
            "macs_ratio": catalog.macs_ratio(route.expert),
            "similarity": route.similarity,
            "scores": route.scores,
        }
        for index, route in enumerate(found)
    ]
    return {"object": "list", "data": data}
