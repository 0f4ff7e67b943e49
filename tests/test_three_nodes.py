"""The whole road on three nodes that share nothing but an S3 server, a node killed in each stage; then the service.

Head and workers are this machine's processes (see ``nodes.py``), with folders of their own; the store is moto's server. What
comes out is what one machine makes of the same config without a failure: to the bit, router, codes, rows and experts.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fsspec
import httpx
import pytest
import yaml
from nodes import ROOT, Cluster, Node, free_port, wait_for

from aptp_ray.artifacts import RunDir
from aptp_ray.data import schema
from aptp_ray.data.encoded import read_table

pytestmark = pytest.mark.slow

CONFIG = "jobs/configs/smoke.yaml"
# Long enough that there is something to lose when a node dies; many small files, so that assigning takes a while.
CHANGES = (
    "data.source.images_per_shard=25",
    "encode.rows_per_file=10",
    "prune.loop.steps=12",
    "finetune.apart.steps=12",
    "finetune.apart.checkpoint_every_steps=4",
    "serve.upscale_delay_s=1",
)
# What a worker is at while it does a stage's work.
AT_WORK = {"encode": "MapWorker", "prune": "TrainWorker", "assign": "_assign_file", "finetune": "TrainWorker"}
KEYS = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_DEFAULT_REGION": "us-east-1"}
URL = "/v1/images/generations"
# All that training reads of a row; its shard's address is the store's.
COLUMNS = (schema.KEY, schema.CAPTION, schema.GROUP, schema.EMBEDDING, *schema.TENSORS)


# -- one machine, and three nodes ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("nodes")


@pytest.fixture(scope="module")
def alone(folder: Path) -> RunDir:
    """The run of one machine, without a failure."""
    command = ["jobs/pipeline.py", CONFIG, *CHANGES, "--run-dir", str(folder / "alone")]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "APTP_CACHE": str(folder / "alone-cache")}
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    return RunDir(str(folder / "alone"))


@pytest.fixture(scope="module")
def store(folder: Path) -> Iterator[dict[str, Any]]:
    """Storage options of an S3 server with the bucket "aptp"."""
    port = free_port()
    # A process of its own: in this one, the test would hold it up.
    command = [str(Path(sys.executable).with_name("moto_server")), "-H", "127.0.0.1", "-p", str(port)]
    with (folder / "store.log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        options = {"key": "testing", "secret": "testing", "endpoint_url": f"http://127.0.0.1:{port}"}
        wait_for(lambda: answers(options["endpoint_url"]), 60, "the store did not start", 0.2)
        fsspec.filesystem("s3", **options).mkdir("aptp")
        yield options
    finally:
        server.terminate()
        server.wait(30)


def answers(address: str) -> bool:
    try:
        return httpx.get(address, timeout=5).status_code < 500
    except httpx.HTTPError:
        return False


@pytest.fixture(scope="module")
def cluster(folder: Path) -> Iterator[Cluster]:
    # A dead node is given up after seconds, not half a minute: it is killed often here.
    quick = {"RAY_health_check_period_ms": "1000", "RAY_health_check_failure_threshold": "3"}
    made = Cluster(folder / "cluster", head_cpus=0, environment=KEYS | quick)
    try:
        made.wait()
        for name in ("east", "west"):
            made.add(name)
        yield made
    finally:
        made.close()


def references(store: dict[str, Any]) -> dict[str, str]:
    """The storage options as a user gives them: secrets by name."""
    return {"key": "env:AWS_ACCESS_KEY_ID", "secret": "env:AWS_SECRET_ACCESS_KEY", "endpoint_url": store["endpoint_url"]}


@dataclass
class Survivor:
    """A run whose nodes were killed.

    Attributes:
        run: its directory.
        killed: stage -> what the node was at.
        line: of JSON, that the job has ended with.
    """

    run: RunDir
    killed: dict[str, str] = field(default_factory=dict)
    line: dict[str, Any] = field(default_factory=dict)


@pytest.fixture(scope="module")
def survivor(cluster: Cluster, store: dict[str, Any]) -> Survivor:
    """Submits the pipeline, and in each stage kills a node that works for it, and adds it again."""
    found = Survivor(RunDir("s3://aptp/run", store))
    options = json.dumps(references(store))
    command = ["--", "python", "jobs/pipeline.py", CONFIG, *CHANGES, "run_dir=s3://aptp/run", f"storage_options={options}"]
    ready = ["--working-dir", ".", "--runtime-env", "jobs/runtime_env.yaml"]
    begun = cluster.job("submit", "--no-wait", "--submission-id", "road", *ready, *command)
    assert begun.returncode == 0, begun.stdout + begun.stderr
    for stage, work in AT_WORK.items():
        node = at_work(cluster, found.run, stage, work)
        found.killed[stage] = next(title for title in node.titles() if work in title)
        node.kill()
        print(f"{stage}: killed {node.name}, which was at {found.killed[stage]}", flush=True)
        cluster.add(node.name)
    wait_for(lambda: cluster.status("road") in ("SUCCEEDED", "FAILED", "STOPPED"), 600, "the job did not end")
    log = cluster.job("logs", "road").stdout
    assert cluster.status("road") == "SUCCEEDED", log[-6000:]
    found.line = json.loads(next(text for text in reversed(log.splitlines()) if text.startswith('{"run_dir"')))
    return found


def at_work(cluster: Cluster, run: RunDir, stage: str, work: str) -> Node:
    """Waits for a node that is in the midst of a stage: past what it can go on from, if the stage leaves such things."""
    # What lies in the store then. Of encode's entries one says what they are made by.
    left = {
        "encode": (2, ("encoded", "train", "_units", "*.json")),
        "prune": (1, ("train", "prune", "checkpoint_*")),
        "finetune": (1, ("train", "expert-*", "checkpoint_*")),
    }
    count, pattern = left.get(stage, (0, ()))
    deadline = time.monotonic() + 600
    while True:
        # Looked at first, for it costs the store nothing.
        node = next((node for node in cluster.workers.values() if any(work in title for title in node.titles())), None)
        if node is not None:
            manifest = run.manifest()
            if stage in manifest.get("begun", {}) and (not count or len(run.fs.glob(run.path(*pattern))) >= count):
                return node
            assert stage not in manifest["stages"], f"{stage} has ended, and no node was killed in it"
        state = cluster.status("road")
        assert state in ("PENDING", "RUNNING") and time.monotonic() < deadline, (
            f"{stage}: the job is {state}, and no node is at work\n{cluster.job('logs', 'road').stdout[-6000:]}"
        )
        time.sleep(0.02 if stage == "assign" else 0.3)


def hashes(run: RunDir, *parts: str) -> dict[str, str]:
    """Returns the hash of every weights file below a folder."""
    paths = [str(path) for path in run.fs.find(run.path(*parts)) if str(path).endswith(".safetensors")]
    return {path.removeprefix(run.root): hashlib.sha256(run.fs.cat_file(path)).hexdigest() for path in paths}


def test_three_nodes_that_die_make_what_one_machine_makes(survivor: Survivor, alone: RunDir) -> None:
    assert set(survivor.killed) == set(AT_WORK)
    for split in ("train", "validation"):
        mine, theirs = (read_table(run, "encoded", split, columns=COLUMNS) for run in (survivor.run, alone))
        assert mine.equals(theirs), split
    assert survivor.run.read_json("routing.json") == alone.read_json("routing.json")
    router = hashes(alone, "router")
    assert router and hashes(survivor.run, "router") == router
    for expert in range(2):
        mine, theirs = (read_table(run, "assigned", f"expert={expert}", columns=COLUMNS) for run in (survivor.run, alone))
        assert mine.num_rows and mine.equals(theirs), expert
    experts = hashes(alone, "experts")
    assert len(experts) == 2 and hashes(survivor.run, "experts") == experts
    assert survivor.line["macs_ratio"] == alone.manifest()["stages"]["report"]["macs_ratio"]


# -- its service -----------------------------------------------------------------------------------------------------------------


@dataclass
class Traffic:
    """Clients that ask until they are told to stop; every answer is kept, none is asked for twice."""

    address: str
    clients: int
    steps: int
    codes: list[int] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    over: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Traffic:
        self._pool = ThreadPoolExecutor(self.clients)
        self._asked = [self._pool.submit(self._ask, number) for number in range(self.clients)]
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        for asked in self._asked:
            asked.result()
        self._pool.shutdown()

    def _ask(self, number: int) -> None:
        body = {"prompt": f"a red apple number {number}", "seed": number, "num_inference_steps": self.steps}
        with httpx.Client(base_url=self.address, timeout=120) as client:
            while not self.over.is_set():
                try:
                    answer = client.post(URL, json=body)
                except httpx.HTTPError as error:
                    self.wrong.append(repr(error))
                    continue
                self.codes.append(answer.status_code)
                if answer.status_code != 200:
                    self.wrong.append(answer.text)


def fleet_file(folder: Path) -> Path:
    """The two workers as the planner sees them: slow, so that a surge needs a second replica, and half as large as they are.

    The other half is room for an update, which starts new replicas beside the old ones.
    """
    tree = {
        "load": {"images_per_s": 0.6, "steps": {4: 1.0}, "quiet": 0.2, "surge": 2.5},
        "objective": {"p95_s": 20, "utilisation": 0.9},
        "replica": {"cpus": 0.5, "reserve_gb": 0.4},
        "max_batch_size": 4,
        "devices": [
            {
                "name": "cpu", "gpu": False, "memory_gb": 8, "cpus": 2, "lanes": 2, "price_per_hour": 0.1, "available": 2,
                "tflops": 0.002, "launch_ms": 1,
            }
        ],
    }  # fmt: skip
    (folder / "fleet.yaml").write_text(json.dumps(tree))
    return folder / "fleet.yaml"


def planned(cluster: Cluster, store: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Writes the planner's Serve config, for a free port of this machine; returns it."""
    out = folder / "serve.yaml"
    options = [part for name, value in references(store).items() for part in ("--storage-option", f"{name}={value}")]
    where = ["--host", "127.0.0.1", "--port", str(free_port())]
    command = ["jobs/plan.py", "s3://aptp/run", str(fleet_file(folder)), "--out", str(out), *options, *where]
    done = cluster.run("python", *command)
    assert done.returncode == 0, done.stderr[-3000:]
    print(done.stderr, flush=True)
    assert "testing" not in out.read_text()  # the store's secret
    tree = yaml.safe_load(out.read_text())
    # The three nodes have one network address: a proxy on each would ask for one port.
    tree["proxy_location"] = "HeadOnly"
    out.write_text(yaml.safe_dump(tree))
    return tree


