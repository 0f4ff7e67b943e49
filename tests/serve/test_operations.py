"""What the service survives: deadlines, overload, the death of replicas, updates under load, and its own idleness."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray
from ray import serve

from aptp_ray.serve.run import APP_NAME, describe, start, stop, update

URL = "/v1/images/generations"


def replica_pids(deployment: str) -> set[int]:
    """Process ids of a deployment's replicas, on this machine and in this test's cluster."""
    session = ray._private.worker.global_worker.node.session_name
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            title = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if f"ServeReplica:{APP_NAME}:{deployment}" not in title:
                continue
            parent = (process / "stat").read_text().rpartition(")")[2].split()[1]
            if session in Path(f"/proc/{parent}/cmdline").read_bytes().decode(errors="replace"):
                found.add(int(process.name))
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended meanwhile
    return found


def statuses(expert: int) -> list[dict[str, Any]]:
    return serve.get_deployment_handle(f"expert-{expert}", APP_NAME).broadcast("status").results(timeout_s=30)


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {timeout_s} s"
        time.sleep(0.1)


@dataclass
class Traffic:
    """What clients that ask without a pause have got."""

    codes: list[int] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def wait(self, more: int) -> None:
        enough = len(self.codes) + more
        wait_until(lambda: len(self.codes) >= enough or bool(self.wrong), f"{more} answers under load", 120)


@contextmanager
def traffic(address: str, clients: int = 3, **body: Any) -> Iterator[Traffic]:
    """Clients that ask again and again, each for its own prompt; every answer is counted, none is asked for twice."""
    seen, stop = Traffic(), threading.Event()

    def ask(number: int) -> None:
        with httpx.Client(base_url=address, timeout=120) as client:
            while not stop.is_set():
                try:
                    answer = client.post(URL, json={"prompt": f"red apple number {number}", "seed": number} | body)
                except httpx.HTTPError as error:
                    seen.wrong.append(repr(error))
                    continue
                if answer.status_code != 200:
                    seen.wrong.append(answer.text)
                seen.codes.append(answer.status_code)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield seen
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def test_a_deadline_is_kept_and_its_places_are_freed(client: httpx.Client) -> None:
    body = {"prompt": "a", "model": "expert-0", "num_inference_steps": 200, "n": 10}
    begun = time.monotonic()
    answer = client.post(URL, json=body | {"timeout": 0.3})
    assert answer.status_code == 504 and answer.json()["error"]["code"] == "timeout"
    assert time.monotonic() - begun < 5
    assert client.post(URL, json=body, headers={"x-request-timeout": "0.3"}).status_code == 504
    wait_until(lambda: all(s["active"] + s["waiting"] == 0 for s in statuses(0)), "an idle expert", 10)
    assert client.post(URL, json={"prompt": "a", "model": "expert-0", "timeout": 60}).status_code == 200


def test_a_client_that_leaves_a_stream_frees_its_places(client: httpx.Client) -> None:
    wait_until(lambda: all(s["active"] + s["waiting"] == 0 for s in statuses(1)), "an idle expert", 30)
    before = statuses(1)[0]["cancelled"]
    body = {"prompt": "a", "model": "expert-1", "num_inference_steps": 200, "n": 3, "stream": True, "partial_images": 3}
    with client.stream("POST", URL, json=body) as answer:
        next(answer.iter_lines())
    wait_until(lambda: statuses(1)[0]["cancelled"] == before + 1, "a cancelled job", 15)
    wait_until(lambda: all(s["active"] + s["waiting"] == 0 for s in statuses(1)), "an idle expert", 10)


@pytest.mark.parametrize("victim", ["expert-0", "router"])
def test_a_killed_replica_costs_no_request(address: str, victim: str) -> None:
    before = replica_pids(victim)
    assert len(before) == 1
    with traffic(address, model="expert-0" if victim == "expert-0" else "auto", num_inference_steps=30) as seen:
        seen.wait(3)
        os.kill(before.pop(), signal.SIGKILL)
        seen.wait(6)
    assert not seen.wrong and set(seen.codes) == {200}
    wait_until(lambda: len(replica_pids(victim)) == 1, "its replacement")


@pytest.mark.slow  # two services side by side
def test_another_run_takes_over_without_a_lost_request(address: str, run_dir: Path, tmp_path: Path) -> None:
    other = tmp_path / "next"
    shutil.copytree(run_dir, other)
    config = (other / "config.yaml").read_text()
    (other / "config.yaml").write_text(config.replace("name: tiny", "name: next").replace(str(run_dir), str(other)))
    old = replica_pids("expert-0")
    with traffic(address, num_inference_steps=20) as seen:
        seen.wait(2)
        update(str(other))
        assert httpx.get(f"{address}/v1/models").json()["data"][0]["owned_by"] == "next"
        seen.wait(3)
    assert not seen.wrong and set(seen.codes) == {200}
    wait_until(lambda: not old & replica_pids("expert-0"), "the old replica's end")
    # It stays: the two runs differ in their names alone, and to change back would take as long again.


@pytest.mark.slow  # two changes of the service, and the time that Serve takes to see that nobody asks
def test_an_idle_expert_goes_and_comes_back(address: str, run_dir: Path) -> None:
    try:
        update(str(run_dir), options={"replicas": 0, "downscale_delay_s": 1.0, "upscale_delay_s": 0.0})
        wait_until(lambda: not replica_pids("expert-0"), "no replica", 120)
        ready = httpx.get(f"{address}/ready", timeout=30)
        assert ready.status_code == 200 and ready.json()["expert-0"] == "idle", ready.text
        assert "no replica" in describe(str(run_dir), options={"replicas": 0})
        answer = httpx.post(address + URL, json={"prompt": "a", "model": "expert-0"}, timeout=120)
        assert answer.status_code == 200, answer.text
    finally:
        update(str(run_dir))


@pytest.mark.slow  # the service goes and comes back
def test_stopping_lets_what_was_taken_finish(address: str, run_dir: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        body = {"prompt": "a", "num_inference_steps": 200, "n": 3}
        asked = [pool.submit(httpx.post, address + URL, json=body, timeout=120) for _ in range(4)]
        wait_until(lambda: sum(s["active"] for k in (0, 1) for s in statuses(k)) > 0, "images under way")
        try:
            stop()
            assert [answer.result().status_code for answer in asked] == [200] * 4
        finally:
            assert start(str(run_dir), port=int(address.rpartition(":")[2])) == address


@pytest.mark.slow  # two changes of the service
def test_keys_a_teacher_urls_sizes_and_spill(address: str, run_dir: Path, tmp_path: Path) -> None:
    """One change of the service for all that is off by default: starting replicas is what takes the time."""
    keys = tmp_path / "keys"
    keys.write_text("first-key\nsecond-key\n")
    images = tmp_path / "images"
    options = {
        "api_keys": str(keys), "teacher": True, "url_storage": images.as_uri(), "sizes": ["24x16"], "router_replicas": 2,
        "spill": True, "latency_budget_ms": 900.0, "max_images": 64,
        "max_waiting_images": 128,  # each of the two routers lets half of them in
    }  # fmt: skip
    try:
        update(str(run_dir), options=options)
        wait_until(lambda: httpx.get(f"{address}/ready", timeout=30).status_code == 200, "a ready service")
        for path in ("/", "/health", "/ready", "/openapi.json", "/web/style.css"):
            assert httpx.get(address + path).status_code == 200
        for headers in ({}, {"authorization": "Bearer third-key"}, {"authorization": "second-key"}):
            for refused in (
                httpx.get(f"{address}/v1/models", headers=headers),
                httpx.post(address + URL, json={"prompt": "a"}, headers=headers),
                httpx.post(f"{address}/v1/route", json={"prompts": ["a"]}, headers=headers),
            ):
                assert refused.status_code == 401 and refused.json()["error"]["code"] == "invalid_api_key"
        with httpx.Client(base_url=address, timeout=60, headers={"authorization": "Bearer second-key"}) as client:
            _check_teacher_and_urls(client, images)
            _check_spill(client)
    finally:
        update(str(run_dir))


def _check_teacher_and_urls(client: httpx.Client, images: Path) -> None:
    assert [model["id"] for model in client.get("/v1/models").json()["data"]][-1] == "teacher"
    body = {"prompt": "a red apple", "model": "teacher", "response_format": "url", "output_format": "webp", "size": "24x16"}
    answer = client.post(URL, json=body).json()
    facts = answer["aptp"]
    assert (facts["model"], facts["expert"], facts["macs_ratio"], facts["similarity"]) == ("teacher", None, 1.0, None)
    assert answer["size"] == "24x16" and answer["usage"]["output_tokens"] == 12 * 8
    (stored,) = images.iterdir()
    url = answer["data"][0]["url"]
    assert url == f"{str(client.base_url).rstrip('/')}/v1/images/files/{stored.name}"
    fetched = httpx.get(url)  # whoever has the URL may read
    assert fetched.content == stored.read_bytes() and fetched.headers["content-type"] == "image/webp"
    assert httpx.get(url.replace(".webp", ".png")).status_code == 404


def _check_spill(client: httpx.Client) -> None:
    """Fills the dearer expert's queue and asks for what belongs there."""
    ratios = [model["aptp"]["macs_ratio"] for model in client.get("/v1/models").json()["data"][1:3]]
    dearer = max(range(2), key=ratios.__getitem__)
    prompts = [f"a red apple, {n} of them" for n in range(40)] + ["green fox", "two plums", "?", "grey cat", "white horse"]
    routes = client.post("/v1/route", json={"prompts": prompts}).json()["data"]
    assert all(len(route["scores"]) == 2 and route["macs_ratio"] == ratios[route["expert"]] for route in routes)
    prompt = next(prompts[route["index"]] for route in routes if route["expert"] == dearer)
    body = {"prompt": prompt, "num_inference_steps": 20}
    assert not client.post(URL, json=body).json()["aptp"]["spilled"]
    # Sixty images in batches of three: the prompt would wait for twenty rounds, far beyond the budget.
    flood = {"prompt": ["a"] * 6, "n": 10, "num_inference_steps": 200, "model": f"expert-{dearer}", "stream": True}
    with client.stream("POST", URL, json=flood) as answer:
        assert answer.status_code == 200
        found: list[dict[str, Any]] = []

        def spilled() -> bool:
            # A router that has not heard yet how busy the expert is lets it wait there.
            late = client.post(URL, json=body | {"timeout": 5}).json()
            found.append(late.get("aptp", {}))
            return found[-1].get("spilled", False)

        wait_until(spilled, "a spilled prompt", 60)
    assert found[-1]["expert"] == 1 - dearer and found[-1]["spilled_from"] == f"expert-{dearer}"
    assert found[-1]["similarity"][dearer] is not None and found[-1]["macs_ratio"] == ratios[1 - dearer]
