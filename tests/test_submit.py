"""A job that is submitted to a cluster, stopped, and submitted again: on a real head with its dashboard, behind a token."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
RAY = str(Path(sys.executable).with_name("ray"))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(what: Any, seconds: float, message: str) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < deadline, message
        time.sleep(1)
    return found


class Cluster:
    """A head of its own, with dashboard and job server behind a token; no other Ray of this machine is touched."""

    def __init__(self, folder: Path) -> None:
        self.port, self.token = free_port(), secrets.token_hex(16)
        kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        self.environment = kept | {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self.token,
            "WANDB_MODE": "disabled",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
        }
        self.log = folder / "head.log"
        # Short: Ray's sockets lie in it. A folder of its own also keeps this head's address from `ray.init()` of others.
        self.scratch = tempfile.mkdtemp(prefix="r", dir="/tmp")
        named = {"--dashboard-port": self.port}
        named |= {f"--{name}port": free_port() for name in ("", "dashboard-agent-listen-", "ray-client-server-")}
        ports = [f"{name}={number}" for name, number in named.items()]
        size = ["--num-cpus=4", "--num-gpus=0", "--object-store-memory=500000000"]
        with self.log.open("w") as log:
            self.head = subprocess.Popen(
                [RAY, "start", "--head", "--block", "--temp-dir", self.scratch, *size, *ports],
                env=self.environment,
                cwd=ROOT,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def close(self) -> None:
        """Ends all processes of the head's session, by their ids: `ray stop` would end every Ray of this machine."""
        for pid in [int(name) for name in os.listdir("/proc") if name.isdigit()]:
            try:
                if os.getsid(pid) == self.head.pid:
                    os.kill(pid, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):  # gone meanwhile, or another user's
                continue
        self.head.wait(30)
        shutil.rmtree(self.scratch, ignore_errors=True)

    def job(self, verb: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Runs `ray job VERB`, as a user does."""
        command = [RAY, "job", verb, "--address", f"http://127.0.0.1:{self.port}", *arguments]
        return subprocess.run(command, env=self.environment, cwd=ROOT, capture_output=True, text=True, timeout=500)

    def ask(self, path: str, token: str | None = None) -> Any:
        """Asks the dashboard; None while it is not up."""
        headers = {"Authorization": f"Bearer {token or self.token}"}
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return json.load(answer)
        except urllib.error.HTTPError:
            raise
        except OSError:
            return None

    def status(self, job: str) -> str:
        return str((self.ask(f"/api/jobs/{job}") or {}).get("status"))


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    made = Cluster(tmp_path)
    try:
        wait_for(lambda: made.ask("/api/version"), 120, "the head did not start")
        yield made
    finally:
        made.close()


@pytest.mark.slow
def test_a_stopped_job_goes_on_where_it_was(cluster: Cluster, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    changes = [f"run_dir={run_dir}", "prune.loop.steps=60", "prune.loop.checkpoint_every_steps=4", "compute.max_failures=0"]
    options = ["--working-dir", ".", "--runtime-env", "jobs/runtime_env.yaml"]
    config = "jobs/configs/smoke.yaml"

    with pytest.raises(urllib.error.HTTPError, match="40[13]"):
        cluster.ask("/api/jobs/", token="0" * 32)

    pipeline = ["--", "python", "jobs/pipeline.py", config, *changes]
    begun = cluster.job("submit", "--no-wait", "--submission-id", "first", *options, *pipeline)
    assert begun.returncode == 0, begun.stdout + begun.stderr

    def checkpoints() -> list[Path]:
        return list(run_dir.glob("train/prune/checkpoint_*"))

    wait_for(lambda: checkpoints() or cluster.status("first") == "FAILED", 400, "no checkpoint of prune in time")
    assert checkpoints(), cluster.ask("/api/jobs/first/logs")
    assert cluster.job("stop", "first").returncode == 0
    wait_for(lambda: cluster.status("first") == "STOPPED", 60, "the job did not stop")
    manifest = json.loads((run_dir / "manifest.json").read_text())
    assert set(manifest["stages"]) == {"teacher", "encode"} and set(manifest["begun"]) == {"prune"}

    prune = ["--", "python", "jobs/prune.py", config, *changes]
    again = cluster.job("submit", "--submission-id", "second", *options, *prune)
    assert again.returncode == 0, again.stdout[-3000:] + again.stderr[-3000:]
    after = json.loads((run_dir / "manifest.json").read_text())
    assert {name: after["stages"][name] for name in ("teacher", "encode")} == manifest["stages"]
    assert set(after["stages"]) == {"teacher", "encode", "prune"} and not after["begun"]
    line = next(text for text in reversed(again.stdout.splitlines()) if text.startswith('{"run_dir"'))
    assert json.loads(line)["stage"] == "prune"
    assert (run_dir / "router" / "config.json").exists()
