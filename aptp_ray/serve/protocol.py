"""What goes over the wire: OpenAI's Images API with the extensions that image clients know, and the parts' own messages.

Everything that a request may ask for is limited here, before it reaches a queue. Nothing is ignored: a field that is not
listed, or a value that the service does not honour, is refused. (``null`` stands for the default, as with OpenAI.)
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    StrictBool,
    StrictInt,
    StringConstraints,
    Tag,
    ValidationError,
    model_validator,
)

MAX_BODY_BYTES = 4 << 20
MAX_PROMPT = 2000
MAX_ROUTED_PROMPTS = 1024
MAX_STEPS = 200
AUTO, TEACHER = "auto", "teacher"

# Control characters say nothing in a prompt, and halves of UTF-16 pairs are no characters at all.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")


class ApiError(Exception):
    """An answer other than 200, in OpenAI's shape.

    Attributes:
        status: of HTTP.
        body: ``{"error": {"message", "type", "param", "code"}}``.
        headers: to send along.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str | None = None,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        kind = type or ("invalid_request_error" if status < 500 else "server_error")
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}
        self.headers = {} if retry_after_s is None else {"Retry-After": str(retry_after_s)}


class Body(BaseModel):
    """Base of request bodies: closed to unknown fields."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def _printable(value: str) -> str:
    found = _UNPRINTABLE.search(value)
    if found:
        raise ValueError(f"character U+{ord(found.group()):04X} at {found.start()} is not text")
    return value


def _says_something(value: str) -> str:
    if not value.strip():
        raise ValueError("the text is blank")
    return _printable(value)


Text = Annotated[str, StringConstraints(strict=True, max_length=MAX_PROMPT), AfterValidator(_printable)]
Prompt = Annotated[str, StringConstraints(strict=True, min_length=1, max_length=MAX_PROMPT), AfterValidator(_says_something)]
# A tagged union tells what is wrong with the side that was meant; a plain one reports on both.
Prompts = Annotated[
    Annotated[Prompt, Tag("one")] | Annotated[list[Prompt], Field(min_length=1, max_length=256), Tag("many")],
    Discriminator(lambda value: "many" if isinstance(value, list) else "one"),
]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]


class ImageGeneration(Body):
    """Body of POST /v1/images/generations; absent sampling fields take the run's defaults."""

    prompt: Prompts = Field(description="what to draw; several prompts are answered in order, n images each")
    model: Annotated[str, StringConstraints(strict=True, max_length=200)] = Field(
        AUTO, description="auto: the expert that the prompt needs; or an id of GET /v1/models"
    )
    n: Annotated[StrictInt, Field(ge=1, le=10)] = Field(1, description="images of each prompt")
    size: Annotated[str, StringConstraints(strict=True, max_length=20)] = Field(
        AUTO, description="WIDTHxHEIGHT, one of those in GET /v1/models; auto: the run's"
    )
    response_format: Literal["b64_json", "url"] = Field("b64_json", description="url: where the service has a storage")
    output_format: Literal["png", "jpeg", "webp"] = "png"
    output_compression: Annotated[StrictInt, Field(ge=0, le=100)] = Field(100, description="quality of jpeg and webp")
    stream: StrictBool = Field(False, description="answer with server-sent events")
    partial_images: Annotated[StrictInt, Field(ge=0, le=3)] = Field(0, description="previews of each image; needs stream")
    user: Annotated[str, StringConstraints(strict=True, max_length=256)] | None = Field(
        None, description="the client's own label; changes nothing in the image"
    )
    negative_prompt: Text = Field("", description="what guidance steers away from")
    num_inference_steps: Annotated[StrictInt, Field(ge=1, le=MAX_STEPS)] | None = None
    guidance_scale: Annotated[Number, Field(ge=0.0, le=20.0)] | None = Field(None, description="no guidance at 1 or less")
    seed: Annotated[StrictInt, Field(ge=0, le=2**63 - 1)] | None = Field(
        None, description="image i of a prompt is drawn from (seed, i); null: a random one, which the answer tells"
    )
    timeout: Annotated[Number, Field(gt=0.0)] | None = Field(
        None, description="seconds until the request is given up with 504; the header X-Request-Timeout says the same"
    )

    @property
    def prompts(self) -> list[str]:
        return [self.prompt] if isinstance(self.prompt, str) else self.prompt

    @model_validator(mode="after")
    def _previews_are_streamed(self) -> ImageGeneration:
        if self.partial_images and not self.stream:
            raise ValueError("partial_images: previews come as events; send stream: true, too")
        return self


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
        names = [str(part) for part in first["loc"] if first["loc"][0] != "prompt" or part not in ("one", "many")]
        # A name that the client made up goes into the message: keep it short and printable.
        param = ".".join(names)[:100].encode("ascii", "backslashreplace").decode()
        text = first["msg"].removeprefix("Value error, ")
        if not param and ":" in text:  # of a check of the whole body, which names the field itself
            param = text.split(":")[0]
        message = text if text.startswith(f"{param}:") else f"{param}: {text}"
        if first["type"] == "extra_forbidden":
            message = f"unknown field {param!r}; known: {', '.join(kind.model_fields)}"
        raise ApiError(400, message, param=param, code=_CODES.get(first["type"], "invalid_value")) from error


