"""Starts, updates and stops the service on the cluster at hand: what ``jobs/serve.py`` and the quickstart call."""

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
from ray.serve import Application
from ray.serve.exceptions import RayServeException

from aptp_ray.artifacts import load_run
from aptp_ray.config import UserError
from aptp_ray.serve.app import ServeArgs, build, read_catalog, serve_options
from aptp_ray.serve.catalog import size_text
from aptp_ray.serve.environment import for_ray

logger = logging.getLogger("ray.serve")

APP_NAME = "aptp"
_STATUS_TIMEOUT_S = 10.0


class ServeError(UserError, RuntimeError):
    """The service cannot be started."""


def start(
    run_dir: str,
    host: str = "127.0.0.1",
    port: int = 8000,
    *,
    storage_options: dict[str, Any] | None = None,
    options: dict[str, Any] | None = None,
    timeout_s: float = 300.0,
) -> str:
    """Deploys a finished run and returns its address once every part of it answers.

    Starts Ray locally if no cluster is connected.

    Args:
        run_dir: any fsspec URI.
        host: interface on which the proxies listen.
        port: 0 picks a free one.
        storage_options: of the run directory.
        options: fields of the config's ``serve`` section to use in place of the run's.
        timeout_s: until the service must be ready, after it is deployed.

    Raises:
        ServeError: if the port is taken or the service does not become ready.
        RunDirError: if the run is not finished.
    """
    args = ServeArgs(run_dir=run_dir, storage_options=storage_options or {}, serve=options or {})
    return deploy(build(args), host, free_port(host, port), timeout_s=timeout_s)


def deploy(application: Application, host: str, port: int, *, timeout_s: float = 300.0) -> str:
    """Starts Serve and an application on it; returns its address once every part of it answers.

    Args:
        application: in which the router answers for all others; see :func:`~aptp_ray.serve.app.build`.
        host: as for :func:`start`, like the rest.

    Raises:
        ServeError: if the service does not become ready.
    """
    if not ray.is_initialized():
        with for_ray():
            ray.init(logging_level=logging.WARNING)
    serve.start(http_options={"host": host, "port": port})
    serve.run(application, name=APP_NAME, route_prefix="/")
    reachable = "127.0.0.1" if host in ("0.0.0.0", "") else "[::1]" if host == "::" else host
    address = f"http://{reachable}:{port}"
    _wait_until_ready(address, timeout_s)
    return address


def update(
    run_dir: str, *, storage_options: dict[str, Any] | None = None, options: dict[str, Any] | None = None
) -> None:
    """Changes a running service over to another run directory, or other options, without losing a request.

    New replicas start beside the old ones, which then drain: for that time the cluster needs room for both. Returns when the
    new ones serve. While they change over, a prompt may be routed by the one run and drawn by the other.

    Raises:
        RunDirError: if the run is not finished; the service stays as it is.
    """
    application = build(ServeArgs(run_dir=run_dir, storage_options=storage_options or {}, serve=options or {}))
    serve.run(application, name=APP_NAME, route_prefix="/")


def describe(run_dir: str, *, storage_options: dict[str, Any] | None = None, options: dict[str, Any] | None = None) -> str:
    """Returns lines for people: what the running service has loaded, and the memory of each of its replicas."""
    run, config = load_run(run_dir, storage_options)
    chosen = serve_options(config, options or {})
    catalog = read_catalog(run, config.model_copy(update={"serve": chosen}))
    lines = [
        f"{catalog.name}: {len(catalog.experts)} experts at {catalog.routing['macs_ratio']:.3f} of the teacher's MACs, "
        f"{', '.join(map(size_text, [catalog.size, *catalog.sizes]))}, {catalog.num_inference_steps} steps by default; "
        + ("keys needed" if chosen.api_keys else "open to all who reach it")
    ]
    for number, model in enumerate(catalog.models[1:]):
        try:
            answers = serve.get_deployment_handle(model, APP_NAME).broadcast("status").results(timeout_s=_STATUS_TIMEOUT_S)
        except RayServeException:  # no replica runs
            answers = []
        memory = ", ".join(f"{answer['memory_mb']:.0f} MB" for answer in answers) or "no replica until a prompt comes"
        lines.append(f"  {model}: {catalog.macs_ratio(number):.3f} of the teacher's MACs; {memory}")
    return "\n".join(lines)


def stop() -> None:
    """Takes no more requests, lets those under way finish (for a minute at most), and ends the service; the cluster stays."""
    try:
        # Shutting down at once would end the proxies, and with them the connections of requests that are being drawn.
        serve.delete(APP_NAME)
    except TimeoutError:
        logger.warning("requests were still under way after a minute: they are lost")
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


def _wait_until_ready(address: str, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            with urllib.request.urlopen(f"{address}/ready", timeout=30) as answer:
                json.load(answer)
                return
        except urllib.error.HTTPError as error:
            last = error.read().decode(errors="replace")[:500]
        except (OSError, ValueError) as error:
            # Nobody listens: a Serve that ran before on this cluster keeps its own host and port.
            last = f"{error}; if Serve already ran on this cluster with another port, stop it first (serve shutdown)"
        if time.monotonic() > deadline:
            raise ServeError(f"{address} is not ready after {timeout_s:.0f} s: {last}")
        time.sleep(0.2)