def deployed(cluster: Cluster) -> dict[str, Any]:
    """Returns the application's status: what `serve status` shows."""
    return (cluster.ask("/api/serve/applications/") or {}).get("applications", {}).get("aptp", {})


def running(cluster: Cluster) -> dict[str, set[str]]:
    """Returns the ids of the running replicas of each deployment."""
    return {
        name: {replica["replica_id"] for replica in one["replicas"] if replica["state"] == "RUNNING"}
        for name, one in deployed(cluster).get("deployments", {}).items()
    }


def settle(cluster: Cluster, seconds: float) -> None:
    """Waits until the application runs; says what its parts are at if it does not."""
    deadline = time.monotonic() + seconds
    while (found := deployed(cluster)).get("status") != "RUNNING":
        parts = {name: (one["status"], one["message"]) for name, one in found.get("deployments", {}).items()}
        failed = found.get("status") in ("DEPLOY_FAILED", "UNHEALTHY") or time.monotonic() > deadline
        assert not failed, f"{found.get('status')}: {found.get('message')} {parts}"
        time.sleep(1)


def test_its_service_scales_is_updated_without_a_failed_request_and_ends_clean(
    survivor: Survivor, cluster: Cluster, store: dict[str, Any], folder: Path
) -> None:
    assert survivor.line
    tree = planned(cluster, store, folder)
    file = folder / "serve.yaml"
    bounds = {one["name"]: one["autoscaling_config"] for one in tree["applications"][0]["deployments"]}
    assert any(bound["max_replicas"] > bound["min_replicas"] for bound in bounds.values()), bounds

    answer = cluster.serve("deploy", str(file))
    assert answer.returncode == 0, answer.stdout + answer.stderr
    settle(cluster, 480)
    address = f"http://127.0.0.1:{tree['http_options']['port']}"
    ready = httpx.get(f"{address}/ready", timeout=60)
    assert ready.status_code == 200, ready.text
    image = httpx.post(f"{address}{URL}", json={"prompt": "a red apple", "seed": 1}, timeout=120)
    assert image.status_code == 200 and image.json()["data"][0]["b64_json"]

    # Scaled by load.
    before = running(cluster)
    with Traffic(address, clients=12, steps=40) as load:
        wait_for(lambda: any(len(ids) > len(before[name]) for name, ids in running(cluster).items()), 240, "no replica was added")
    assert load.codes and not load.wrong, load.wrong[:3]
    grown = {name: (len(before[name]), len(ids)) for name, ids in running(cluster).items() if len(ids) > len(before[name])}
    print(f"scaled: {grown}, {len(load.codes)} requests", flush=True)
    assert all(count <= bounds[name]["max_replicas"] for name, (_, count) in grown.items())

    # Updated: other arguments, so that every part is replaced.
    tree["applications"][0]["args"]["serve"]["max_waiting_images"] = 50
    file.write_text(yaml.safe_dump(tree))
    old = running(cluster)
    with Traffic(address, clients=2, steps=4) as trickle:
        wait_for(lambda: len(trickle.codes) > 5 or trickle.wrong, 60, "no answers")
        assert cluster.serve("deploy", str(file)).returncode == 0
        wait_for(lambda: all(not old[name] & ids and ids for name, ids in running(cluster).items()), 400, "not all was replaced")
        settle(cluster, 120)
        after = len(trickle.codes) + 5
        wait_for(lambda: len(trickle.codes) > after or trickle.wrong, 120, "no answers after the update")
    assert not trickle.wrong and set(trickle.codes) == {200}, trickle.wrong[:3]
    print(f"updated under {len(trickle.codes)} requests, none failed", flush=True)

    # Torn down.
    assert cluster.serve("shutdown", "--yes").returncode == 0
    wait_for(lambda: not deployed(cluster), 120, "the application is still there")
    nodes = (cluster.head, *cluster.workers.values())
    wait_for(lambda: not any("Serve" in title for node in nodes for title in node.titles()), 60, "replicas are still there")
    with pytest.raises(httpx.TransportError):
        httpx.get(f"{address}/health", timeout=5)


def test_a_copy_of_the_run_directory_serves(survivor: Survivor, store: dict[str, Any], folder: Path) -> None:
    """On a machine that has nothing else: no address of the store, and none of its keys."""
    copy = folder / "moved" / "elsewhere"
    survivor.run.fs.get(f"{survivor.run.root}/", f"{copy}/", recursive=True)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "RAY_"))}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "APTP_CACHE": str(folder / "moved-cache")}
    log = folder / "moved.log"
    with log.open("w") as errors:
        command = [sys.executable, "jobs/serve.py", str(copy), "--port", "0"]
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, log.read_text()[-3000:]
        answer = httpx.post(f"{json.loads(line)['address']}{URL}", json={"prompt": "a blue cat", "seed": 2}, timeout=120)
        assert answer.status_code == 200
    finally:
        process.terminate()
        process.wait(120)


def test_the_cluster_ends_clean(cluster: Cluster) -> None:
    for node in (*cluster.workers.values(), cluster.head):
        begun = time.monotonic()
        assert not node.stop(), f"{node.name} left processes behind"
        print(f"{node.name} ended in {time.monotonic() - begun:.0f} s", flush=True)
