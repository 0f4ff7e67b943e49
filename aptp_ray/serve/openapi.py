"""The OpenAPI document of a service: what it takes and gives, under the bounds of this very run."""

from __future__ import annotations

from importlib import metadata
from typing import Any

from aptp_ray.serve.catalog import Catalog, size_text
from aptp_ray.serve.protocol import AUTO, MAX_BODY_BYTES, ImageGeneration, RouteQuery

_TEXT = {"type": "string"}
_NUMBER = {"type": "number"}
_COUNT = {"type": "integer", "minimum": 0}
_NULLABLE = {"type": ["number", "null"]}
_REASONS = {
    400: "A field, its value or the JSON is wrong; `param` names the field.",
    401: "The service has keys, and none of them was sent.",
    404: "There is no such model.",
    413: f"The body is over {MAX_BODY_BYTES} bytes.",
    415: "The body's type is not application/json.",
    503: "Too many requests are waiting; Retry-After says when to come again.",
    504: "The request's deadline has passed.",
}


def document(catalog: Catalog, *, keys: bool) -> dict[str, Any]:
    """Returns the document, OpenAPI 3.1.

    Args:
        catalog: of the service.
        keys: whether calls must carry a key.
    """
    closed: list[dict[str, Any]] = [{"key": []}] if keys else []
    refused = [401] if keys else []
    paths: dict[str, Any] = {
        "/v1/images/generations": {
            "post": _operation(
                "Draws images: each prompt by the expert that it needs.",
                _generated(),
                body="ImageGeneration",
                errors=[400, *refused, 404, 413, 415, 503, 504],
                security=closed,
                parameters=[
                    {
                        "name": "X-Request-Timeout",
                        "in": "header",
                        "description": "Seconds until the request is given up.",
                        "schema": {"type": "number", "exclusiveMinimum": 0, "maximum": catalog.timeout_s},
                    }
                ],
            )
        },
        "/v1/route": {
            "post": _operation(
                "Says which expert each prompt needs, and why, without drawing.",
                _json("Routes"),
                body="RouteQuery",
                errors=[400, *refused, 413, 415, 503, 504],
                security=closed,
            )
        },
        "/v1/models": {"get": _operation("Lists the mixture and each expert.", _json("Models"), errors=refused, security=closed)},
        "/v1/models/{model}": {
            "get": _operation(
                "Describes one model.",
                _json("Model"),
                errors=[*refused, 404],
                security=closed,
                parameters=[{"name": "model", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}],
            )
        },
        "/health": {"get": _operation("Tells whether the service lives.", _json("Health"))},
        "/ready": {"get": _ready()},
    }
    if catalog.urls:
        paths["/v1/images/files/{name}"] = {"get": _file()}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": f"aptp_ray: {catalog.name}",
            "version": metadata.version("aptp-ray"),
            "description": "Text to image by a mixture of pruned experts, in the shape of OpenAI's Images API.",
        },
        "paths": paths,
        "components": {
            "schemas": _schemas(catalog),
            **({"securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}} if keys else {}),
        },
    }


def _operation(
    summary: str,
    content: dict[str, Any],
    *,
    body: str | None = None,
    errors: list[int] | None = None,
    security: list[dict[str, Any]] | None = None,
    parameters: list[dict[str, Any]] | None = None,
) -> dict[str, Any]:
    operation: dict[str, Any] = {"summary": summary, "responses": {"200": {"description": "Done.", "content": content}}}
    for status in errors or []:
        answer: dict[str, Any] = {"description": _REASONS[status], "content": _json("Error")}
        if status == 503:
            answer["headers"] = {"Retry-After": {"schema": _COUNT, "description": "In seconds."}}
        operation["responses"][str(status)] = answer
    if body:
        operation["requestBody"] = {"required": True, "content": _json(body)}
    if security:
        operation["security"] = security
    if parameters:
        operation["parameters"] = parameters
    return operation


def _json(name: str) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": f"#/components/schemas/{name}"}}}


def _generated() -> dict[str, Any]:
    events = "Events image_generation.partial_image, image_generation.completed and error, with stream: true."
    return _json("Images") | {"text/event-stream": {"schema": _TEXT | {"description": events}}}


def _ready() -> dict[str, Any]:
    operation = _operation("Tells whether every part of the service answers.", _json("Readiness"))
    operation["responses"]["503"] = {"description": "Not ready; the parts say why.", "content": _json("Readiness")}
    return operation


def _file() -> dict[str, Any]:
    name = {"name": "name", "in": "path", "required": True, "schema": _TEXT}
    operation = _operation("An image that was answered as a URL.", {}, errors=[404], parameters=[name])
    operation["responses"]["404"]["description"] = "There is no such image."
    binary = {"schema": _TEXT | {"contentEncoding": "binary"}}
    operation["responses"]["200"]["content"] = {f"image/{kind}": binary for kind in ("png", "jpeg", "webp")}
    return operation


def _object(required: dict[str, Any], optional: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"type": "object", "properties": required | (optional or {}), "required": list(required)}


def _list(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items}


def _named(name: str) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/{name}"}


def _schemas(catalog: Catalog) -> dict[str, Any]:
    maybe_text = {"type": ["string", "null"]}
    error = _object({"message": _TEXT, "type": _TEXT, "param": maybe_text, "code": maybe_text})
    model = _object({"id": _TEXT, "object": {"const": "model"}, "created": _COUNT, "owned_by": _TEXT, "aptp": {"type": "object"}})
    route = _object(
        {
            "index": _COUNT,
            "expert": _COUNT,
            "model": _TEXT,
            "macs_ratio": _NUMBER,
            "similarity": _list(_NUMBER) | {"description": "Cosine of the prompt and each code."},
            "scores": _list(_NUMBER) | {"description": "Similarities plus the prices that balance the experts."},
        }
    )
    listing = {"object": {"const": "list"}}
    return {
        "ImageGeneration": _request(ImageGeneration, catalog),
        "RouteQuery": _request(RouteQuery, catalog),
        "Error": _object({"error": error}),
        "Images": _images(),
        "Drawing": _drawing(),
        "Routes": _object(listing | {"data": _list(route)}),
        "Model": model,
        "Models": _object(listing | {"data": _list(_named("Model"))}),
        "Health": _object({"status": {"const": "ok"}}),
        "Readiness": _object({"status": {"enum": ["ok", "not ready"]}}) | {"additionalProperties": _TEXT},
    }


def _request(kind: type[ImageGeneration] | type[RouteQuery], catalog: Catalog) -> dict[str, Any]:
    """The body's own schema, with what this service makes of it: models, sizes and limits; null stands for the default."""
    schema = kind.model_json_schema()
    fields = schema["properties"]
    if kind is ImageGeneration:
        fields["model"] |= {"enum": catalog.models}
        fields["size"] |= {"enum": [AUTO, catalog.size_text, *map(size_text, catalog.sizes)]}
        fields["response_format"]["enum"] = ["b64_json", "url"] if catalog.urls else ["b64_json"]
        fields["num_inference_steps"]["description"] = f"{catalog.num_inference_steps} by default"
        fields["guidance_scale"]["description"] += f"; {catalog.guidance_scale:g} by default"
        fields["timeout"]["anyOf"][0]["maximum"] = catalog.timeout_s
        fields["n"]["description"] += f"; prompts times n is at most {catalog.max_images}"
    required = schema.get("required", [])
    for name, field in fields.items():
        if name not in required and not any(entry.get("type") == "null" for entry in field.get("anyOf", [])):
            default, about = field.pop("default", None), field.pop("description", None)
            field.pop("title", None)
            fields[name] = {"anyOf": [dict(field), {"type": "null"}], "default": default}
            if about:
                fields[name]["description"] = about
    return schema


def _images() -> dict[str, Any]:
    tokens = _object({"text_tokens": _COUNT, "image_tokens": _COUNT})
    usage = _object(
        {
            "input_tokens": _COUNT | {"description": "Tokens that the text encoder reads."},
            "input_tokens_details": tokens,
            "output_tokens": _COUNT | {"description": "Latent positions of the images."},
            "output_tokens_details": tokens,
            "total_tokens": _COUNT,
        }
    )
    shared = {"experts": _COUNT, "num_inference_steps": _COUNT, "guidance_scale": _NUMBER, "seconds": _NUMBER}
    several = _object({"results": _list(_named("Drawing"))} | shared)
    return _object(
        {
            "created": _COUNT,
            "data": _list(_object({"revised_prompt": {"type": "null"}}, {"b64_json": _TEXT, "url": _TEXT})),
            "output_format": {"enum": ["png", "jpeg", "webp"]},
            "size": _TEXT,
            "usage": usage,
            "aptp": {"anyOf": [{"allOf": [_named("Drawing"), _object(shared)]}, several]},
        }
    )


def _drawing() -> dict[str, Any]:
    return _object(
        {
            "model": _TEXT,
            "expert": {"type": ["integer", "null"], "description": "Null: the teacher."},
            "routed": {"type": "boolean", "description": "False: the request named its model."},
            "similarity": {"anyOf": [_list(_NUMBER), {"type": "null"}]},
            "scores": {"anyOf": [_list(_NUMBER), {"type": "null"}]},
            "macs_ratio": _NUMBER,
            "spilled": {"type": "boolean", "description": "The expert of `spilled_from` was too busy."},
            "spilled_from": {"type": ["string", "null"]},
            "seeds": _list(_object({"seed": _COUNT, "index": _COUNT})),
            "queue_ms": _NULLABLE,
            "denoise_ms": _NULLABLE,
            "decode_ms": _NULLABLE,
            "batch_size": _NULLABLE | {"description": "Mean images in the UNet call."},
        }
    )
