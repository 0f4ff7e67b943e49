"""The documented metrics are on Ray's Prometheus endpoint, under the documented names and tags."""

from __future__ import annotations

import re
import time

import httpx
import ray

from aptp_ray.serve import metrics

URL = "/v1/images/generations"


def _scrape() -> str:
    (node,) = [entry for entry in ray.nodes() if entry["Alive"]]
    return httpx.get(f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics", timeout=30).text


def test_what_is_documented_is_exported(client: httpx.Client) -> None:
    for model in ("auto", "expert-1"):
        assert client.post(URL, json={"prompt": "a red apple", "model": model}).status_code == 200
    assert client.post(URL, json={"prompt": ""}).status_code == 400
    documented = re.findall(r"^\| ``(aptp_\w+)`` \| (\w+) \|", metrics.__doc__ or "", re.MULTILINE)
    assert len(documented) > 10
    rare = {"aptp_spills", "aptp_retries"}  # nothing to export before they happen
    wanted = {name for name, _ in documented} - rare
    deadline = time.monotonic() + 60  # replicas report every few seconds
    while missing := {name for name in wanted if f"ray_{name}" not in (text := _scrape())}:
        assert time.monotonic() < deadline, f"not exported: {missing}"
        time.sleep(1)
    jobs = [line for line in text.splitlines() if line.startswith("ray_aptp_jobs")]
    assert any('expert="expert-1"' in line and 'outcome="done"' in line and 'deployment="router"' in line for line in jobs)
    for name, kind in documented:
        if kind == "histogram" and name in wanted:
            assert f"ray_{name}_bucket" in text
    refused = [line for line in text.splitlines() if line.startswith("ray_aptp_http_requests") and 'status="400"' in line]
    assert any(f'path="{URL}"' in line for line in refused)
    assert "red apple" not in text
