"""The HTTP side: validates, asks the router, answers in OpenAI's shape.

No postponed annotations here: Serve ships the ingress class by value, where FastAPI cannot resolve their names.
"""

import asyncio
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import aclosing
from importlib import resources
from typing import Any

import numpy as np
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.exceptions import HTTPException

from aptp_ray.sections import Serve
from aptp_ray.serve import answers
from aptp_ray.serve.access import AccessLog, ApiKeys
from aptp_ray.serve.calls import RouterCalls
from aptp_ray.serve.catalog import Catalog, make_jobs
from aptp_ray.serve.images import ImageStore, encode_image, in_base64
from aptp_ray.serve.openapi import document
from aptp_ray.serve.protocol import (
    MAX_BODY_BYTES,
    ApiError,
    DrawJob,
    Drawn,
    ImageGeneration,
    Partial,
    Placed,
    RouteQuery,
    parse_body,
)

logger = logging.getLogger("ray.serve")

_PAGE = {"index.html": "text/html", "style.css": "text/css", "script.js": "text/javascript"}
# Bytes of pixels that are encoded in less time than it takes to hand them to another thread and back.
_SMALL_IMAGE = 64 * 64 * 3
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data: blob:; frame-ancestors 'none'; base-uri 'none'",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}

app = FastAPI(title="aptp_ray", openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
app.add_middleware(AccessLog)


@app.exception_handler(ApiError)
async def _api_error(request: Request, error: ApiError) -> JSONResponse:
    return JSONResponse(error.body, status_code=error.status, headers=error.headers)


@app.exception_handler(HTTPException)
async def _http_error(request: Request, error: HTTPException) -> JSONResponse:
    path = request.url.path[:200].encode("ascii", "backslashreplace").decode()
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
    body = ApiError(error.status_code, f"{request.method} {path}: {error.detail}", code=code).body
    return JSONResponse(body, status_code=error.status_code, headers=error.headers)


@app.exception_handler(Exception)
async def _unforeseen(request: Request, error: Exception) -> JSONResponse:
    # The traceback goes to the replica's log; a client gets no internals.
    logger.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return JSONResponse(ApiError(500, "internal error; see the service's log").body, status_code=500)


def _not_a_number(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


async def _read_json(request: Request) -> Any:
    """Raises: ApiError: 415 for another type of content, 413 for a body over the limit, 400 for one that is not JSON."""
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind != "application/json":
        shown = kind[:100].encode("ascii", "backslashreplace").decode() or "nothing"
        raise ApiError(415, f"the content type is {shown!r}; send application/json", code="unsupported_media_type")
    too_large = ApiError(413, f"the body is over {MAX_BODY_BYTES} bytes", code="body_too_large")
    length = request.headers.get("content-length", "")
    if length.isdigit() and (len(length) > 12 or int(length) > MAX_BODY_BYTES):
        raise too_large
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise too_large
    try:
        return json.loads(body.decode("utf-8"), parse_constant=_not_a_number)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, "the body is not JSON in UTF-8", code="invalid_body") from error


def _timeout(request: Request) -> float | None:
    """Returns the seconds that the header X-Request-Timeout gives the request."""
    text = request.headers.get("x-request-timeout")
    if text is None:
        return None
    try:
        return float(text)
    except ValueError as error:
        message = "the header X-Request-Timeout is no number of seconds"
        raise ApiError(400, message, param="timeout", code="invalid_value") from error


@serve.ingress(app)
class Ingress:
    """The deployment that the proxies call."""

    def __init__(self, catalog: Catalog, options: Serve, storage_options: dict[str, Any], router: DeploymentHandle) -> None:
        self._catalog, self._public_url = catalog, (options.public_url or "").rstrip("/")
        self._calls = RouterCalls(router, options.retries)
        self._keys = ApiKeys(options.api_keys) if options.api_keys else None
        self._store = ImageStore(options.url_storage, storage_options) if options.url_storage else None
        self._document = document(catalog, keys=self._keys is not None)
        web = resources.files("aptp_ray.serve") / "web"
        self._page = {name: (web / name).read_bytes() for name in _PAGE}

    # -- drawing ---------------------------------------------------------------------------------------------------------

    @app.post("/v1/images/generations")
    async def generate(self, request: Request) -> Response:
        self._authorize(request)
        begun = time.perf_counter()
        body = parse_body(ImageGeneration, await _read_json(request))
        jobs = make_jobs(body, self._catalog, uuid.uuid4().hex, _timeout(request))
        if body.stream:
            return await self._stream(request, body, jobs)
        tasks = [asyncio.ensure_future(self._calls.draw(job)) for job in jobs]
        try:
            drawn = await asyncio.gather(*tasks)
        finally:
            for task in tasks:  # one that fails takes the others along
                task.cancel()
        seconds = time.perf_counter() - begun
        self._note(request, [entry.placed for entry in drawn])
        images = [image for entry in drawn for image in entry.outcome.images]
        data = await asyncio.gather(*(self._image(request, body, image) for image in images))
        entries = [entry | {"revised_prompt": None} for entry in data]
        return JSONResponse(answers.generation(body, jobs, drawn, entries, self._catalog, seconds))

    async def _stream(self, request: Request, body: ImageGeneration, jobs: list[DrawJob]) -> Response:
        """Answers with events. What fails before all jobs have their places is still answered with its status."""
        items: asyncio.Queue[tuple[int, Placed | Partial | Drawn | ApiError]] = asyncio.Queue()
        tasks = [asyncio.ensure_future(self._collect(number, job, items)) for number, job in enumerate(jobs)]
        placed: dict[int, Placed] = {}
        early: list[tuple[int, Partial | Drawn | ApiError]] = []
        try:
            while len(placed) < len(jobs):
                number, item = await items.get()
                if isinstance(item, ApiError):
                    raise item
                if isinstance(item, Placed):
                    placed[number] = item
                else:  # of a prompt that was quicker than the others
                    early.append((number, item))
        except BaseException:
            for task in tasks:
                task.cancel()
            raise
        self._note(request, list(placed.values()))

        async def events() -> AsyncIterator[bytes]:
            left = len(jobs)
            try:
                while left:
                    number, item = early.pop(0) if early else await items.get()
                    assert not isinstance(item, Placed)  # all of them were first
                    if isinstance(item, ApiError):
                        yield answers.server_sent("error", {"type": "error", **item.body})
                        return
                    left -= isinstance(item, Drawn)
                    async for event in self._events(request, body, number, jobs[number], placed[number], item):
                        yield event
            finally:
                for task in tasks:
                    task.cancel()

        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        return StreamingResponse(events(), media_type="text/event-stream", headers=headers)

    async def _collect(self, number: int, job: DrawJob, items: asyncio.Queue[Any]) -> None:
        try:
            async with aclosing(self._calls.stream(job)) as stream:
                async for item in stream:
                    items.put_nowait((number, item))
        except ApiError as error:
            items.put_nowait((number, error))
        except Exception as error:
            logger.error("a stream failed", exc_info=error)
            items.put_nowait((number, ApiError(500, "internal error; see the service's log")))

    async def _events(
        self, request: Request, body: ImageGeneration, number: int, job: DrawJob, placed: Placed, item: Partial | Drawn
    ) -> AsyncIterator[bytes]:
        where = {"prompt_index": number}
        if isinstance(item, Partial):
            image = {"b64_json": in_base64(await self._encoded(item.image, body.output_format, 80))}
            extra = {"aptp": where | {"image_index": item.index} | answers.placing(job, placed, self._catalog)}
            yield answers.image_event(body, job, image, self._catalog, extra, item)
            return
        known = answers.facts(job, item, self._catalog)
        for index, pixels in enumerate(item.outcome.images):
            extra = {
                "aptp": where | {"image_index": index, "experts": len(self._catalog.experts)} | known,
                "usage": answers.usage([job], [placed], self._catalog),
            }
            yield answers.image_event(body, job, await self._image(request, body, pixels), self._catalog, extra, None)

    async def _image(self, request: Request, body: ImageGeneration, pixels: np.ndarray) -> dict[str, str]:
        data = await self._encoded(pixels, body.output_format, body.output_compression)
        if body.response_format == "b64_json" or self._store is None:
            return {"b64_json": in_base64(data)}
        name = await asyncio.to_thread(self._store.put, data, body.output_format)  # which may be far away
        return {"url": f"{self._public_url or str(request.base_url).rstrip('/')}/v1/images/files/{name}"}

    @staticmethod
    async def _encoded(pixels: np.ndarray, output_format: str, compression: int) -> bytes:
        if pixels.size <= _SMALL_IMAGE:
            return encode_image(pixels, output_format, compression)
        # In a thread: it would hold up the event loop.
        return await asyncio.to_thread(encode_image, pixels, output_format, compression)

    @app.get("/v1/images/files/{name}")
    async def file(self, name: str) -> Response:
        data = await asyncio.to_thread(self._store.get, name) if self._store is not None else None
        if data is None:
            raise ApiError(404, "there is no such image", code="not_found")
        kind = f"image/{name.rpartition('.')[2]}"
        return Response(data, media_type=kind, headers={"Cache-Control": "private, max-age=31536000, immutable"})

    # -- what there is ---------------------------------------------------------------------------------------------------

    @app.post("/v1/route")
    async def route(self, request: Request) -> Response:
        self._authorize(request)
        query = parse_body(RouteQuery, await _read_json(request))
        found = await self._calls.route(query.prompts, time.time() + self._catalog.timeout_s)
        return JSONResponse(answers.routes(found, self._catalog))

    @app.get("/v1/models")
    async def models(self, request: Request) -> Response:
        self._authorize(request)
        return JSONResponse(self._catalog.listing())

    @app.get("/v1/models/{model}")
    async def model(self, request: Request, model: str) -> Response:
        self._authorize(request)
        return JSONResponse(self._catalog.model(model))

    @app.get("/health")
    async def health(self) -> Response:
        return JSONResponse({"status": "ok"})

    @app.get("/ready")
    async def ready(self) -> Response:
        parts = await self._calls.health()
        ready = all(state in ("ok", "idle") for state in parts.values())
        return JSONResponse({"status": "ok" if ready else "not ready", **parts}, status_code=200 if ready else 503)

    @app.get("/openapi.json")
    async def openapi(self) -> Response:
        return JSONResponse(self._document)

    @app.get("/")
    async def page(self) -> Response:
        return self._static("index.html")

    @app.get("/web/{name}")
    async def asset(self, name: str) -> Response:
        return self._static(name)

    def _static(self, name: str) -> Response:
        if name not in _PAGE:
            raise ApiError(404, "there is no such file", code="not_found")
        return Response(self._page[name], media_type=_PAGE[name], headers=_PAGE_HEADERS)

    def _authorize(self, request: Request) -> None:
        if self._keys is not None and not self._keys.admits(request.headers.get("authorization")):
            error = ApiError(401, "send one of the service's keys: Authorization: Bearer KEY", code="invalid_api_key")
            error.headers["WWW-Authenticate"] = "Bearer"
            raise error

    def _note(self, request: Request, placed: list[Placed]) -> None:
        request.state.facts["model"] = ",".join(sorted({self._catalog.model_of(entry.expert) for entry in placed}))
