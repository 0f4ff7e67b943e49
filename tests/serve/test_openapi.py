"""The service against its own OpenAPI document: schemathesis makes requests from it, good and bad, and judges the answers."""

from __future__ import annotations

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

CHECKS = [
    not_a_server_error, status_code_conformance, content_type_conformance, response_headers_conformance,
    response_schema_conformance, unsupported_method,
]  # fmt: skip


@pytest.mark.parametrize("mode", list(GenerationMode))
def test_no_request_makes_the_service_stumble(address: str, mode: GenerationMode) -> None:
    """Requests that keep to the document, and requests that break it in one place or more."""
    document = schemathesis.openapi.from_url(f"{address}/openapi.json")
    asked = 0
    for found in document.get_all_operations():
        operation = found.ok()
        if mode is GenerationMode.NEGATIVE and not operation.body:
            continue  # nothing to break: any text is a path

        @settings(max_examples=40, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
        @given(case=operation.as_strategy(generation_mode=mode))
        def stumble(case: schemathesis.Case) -> None:
            nonlocal asked
            asked += 1
            _be_patient(case)
            case.call_and_validate(checks=CHECKS, timeout=60)

        stumble()
    assert asked > 40


def _be_patient(case: schemathesis.Case) -> None:
    """A deadline that cannot be kept is rightly a 504, and what is drawn shall not take minutes."""
    if isinstance(case.body, dict):
        timeout = case.body.get("timeout")
        if isinstance(timeout, int | float) and 0 < timeout < 60:
            case.body["timeout"] = 60
        for field, most in (("num_inference_steps", 3), ("n", 2)):
            if type(case.body.get(field)) is int and 1 <= case.body[field] <= 200:
                case.body[field] = min(case.body[field], most)
    for name in [name for name in case.headers or {} if name.lower() == "x-request-timeout"]:
        del case.headers[name]


def test_the_document_names_the_bounds_of_this_run(client: httpx.Client) -> None:
    document = client.get("/openapi.json").json()
    body = document["components"]["schemas"]["ImageGeneration"]
    assert body["additionalProperties"] is False and body["required"] == ["prompt"]
    fields = body["properties"]
    assert fields["size"]["anyOf"][0]["enum"] == ["auto", "16x16"]
    assert fields["model"]["anyOf"][0]["enum"] == ["auto", "expert-0", "expert-1"]
    assert fields["response_format"]["anyOf"][0]["enum"] == ["b64_json"]
    assert set(document["paths"]) == {
        "/v1/images/generations", "/v1/route", "/v1/models", "/v1/models/{model}", "/health", "/ready",
    }  # fmt: skip
    assert "security" not in document["paths"]["/v1/models"]["get"]
