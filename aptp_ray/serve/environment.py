"""How Ray Serve's own processes run: environment variables that its controller, proxies and replicas read when they start.

Serve works without them, more slowly. Whoever starts Ray on one machine sets them for its processes (`for_ray`), and
`clusters/Dockerfile` does so on every node of a cluster. Measured on two cores with the demo: a lone request's way through
Serve takes 34 ms in place of 50, and an image's share of router, ingress and proxy 23 ms of CPU time in place of 29.

Not among them: RAY_SERVE_ENABLE_HA_PROXY. HAProxy is quicker than Serve's own proxy (a lone request 7 ms in place of 13), but of
24 clients that left before their answer, the HAProxy 2.8 that comes with ray[serve] 2.60 did not notice 2, and their images were
drawn to the end.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
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


def way_of_calling() -> dict[str, Any]:
    """Returns options of a handle, for calls from this process.

    A handle comes with the way of calling of the process that built the application, which has none of the variables
    (`for_ray`): without this, replicas would call each other through Ray's tasks all the same.
    """
    return {"_by_reference": False} if os.environ.get("RAY_SERVE_USE_GRPC_BY_DEFAULT") == "1" else {}


@contextmanager
def for_ray() -> Iterator[None]:
    """Around ``ray.init``: Ray's processes inherit the variables, this one keeps its own. What the user has set, stays."""
    before = {name: os.environ.get(name) for name in SERVE_ENVIRONMENT}
    os.environ.update({name: value for name, value in SERVE_ENVIRONMENT.items() if before[name] is None})
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
