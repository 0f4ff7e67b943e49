"""The service as the official ``openai`` client sees it: nothing of ours on the client's side."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from PIL import Image


@pytest.fixture(scope="module")
def official(address: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{address}/v1", api_key="any", max_retries=0, timeout=60) as client:
        yield client


def _pixels(text: str | None) -> np.ndarray:
    assert text
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB"), dtype=np.int16)


def test_images_are_generated(official: openai.OpenAI) -> None:
    answer = official.images.generate(prompt="a red apple", n=2, size="16x16", output_format="webp", extra_body={"seed": 7})
    assert answer.data is not None and len(answer.data) == 2 and answer.output_format == "webp"
    assert _pixels(answer.data[0].b64_json).shape == (16, 16, 3)
    assert answer.usage is not None and answer.usage.total_tokens == answer.usage.input_tokens + 2 * 64
    facts: dict[str, Any] = answer.aptp  # type: ignore[attr-defined]
    assert facts["model"] == f"expert-{facts['expert']}" and facts["seeds"][1] == {"seed": 7, "index": 1}
    assert not facts["spilled"] and facts["queue_ms"] >= 0 < facts["denoise_ms"] and facts["batch_size"] >= 1


def test_models_are_listed(official: openai.OpenAI) -> None:
    assert [model.id for model in official.models.list()] == ["auto", "expert-0", "expert-1"]
    assert official.models.retrieve("expert-1").id == "expert-1"
    with pytest.raises(openai.NotFoundError):
        official.models.retrieve("dall-e-3")


def test_a_picture_comes_in_with_its_previews(official: openai.OpenAI) -> None:
    request: dict[str, Any] = {"prompt": "green fox", "extra_body": {"seed": 3, "num_inference_steps": 8}}
    events = list(official.images.generate(stream=True, partial_images=3, **request))
    kinds = [event.type for event in events]
    assert kinds == ["image_generation.partial_image"] * 3 + ["image_generation.completed"]
    assert [event.partial_image_index for event in events[:3]] == [0, 1, 2]  # type: ignore[union-attr]
    whole = official.images.generate(**request)
    assert whole.data is not None
    final = _pixels(events[-1].b64_json)
    assert np.abs(final - _pixels(whole.data[0].b64_json)).max() <= 1
    # A preview is the way to the picture, not the picture: nearer with every one.
    errors = [np.abs(_pixels(event.b64_json) - final).mean() for event in events[:3]]
    assert errors[0] > errors[2] > 0
    assert events[-1].usage.output_tokens == 64  # type: ignore[union-attr]
    assert events[0].size == "16x16" and events[0].output_format == "png"


def test_without_previews_a_stream_holds_the_picture_alone(official: openai.OpenAI) -> None:
    events = list(official.images.generate(prompt="sky", stream=True))
    assert [event.type for event in events] == ["image_generation.completed"]


def test_errors_are_the_clients_own(official: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        official.images.generate(prompt="a", size="512x512")
    assert caught.value.param == "size" and caught.value.code == "invalid_value"
    with pytest.raises(openai.NotFoundError) as missing:
        official.images.generate(prompt="a", model="dall-e-3")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="partial_images"):
        official.images.generate(prompt="a", stream=True, partial_images=9)
    with pytest.raises(openai.InternalServerError) as late:  # what it makes of every status from 500
        official.images.generate(prompt="a", extra_body={"num_inference_steps": 200, "n": 10, "timeout": 0.05})
    assert late.value.status_code == 504


def test_a_failure_in_a_stream_is_an_event_that_the_client_raises(official: openai.OpenAI) -> None:
    body = {"num_inference_steps": 200, "n": 10, "timeout": 1.0}
    with pytest.raises(openai.APIError, match="deadline|late|time"):
        for _ in official.images.generate(prompt="a", stream=True, partial_images=1, extra_body=body):
            pass


def test_a_batch_of_prompts_is_answered_in_order(client: httpx.Client) -> None:
    prompts = ["a red apple", "green fox", "two plums", "?"]
    body = {"seed": 5, "num_inference_steps": 3, "n": 2}
    answer = client.post("/v1/images/generations", json={"prompt": prompts, **body}).json()
    assert len(answer["data"]) == 8 and len(answer["aptp"]["results"]) == 4 and "expert" not in answer["aptp"]
    for index, prompt in enumerate(prompts):
        alone = client.post("/v1/images/generations", json={"prompt": prompt, **body}).json()
        for n in range(2):
            difference = _pixels(alone["data"][n]["b64_json"]) - _pixels(answer["data"][2 * index + n]["b64_json"])
            assert np.abs(difference).max() <= 1
        assert alone["aptp"]["expert"] == answer["aptp"]["results"][index]["expert"]


def test_a_stream_of_several_prompts_says_which_picture_is_whose(client: httpx.Client) -> None:
    body = {"prompt": ["a red apple", "two plums"], "n": 2, "stream": True, "partial_images": 1, "seed": 5}
    with client.stream("POST", "/v1/images/generations", json=body) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        events = [json.loads(line[6:]) for line in answer.iter_lines() if line.startswith("data: ")]
    for kind in ("partial_image", "completed"):
        found = [e["aptp"] for e in events if e["type"] == f"image_generation.{kind}"]
        assert {(facts["prompt_index"], facts["image_index"]) for facts in found} == {(p, i) for p in (0, 1) for i in (0, 1)}
        assert len(found) == 4
