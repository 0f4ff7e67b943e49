"""The service over real HTTP: what it draws, whom it refuses, and what it survives."""

from __future__ import annotations

import base64
import io
import json
import re
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import ray
from PIL import Image
from ray import serve

from aptp_ray.core.components import load_components, load_unet
from aptp_ray.core.router import PromptRouter
from aptp_ray.core.sampler import Sampler
from aptp_ray.serve.run import APP_NAME, ServeError, describe, start

URL = "/v1/images/generations"
JSON = {"content-type": "application/json"}
PROMPTS = ["a red apple", "flat icon of the sky", "green fox", "a brown dog", "a dragon eats a train", "two plums", "?"]


def _pixels(entry: dict[str, Any]) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(entry["b64_json"]))).convert("RGB"), dtype=np.int16)


def _draw(client: httpx.Client, **body: Any) -> dict[str, Any]:
    answer = client.post(URL, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_an_image_is_what_the_routed_expert_draws_offline(client: httpx.Client, run_dir: Path) -> None:
    answer = _draw(client, prompt="a red apple", seed=5, guidance_scale=2.5, num_inference_steps=3)
    assert set(answer) == {"created", "data", "output_format", "size", "usage", "aptp"}
    assert answer["data"][0]["revised_prompt"] is None and answer["output_format"] == "png" and answer["size"] == "16x16"
    facts = answer["aptp"]
    assert answer["usage"]["output_tokens"] == 8 * 8 and answer["usage"]["input_tokens"] == 5  # with [CLS] and [SEP]
    assert facts["seeds"] == [{"seed": 5, "index": 0}] and facts["seconds"] > 0 and facts["routed"]
    unet = load_unet(run_dir / "experts" / str(facts["expert"]))
    sampler = Sampler.from_components(unet, load_components(run_dir / "teacher"), scheduler="DDIMScheduler")
    offline = sampler.generate(["a red apple"], [5], num_inference_steps=3, guidance_scale=2.5)[0]
    assert np.abs(_pixels(answer["data"][0]) - np.asarray(offline, dtype=np.int16)).max() <= 1  # of 255


def test_the_same_seed_gives_the_same_bytes_and_another_another_image(client: httpx.Client) -> None:
    first = _draw(client, prompt="green fox", seed=1)
    assert _draw(client, prompt="green fox", seed=1)["data"] == first["data"]
    assert np.abs(_pixels(_draw(client, prompt="green fox", seed=2)["data"][0]) - _pixels(first["data"][0])).max() > 5


def test_company_does_not_change_an_image(client: httpx.Client) -> None:
    bodies = [{"prompt": p, "seed": n, "num_inference_steps": 3 + n} for n, p in enumerate(PROMPTS)]
    alone = [_draw(client, **body) for body in bodies]
    with ThreadPoolExecutor(len(bodies)) as pool:
        together = list(pool.map(lambda body: _draw(client, **body), bodies))
    for one, other in zip(alone, together, strict=True):
        assert one["aptp"]["expert"] == other["aptp"]["expert"]
        # A larger batch sums in another order; rounding to 8 bits may then tip one step.
        assert np.abs(_pixels(one["data"][0]) - _pixels(other["data"][0])).max() <= 1


def test_n_images_differ_and_a_drawn_seed_can_be_used_again(client: httpx.Client) -> None:
    answer = _draw(client, prompt="a red apple", n=3)
    images = [_pixels(entry) for entry in answer["data"]]
    assert min(np.abs(images[a] - images[b]).max() for a, b in ((0, 1), (0, 2), (1, 2))) > 5
    again = _draw(client, prompt="a red apple", n=3, seed=answer["aptp"]["seeds"][0]["seed"])
    assert again["data"] == answer["data"]
    assert _draw(client, prompt="a red apple")["aptp"]["seeds"] != _draw(client, prompt="a red apple")["aptp"]["seeds"]


@pytest.mark.parametrize("output_format", ["jpeg", "webp", "png"])
def test_output_formats(client: httpx.Client, output_format: str) -> None:
    answer = _draw(client, prompt="sky", seed=1, output_format=output_format, output_compression=90, size="16x16", user="me")
    image = Image.open(io.BytesIO(base64.b64decode(answer["data"][0]["b64_json"])))
    assert (image.format, image.size) == (output_format.upper(), (16, 16))


def test_routing_is_that_of_the_router_on_disk(client: httpx.Client, run_dir: Path) -> None:
    offline = PromptRouter.from_pretrained(run_dir / "router").route(PROMPTS)
    answer = client.post("/v1/route", json={"prompts": PROMPTS}).json()
    assert [entry["expert"] for entry in answer["data"]] == offline.expert.tolist()
    assert len(set(offline.expert.tolist())) == 2  # else this test could not tell
    np.testing.assert_allclose([e["similarity"] for e in answer["data"]], offline.similarity.numpy(), atol=1e-5)
    for prompt, expert in zip(PROMPTS[:2], offline.expert.tolist()[:2], strict=True):
        assert _draw(client, prompt=prompt, num_inference_steps=1)["aptp"]["expert"] == expert


def test_a_model_id_pins_an_expert(client: httpx.Client) -> None:
    answers = [_draw(client, prompt="a red apple", seed=3, model=f"expert-{k}") for k in range(2)]
    assert [a["aptp"]["expert"] for a in answers] == [0, 1] and not answers[0]["aptp"]["routed"]
    assert answers[0]["data"] != answers[1]["data"]


def test_models_and_health(client: httpx.Client) -> None:
    models = client.get("/v1/models").json()["data"]
    assert [model["id"] for model in models] == ["auto", "expert-0", "expert-1"]
    assert 0 < models[1]["aptp"]["macs_ratio"] < 1 and models[0]["aptp"]["teacher_macs"] > models[1]["aptp"]["macs"]
    assert client.get("/v1/models/expert-1").json() == models[2]
    unknown = client.get("/v1/models/expert-2")
    assert unknown.status_code == 404 and unknown.json()["error"]["code"] == "model_not_found"
    assert client.get("/health").json() == {"status": "ok"}
    ready = client.get("/ready")
    assert ready.status_code == 200
    assert ready.json() == {"status": "ok", "router": "ok", "expert-0": "ok", "expert-1": "ok"}


BAD: list[tuple[Any, str | None]] = [
    ({}, "prompt"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": "  \n"}, "prompt"),
    ({"prompt": "x" * 2001}, "prompt"),
    ({"prompt": 7}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": ["a", ""]}, "prompt.1"),
    ({"prompt": {"a": 1}}, "prompt"),
    ({"prompt": ["a"] * 33}, "prompt"),
    ({"prompt": ["a"] * 4, "n": 10}, "n"),
    ({"prompt": "nothing\0 here"}, "prompt"),
    ({"prompt": "half \ud83d of a smile"}, "prompt"),
    ({"prompt": "a", "negative_prompt": "\x1b[31m"}, "negative_prompt"),
    ({"prompt": "a", "user": "u" * 257}, "user"),
    ({"prompt": "a", "timeout": 0}, "timeout"),
    ({"prompt": "a", "timeout": 301}, "timeout"),
    ({"prompt": "a", "partial_images": 1}, "partial_images"),
    ({"prompt": "a", "stream": True, "partial_images": 4}, "partial_images"),
    ({"prompt": "a", "output_compression": 101}, "output_compression"),
    ({"prompt": "a", "n\nX: y" * 40: 3}, None),
    ({"prompt": "a", "n": 0}, "n"),
    ({"prompt": "a", "n": 11}, "n"),
    ({"prompt": "a", "n": "2"}, "n"),
    ({"prompt": "a", "n": True}, "n"),
    ({"prompt": "a", "num_inference_steps": 0}, "num_inference_steps"),
    ({"prompt": "a", "num_inference_steps": 201}, "num_inference_steps"),
    ({"prompt": "a", "guidance_scale": -0.1}, "guidance_scale"),
    ({"prompt": "a", "guidance_scale": 20.5}, "guidance_scale"),
    ({"prompt": "a", "seed": -1}, "seed"),
    ({"prompt": "a", "seed": 2**63}, "seed"),
    ({"prompt": "a", "seed": 1.5}, "seed"),
    ({"prompt": "a", "size": "512x512"}, "size"),
    ({"prompt": "a", "response_format": "url"}, "response_format"),
    ({"prompt": "a", "stream": "yes"}, "stream"),
    ({"prompt": "a", "quality": "hd"}, "quality"),
    ({"prompt": "a", "steps": 3}, "steps"),
    ({"prompt": "a", "model": "expert-2"}, "model"),
    ({"prompt": "a", "model": "dall-e-3"}, "model"),
    ([1], None),
    ("prompt", None),
]


@pytest.mark.parametrize(("body", "param"), BAD)
def test_bad_bodies_are_refused_in_the_error_shape(client: httpx.Client, body: Any, param: str | None) -> None:
    answer = client.post(URL, content=json.dumps(body), headers=JSON)
    assert answer.status_code == (404 if param == "model" else 400)
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param or error["code"] == "unknown_parameter"
    assert error["type"] == "invalid_request_error" and error["message"] and error["code"]


@pytest.mark.parametrize(
    ("method", "path", "content", "headers", "status"),
    [
        ("POST", URL, b"{not json", JSON, 400),
        ("POST", URL, b"", JSON, 400),
        ("POST", URL, b'{"prompt": "a", "guidance_scale": NaN}', JSON, 400),
        ("POST", URL, b'{"prompt": "a", "guidance_scale": 1e999}', JSON, 400),
        ("POST", URL, b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", JSON, 400),
        ("POST", URL, b'{"prompt": "a", "seed": ' + b"9" * 400 + b"}", JSON, 400),
        ("POST", URL, b'{"prompt": "\xff\xfe"}', JSON, 400),
        ("POST", URL, '{"prompt": "a"}'.encode("utf-16"), JSON, 400),
        ("POST", URL, b"[" * 100_000, JSON, 400),
        ("POST", URL, b'{"prompt":' * 50_000, JSON, 400),
        ("POST", URL, b'"' + b"a" * (5 << 20) + b'"', JSON, 413),
        ("POST", URL, b'{"prompt": "a"}', {}, 415),
        ("POST", URL, b"prompt=a", {"content-type": "application/x-www-form-urlencoded"}, 415),
        ("POST", URL, b'{"prompt": "a"}', JSON | {"x-request-timeout": "soon"}, 400),
        ("POST", URL, b'{"prompt": "a"}', JSON | {"x-request-timeout": "nan"}, 400),
        ("POST", URL, b'{"prompt": "a"}', JSON | {"x-request-timeout": "-1"}, 400),
        ("POST", "/v1/route", b'{"prompts": []}', JSON, 400),
        ("POST", "/v1/route", b'{"prompts": ["a", 3]}', JSON, 400),
        ("POST", "/v1/route", b'{"prompts": "a"}', JSON, 400),
        ("POST", "/v1/route", json.dumps({"prompts": ["a"] * 1025}).encode(), JSON, 400),
        ("GET", "/v1/images", b"", {}, 404),
        ("GET", "/web/../protocol.py", b"", {}, 404),
        ("GET", "/web/%2e%2e%2fprotocol.py", b"", {}, 404),
        ("GET", "/v1/images/files/0123.png", b"", {}, 404),
        ("GET", URL, b"", {}, 405),
        ("DELETE", "/v1/models", b"", {}, 405),
    ],
)
def test_bad_requests_are_refused_in_the_error_shape(
    client: httpx.Client, method: str, path: str, content: bytes, headers: dict[str, str], status: int
) -> None:
    answer = client.request(method, path, content=content, headers=headers)
    assert answer.status_code == status, answer.text
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize("sent", ["from-the-client-7", None])
def test_an_answer_carries_the_request_id_under_which_it_is_logged(client: httpx.Client, sent: str | None) -> None:
    answer = client.post(URL, json={"prompt": "a red apple"}, headers={"x-request-id": sent} if sent else {})
    name = answer.headers["x-request-id"]
    assert name == sent if sent else len(name) > 8
    logs = Path(ray._private.worker.global_worker.node.get_session_dir_path()) / "logs" / "serve"

    def lines() -> list[dict[str, Any]]:
        texts = [line for file in logs.glob("*ingress*") for line in file.read_text().splitlines() if name in line]
        return [json.loads(line[line.index("{") :]) for line in texts if "access {" in line]

    deadline = time.monotonic() + 10
    while not lines() and time.monotonic() < deadline:
        time.sleep(0.05)
    (line,) = lines()
    assert (line["request_id"], line["path"], line["status"]) == (name, URL, 200)
    assert line["model"] == answer.json()["aptp"]["model"] and line["ms"] > 0


def test_the_service_says_what_it_has_loaded(address: str, run_dir: Path) -> None:
    title, *models = describe(str(run_dir)).splitlines()
    assert "2 experts" in title and "16x16" in title and "open to all" in title
    for number, line in enumerate(models):
        name, rest = line.strip().split(": ")
        ratio, memory = re.fullmatch(r"([\d.]+) of the teacher's MACs; (\d+) MB", rest).groups()  # type: ignore[union-attr]
        assert name == f"expert-{number}" and 0 < float(ratio) < 1 and int(memory) > 50
    assert len(models) == 2


def test_null_stands_for_the_default(client: httpx.Client) -> None:
    facts = _draw(client, prompt="a", n=None, size=None, seed=None, num_inference_steps=None)["aptp"]
    assert facts["num_inference_steps"] == 4 and facts["guidance_scale"] == 3.0


def test_a_port_in_use_is_named(address: str, run_dir: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ServeError, match=rf"{port}.*--port") as caught:
            start(str(run_dir), port=port)
    assert "\n" not in str(caught.value)


def _status(expert: int) -> dict[str, int]:
    return serve.get_deployment_handle(f"expert-{expert}", APP_NAME).status.remote().result(timeout_s=30)


def _wait_until_idle(expert: int) -> dict[str, int]:
    deadline = time.monotonic() + 30
    while (status := _status(expert))["active"]:
        assert time.monotonic() < deadline, f"expert-{expert} is not idle: {status}"
        time.sleep(0.05)
    return status


def test_a_client_that_leaves_frees_its_places_and_hurts_nobody(client: httpx.Client, address: str) -> None:
    body = {"prompt": "a red apple", "model": "expert-1", "num_inference_steps": 200}
    alone = _draw(client, **body, seed=9)
    before = _wait_until_idle(1)
    with ThreadPoolExecutor(3) as pool:

        def leave() -> bool:
            try:
                httpx.post(address + URL, json={**body, "n": 2}, timeout=0.5)
            except httpx.ReadTimeout:
                return True
            return False

        leavers = [pool.submit(leave) for _ in range(2)]
        stays = pool.submit(_draw, client, **body, seed=9)
        assert [leaver.result() for leaver in leavers] == [True, True]
        assert np.abs(_pixels(stays.result()["data"][0]) - _pixels(alone["data"][0])).max() <= 1
    after = _wait_until_idle(1)
    assert after["cancelled"] - before["cancelled"] == 2 and after["done"] - before["done"] == 1
    assert _draw(client, prompt="a", model="expert-1")["data"]


def test_overload_is_refused_with_503_and_what_was_taken_is_drawn(client: httpx.Client) -> None:
    body = {"prompt": "a", "num_inference_steps": 30, "n": 2, "guidance_scale": 1.0}
    with ThreadPoolExecutor(40) as pool:
        answers = list(pool.map(lambda _: client.post(URL, json=body), range(40)))
    codes = [answer.status_code for answer in answers]
    assert set(codes) == {200, 503}
    refused = next(answer for answer in answers if answer.status_code == 503)
    assert refused.json()["error"]["code"] == "overloaded" and refused.headers["retry-after"]
    assert client.get("/health").status_code == 200
    for expert in range(2):
        _wait_until_idle(expert)