@dataclass(frozen=True)
class DrawJob:
    """A validated request on its way through router and expert.

    Attributes:
        id: unique; names the job when it is cancelled.
        expert: number of the pinned expert (the teacher's comes after the last); None: the router decides.
        size: (width, height) in pixels; None: the run's.
        deadline: ``time.time()`` after which the job is dropped, with status 504.
        partial_images: previews of each image before its end, 0 to 3.
    """

    id: str
    prompt: str
    negative_prompt: str
    n: int
    seed: int
    num_inference_steps: int
    guidance_scale: float
    expert: int | None = None
    size: tuple[int, int] | None = None
    deadline: float | None = None
    partial_images: int = 0


@dataclass(frozen=True)
class Timings:
    """Where a job's time went: waiting for a place, denoising, decoding, in milliseconds.

    Attributes:
        batch_size: mean number of images in the UNet call over the job's steps.
    """

    queue_ms: float
    denoise_ms: float
    decode_ms: float
    batch_size: float


@dataclass(frozen=True)
class Partial:
    """A preview of an image that is still being denoised.

    Attributes:
        id: of the job.
        index: of the image within its job.
        number: of the preview, from 0.
        image: [height, width, 3] uint8.
    """

    id: str
    index: int
    number: int
    image: np.ndarray


@dataclass(frozen=True)
class Outcome:
    """What became of a job: images [height, width, 3] uint8, or why there are none.

    Attributes:
        status: HTTP status of a failure.
        timings: of a job that was drawn.
        retry_after_s: of a job for which there was no room.
    """

    id: str
    images: list[np.ndarray] = field(default_factory=list)
    error: str | None = None
    status: int = 200
    timings: Timings | None = None
    retry_after_s: int | None = None


@dataclass(frozen=True)
class Placed:
    """Where a job goes; the router says so before the first preview.

    Attributes:
        expert: number of the expert that draws it; the teacher comes after the last.
        similarity: of the prompt with every code; None: the request named its model.
        scores: similarities plus the prices that balance the experts' shares; the highest is the router's choice.
        spilled_from: the expert that routing had chosen, if another draws the job.
        text_tokens: of prompt and negative prompt.
    """

    expert: int
    similarity: list[float] | None = None
    scores: list[float] | None = None
    spilled_from: int | None = None
    text_tokens: int = 0


@dataclass(frozen=True)
class Drawn:
    """A job's outcome together with where it was drawn."""

    outcome: Outcome
    placed: Placed


class Overloaded(Exception):
    """No room for another job; says after how many seconds there may be."""

    def __init__(self, what: str, retry_after_s: int) -> None:
        super().__init__(what, retry_after_s)  # both, so that the error survives pickling
        self.what, self.retry_after_s = what, retry_after_s
