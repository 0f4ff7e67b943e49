"""A Ray cluster of this machine's processes: a head and workers, each with folders of its own, behind a token."""

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
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from aptp_ray.serve.environment import SERVE_ENVIRONMENT

ROOT = Path(__file__).resolve().parents[1]
_BIN = Path(sys.executable).parent

Found = TypeVar("Found")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(what: Callable[[], Found], seconds: float, message: str, every: float = 1.0) -> Found:
    """Returns what is found, as soon as it is."""
    deadline = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < deadline, message
        time.sleep(every)
    return found


class Node:
    """The processes that one `ray start --block` has begun.

    Attributes:
        name: also of its folder.
        folder: its HOME, cache and temporary files: nothing that other nodes see.
    """

    def __init__(self, name: str, folder: Path, environment: dict[str, str], arguments: list[str]) -> None:
        self.name, self.folder = name, folder
        (folder / "tmp").mkdir(parents=True, exist_ok=True)
        own = {"HOME": str(folder), "APTP_CACHE": str(folder / "cache"), "TMPDIR": str(folder / "tmp")}
        self._log = (folder / "ray.log").open("w")
        self._process = subprocess.Popen(
            [str(_BIN / "ray"), "start", "--block", *arguments],
            env=environment | own,
            cwd=ROOT,
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,
        )

    @property
    def log(self) -> str:
        return (self.folder / "ray.log").read_text()

    def pids(self) -> list[int]:
        """Returns its processes: those of its session, and what these have started in sessions of their own (jobs' drivers)."""
        mine, parents = {self._process.pid}, {}
        for pid in [int(name) for name in os.listdir("/proc") if name.isdigit()]:
            try:
                parents[pid] = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
                if os.getsid(pid) == self._process.pid:
                    mine.add(pid)
            except (ProcessLookupError, FileNotFoundError):  # it has ended meanwhile
                continue
        while more := {pid for pid, parent in parents.items() if parent in mine} - mine:
            mine |= more
        return sorted(pid for pid in mine if pid in parents)

    def titles(self) -> list[str]:
        """Returns what Ray's workers on it are at: their processes' titles."""
        found = []
        for pid in self.pids():
            try:
                title = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].decode(errors="replace")
            except (ProcessLookupError, FileNotFoundError):
                continue
            if title.startswith("ray::"):
                found.append(title)
        return found

    def kill(self) -> None:
        """Ends it as a loss of power does. By ids: `ray stop` would end every Ray of this machine."""
        for pid in self.pids():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self._process.wait(30)
        self._log.close()

    def stop(self) -> list[int]:
        """Ends it as Ctrl-C does; returns the processes that are still there."""
        before = self.pids()
        self._process.terminate()
        self._process.wait(60)
        deadline = time.monotonic() + 30
        while (left := [pid for pid in before if _runs(pid)]) and time.monotonic() < deadline:
            time.sleep(0.5)
        return left


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


class Cluster:
    """A head with dashboard and job server, and what workers are added; no other Ray of this machine is touched."""

    def __init__(self, folder: Path, *, head_cpus: int = 4, environment: dict[str, str] | None = None) -> None:
        self.folder, self.port, self.token = folder, free_port(), secrets.token_hex(16)
        self._gcs = free_port()
        kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        self.environment = kept | SERVE_ENVIRONMENT | {
            "PATH": f"{_BIN}:{os.environ['PATH']}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self.token,
            "WANDB_MODE": "disabled",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            **(environment or {}),
        }
        # Short: Ray's sockets lie in it. Folders of their own also keep this head's address from `ray.init()` of others.
        self._scratch = Path(tempfile.mkdtemp(prefix="r", dir="/tmp"))
        ports = {"--port": self._gcs, "--dashboard-port": self.port, "--ray-client-server-port": free_port()}
        arguments = ["--head", *(f"{name}={number}" for name, number in ports.items())]
        self.head = self._node("head", head_cpus, arguments)
        self.workers: dict[str, Node] = {}

    def _node(self, name: str, cpus: int, arguments: list[str]) -> Node:
        size = [f"--num-cpus={cpus}", "--num-gpus=0", "--object-store-memory=300000000"]
        # Nodes of one machine would ask for one port.
        own = [f"--dashboard-agent-listen-port={free_port()}", f"--temp-dir={self._scratch / name}"]
        return Node(name, self.folder / name, self.environment, [*arguments, *size, *own])

    def wait(self) -> None:
        """Returns when the head answers."""
        wait_for(lambda: self.ask("/api/version"), 120, "the head did not start")

    def add(self, name: str, cpus: int = 4) -> Node:
        """Starts a worker, whose folders are empty, and returns when the cluster has it."""
        shutil.rmtree(self.folder / name, ignore_errors=True)
        node = self.workers[name] = self._node(name, cpus, [f"--address=127.0.0.1:{self._gcs}"])
        wait_for(lambda: "Ray runtime started" in node.log, 120, f"{name} did not start")
        return node

    def close(self) -> None:
        """Kills whatever still runs."""
        for node in (*self.workers.values(), self.head):
            node.kill()
        shutil.rmtree(self._scratch, ignore_errors=True)

    def run(self, *command: str, timeout: float = 600) -> subprocess.CompletedProcess[str]:
        """Runs a command of the virtual environment on the user's machine, so to speak, with the token."""
        words = [str(_BIN / command[0]), *command[1:]]
        return subprocess.run(words, env=self.environment, cwd=ROOT, capture_output=True, text=True, timeout=timeout)

    def job(self, verb: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Runs `ray job VERB`, as a user does."""
        return self.run("ray", "job", verb, "--address", f"http://127.0.0.1:{self.port}", *arguments)

    def serve(self, verb: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Runs `serve VERB`, likewise."""
        return self.run("serve", verb, "--address", f"http://127.0.0.1:{self.port}", *arguments)

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
