"""What goes over the wire: OpenAI's Images API with the extensions that image clients know, and our extras under ``aptp``.

Everything that a request may ask for is limited here, before it reaches a queue. Nothing is ignored: a field that is not
listed, or a value that the service does not honour, is refused. (``null`` stands for the default, as with OpenAI.)
"""

from __future__ import annotations

import base64
import io
import os
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, StrictInt, StringConstraints, ValidationError, field_validator

MAX_BODY_BYTES = 4 << 20
MAX_ROUTED_PROMPTS = 256
AUTO = "auto"

Prompt = Annotated[str, StringConstraints(strict=True, min_length=1, max_length=2000)]


class ApiError(Exception):
    """An answer other than 200, in OpenAI's shape."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body = {"error": {"message": message, "type": type, "param": param, "code": code}}


class Body(BaseModel):
    """Base of request bodies: closed to unknown fields."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ImageGeneration(Body):
    """Body of POST /v1/images/generations; absent sampling fields take the run's defaults."""

    prompt: Prompt
    model: str = AUTO
    n: Annotated[StrictInt, Field(ge=1, le=10)] = 1
    size: str = AUTO
    response_format: Literal["b64_json"] = "b64_json"
    output_format: Literal["png", "jpeg", "webp"] = "png"
    output_compression: Annotated[StrictInt, Field(ge=0, le=100)] = 100
    stream: Literal[False] = False
    user: str | None = Field(None, description="the client's own label; changes nothing in the image")
    negative_prompt: Annotated[str, StringConstraints(strict=True, max_length=2000)] = ""
    num_inference_steps: Annotated[StrictInt, Field(ge=1, le=200)] | None = None
    guidance_scale: Annotated[float, Field(ge=0.0, le=20.0, strict=True, allow_inf_nan=False)] | None = None
    seed: Annotated[StrictInt, Field(ge=0, le=2**63 - 1)] | None = None

    @field_validator("prompt")
    @classmethod
    def _says_something(cls, value: str) -> str:
        if not value.strip():
            raise ValueError("the prompt is blank")
        return value


class RouteQuery(Body):
    """Body of POST /v1/route."""

    prompts: Annotated[list[Prompt], Field(min_length=1, max_length=MAX_ROUTED_PROMPTS)]


BodyT = TypeVar("BodyT", bound=Body)
_CODES = {"extra_forbidden": "unknown_parameter", "missing": "missing_required_parameter"}


def parse_body(kind: type[BodyT], value: Any) -> BodyT:
    """Validates a decoded JSON body.

    Raises:
        ApiError: 400, naming the first field that is wrong and what is allowed.
    """
    if not isinstance(value, dict):
        raise ApiError(400, f"the body is a JSON {type(value).__name__}; send an object", code="invalid_body")
    try:
        return kind.model_validate({key: item for key, item in value.items() if item is not None})
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        param = ".".join(str(part) for part in first["loc"])
        message = f"{param}: {first['msg']}"
        if first["type"] == "extra_forbidden":
            message = f"unknown field {param!r}; known: {', '.join(kind.model_fields)}"
        raise ApiError(400, message, param=param, code=_CODES.get(first["type"], "invalid_value")) from error


@dataclass(frozen=True)
class DrawJob:
    """A validated request on its way through router and expert.

    Attributes:
        id: unique; names the job when it is cancelled.
        expert: the pinned expert; None: the router decides.
    """

    id: str
    prompt: str
    negative_prompt: str
    n: int
    seed: int
    num_inference_steps: int
    guidance_scale: float
    expert: int | None = None


@dataclass(frozen=True)
class Outcome:
    """What became of a job: images [height, width, 3] uint8, or why there are none.

    Attributes:
        status: HTTP status of a failure.
    """

    id: str
    images: list[np.ndarray] = field(default_factory=list)
    error: str | None = None
    status: int = 200


@dataclass(frozen=True)
class Drawn:
    """A job's outcome together with where it was drawn."""

    outcome: Outcome
    expert: int
    similarity: list[float]


@dataclass(frozen=True)
class Catalog:
    """What the service offers; read once from the run directory.

    Attributes:
        name: of the run.
        created: when the routing was made, in seconds since 1970.
        routing: ``routing.json``.
        size: (width, height) of an image.
        num_inference_steps: default.
        guidance_scale: default.
    """

    name: str
    created: int
    routing: dict[str, Any]
    size: tuple[int, int]
    num_inference_steps: int
    guidance_scale: float

    @property
    def experts(self) -> list[dict[str, Any]]:
        return self.routing["experts"]

    @property
    def size_text(self) -> str:
        return "{}x{}".format(*self.size)

    def expert_of(self, model: str) -> int | None:
        """Returns the expert that a model id pins; None for "auto".

        Raises:
            ApiError: 404, if there is no such model.
        """
        ids = [AUTO, *(f"expert-{expert['id']}" for expert in self.experts)]
        if model not in ids:
            raise ApiError(404, f"no model {model!r}; there are {', '.join(ids)}", param="model", code="model_not_found")
        return None if model == AUTO else int(model.removeprefix("expert-"))

    def models(self) -> dict[str, Any]:
        """Returns the body of GET /v1/models."""

        def entry(name: str, facts: dict[str, Any]) -> dict[str, Any]:
            return {"id": name, "object": "model", "created": self.created, "owned_by": self.name, "aptp": facts}

        whole = {key: value for key, value in self.routing.items() if key != "experts"}
        whole |= {"size": self.size_text, "experts": len(self.experts)}
        return {"object": "list", "data": [entry(AUTO, whole), *(entry(f"expert-{e['id']}", e) for e in self.experts)]}


def make_job(body: ImageGeneration, catalog: Catalog, job_id: str) -> DrawJob:
    """Fills in defaults and a seed.

    Raises:
        ApiError: 404 or 400, for a model or size that is not served.
    """
    expert = catalog.expert_of(body.model)
    if body.size not in (AUTO, catalog.size_text):
        message = f"size {body.size!r} is not served; send {catalog.size_text!r} or 'auto'"
        raise ApiError(400, message, param="size", code="invalid_value")
    # 48 bits: what is sent back survives clients whose JSON numbers are doubles.
    seed = int.from_bytes(os.urandom(6), "big") if body.seed is None else body.seed
    steps, guidance = body.num_inference_steps, body.guidance_scale
    return DrawJob(
        id=job_id,
        prompt=body.prompt,
        negative_prompt=body.negative_prompt,
        n=body.n,
        seed=seed,
        num_inference_steps=catalog.num_inference_steps if steps is None else steps,
        guidance_scale=catalog.guidance_scale if guidance is None else guidance,
        expert=expert,
    )


def encode_image(pixels: np.ndarray, output_format: str, compression: int) -> str:
    """[height, width, 3] uint8 -> base64 of an image file; ``compression`` is the quality of jpeg and webp."""
    buffer = io.BytesIO()
    options = {} if output_format == "png" else {"quality": compression}
    Image.fromarray(pixels).save(buffer, format=output_format.upper(), **options)
    return base64.b64encode(buffer.getvalue()).decode()
