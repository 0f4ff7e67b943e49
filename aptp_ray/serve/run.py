"""Starts and stops the service on the cluster at hand: what ``jobs/serve.py`` and the quickstart call."""

from __future__ import annotations

import json
import logging
import socket
import time
import urllib.error
import urllib.request
from typing import Any

import ray
from ray import serve

from aptp_ray.config import UserError
from aptp_ray.serve.app import ServeArgs, build

APP_NAME = "aptp"


class ServeError(UserError, RuntimeError):
    """The service cannot be started."""


def start(
    run_dir: str,
    host: str = "127.0.0.1",
    port: int = 8000,
    *,
    storage_options: dict[str, Any] | None = None,
    timeout_s: float = 300.0,
) -> str:
    """Deploys a finished run and returns its address once every part of it answers.

    Starts Ray locally if no cluster is connected.

    Args:
        run_dir: any fsspec URI.
        host: interface on which the proxies listen.
        port: 0 picks a free one.
        storage_options: of the run directory.
        timeout_s: until the service must be healthy, after it is deployed.

    Raises:
        ServeError: if the port is taken or the service does not become healthy.
        RunDirError: if the run is not finished.
    """
    port = free_port(host, port)
    application = build(ServeArgs(run_dir=run_dir, storage_options=storage_options or {}))
    if not ray.is_initialized():
        ray.init(logging_level=logging.WARNING)
    serve.start(http_options={"host": host, "port": port})
    serve.run(application, name=APP_NAME, route_prefix="/")
    reachable = "127.0.0.1" if host in ("0.0.0.0", "") else "[::1]" if host == "::" else host
    address = f"http://{reachable}:{port}"
    _wait_until_healthy(address, timeout_s)
    return address


def stop() -> None:
    """Takes the service down; the cluster stays."""
    serve.shutdown()


def free_port(host: str, port: int) -> int:
    """Returns ``port``, or a free one for 0.

    Raises:
        ServeError: if something listens there already, or the host is not this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ServeError(
                f"cannot listen on {host}:{port} ({error.strerror}): choose another with --port (0: a free one) or --host"
            ) from error
        return int(probe.getsockname()[1])


def _wait_until_healthy(address: str, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            with urllib.request.urlopen(f"{address}/health", timeout=30) as answer:
                json.load(answer)
                return
        except urllib.error.HTTPError as error:
            last = error.read().decode(errors="replace")[:500]
        except (OSError, ValueError) as error:
            # Nobody listens: a Serve that ran before on this cluster keeps its own host and port.
            last = f"{error}; if Serve already ran on this cluster with another port, stop it first (serve shutdown)"
        if time.monotonic() > deadline:
            raise ServeError(f"{address} is not healthy after {timeout_s:.0f} s: {last}")
        time.sleep(0.2)
