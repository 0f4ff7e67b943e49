"""The HTTP side: validates, asks the router, answers in OpenAI's shape.

No postponed annotations here: Serve ships the ingress class by value, where FastAPI cannot resolve their names.
"""

import asyncio
import json
import logging
import time
import uuid
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from ray import serve
from ray.serve.exceptions import BackPressureError
from ray.serve.handle import DeploymentHandle
from starlette.exceptions import HTTPException

from aptp_ray.serve.protocol import (
    MAX_BODY_BYTES,
    ApiError,
    Catalog,
    Drawn,
    ImageGeneration,
    RouteQuery,
    encode_image,
    make_job,
    parse_body,
)

logger = logging.getLogger("ray.serve")
_HEALTH_TIMEOUT_S = 20.0

app = FastAPI(title="aptp_ray", openapi_url=None, docs_url=None, redoc_url=None)


@app.exception_handler(ApiError)
async def _api_error(request: Request, error: ApiError) -> JSONResponse:
    headers = {"Retry-After": "1"} if error.status in (429, 503) else None
    return JSONResponse(error.body, status_code=error.status, headers=headers)


@app.exception_handler(HTTPException)
async def _http_error(request: Request, error: HTTPException) -> JSONResponse:
    message = f"{request.method} {request.url.path}: {error.detail}"
    code = "not_found" if error.status_code == 404 else None
    body = ApiError(error.status_code, message, code=code).body
    return JSONResponse(body, status_code=error.status_code, headers=error.headers)


@app.exception_handler(Exception)
async def _unforeseen(request: Request, error: Exception) -> JSONResponse:
    # The traceback goes to the replica's log; a client gets no internals.
    logger.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return JSONResponse(ApiError(500, "internal error; see the service's log", type="server_error").body, status_code=500)


async def _read_json(request: Request) -> Any:
    """Raises: ApiError: 413 for a body over the limit, 400 for one that is not JSON."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise ApiError(413, f"the body is over {MAX_BODY_BYTES} bytes", code="body_too_large")
    try:
        return json.loads(bytes(body))
    except (ValueError, RecursionError) as error:
        raise ApiError(400, "the body is not JSON", code="invalid_body") from error


@serve.ingress(app)
class Ingress:
    """The deployment that the proxies call."""

    def __init__(self, catalog: Catalog, router: DeploymentHandle) -> None:
        self._catalog, self._router = catalog, router

    @app.post("/v1/images/generations")
    async def generate(self, request: Request) -> JSONResponse:
        body = parse_body(ImageGeneration, await _read_json(request))
        job = make_job(body, self._catalog, uuid.uuid4().hex)
        begun = time.perf_counter()
        drawn: Drawn = await self._call("draw", job)
        if drawn.outcome.error is not None:
            kind = "invalid_request_error" if drawn.outcome.status == 400 else "server_error"
            raise ApiError(drawn.outcome.status, drawn.outcome.error, type=kind)
        seconds = time.perf_counter() - begun
        images = await asyncio.gather(  # encoding would hold up the event loop
            *(asyncio.to_thread(encode_image, i, body.output_format, body.output_compression) for i in drawn.outcome.images)
        )
        return JSONResponse(
            {
                "created": int(time.time()),
                "data": [{"b64_json": image, "revised_prompt": None} for image in images],
                "output_format": body.output_format,
                "size": self._catalog.size_text,
                "aptp": {
                    "expert": drawn.expert,
                    "experts": len(self._catalog.experts),
                    "routed": job.expert is None,
                    "macs_ratio": self._catalog.experts[drawn.expert]["macs_ratio"],
                    "similarity": drawn.similarity,
                    # Image i is drawn from (seed, i): the same request with this seed gives the same images.
                    "seeds": [{"seed": job.seed, "index": index} for index in range(job.n)],
                    "num_inference_steps": job.num_inference_steps,
                    "guidance_scale": job.guidance_scale,
                    "seconds": round(seconds, 4),
                },
            }
        )

    @app.post("/v1/route")
    async def route(self, request: Request) -> JSONResponse:
        query = parse_body(RouteQuery, await _read_json(request))
        experts, similarity = await self._call("route", query.prompts)
        entries = zip(experts, similarity, strict=True)
        data = [{"index": i, "expert": e, "model": f"expert-{e}", "similarity": s} for i, (e, s) in enumerate(entries)]
        return JSONResponse({"object": "list", "data": data})

    @app.get("/v1/models")
    async def models(self) -> JSONResponse:
        return JSONResponse(self._catalog.models())

    @app.get("/health")
    async def health(self) -> JSONResponse:
        try:  # a broadcast passes the queue: a busy service is not an ill one
            replicas = await self._router.broadcast("health").results_async(timeout_s=_HEALTH_TIMEOUT_S)
        except Exception as error:
            logger.warning("the router did not answer a health check: %r", error)
            replicas = []
        parts = {name: state for replica in replicas for name, state in replica.items()} or {"router": "no answer"}
        healthy = all(state == "ok" for state in parts.values())
        return JSONResponse({"status": "ok" if healthy else "unhealthy", **parts}, status_code=200 if healthy else 503)

    async def _call(self, method: str, argument: Any) -> Any:
        try:
            return await getattr(self._router, method).remote(argument)
        except BackPressureError as error:
            message = "too many requests are waiting; try again"
            raise ApiError(503, message, type="server_error", code="overloaded") from error
