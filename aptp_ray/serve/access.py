"""Who may call, and the line that is logged of every call."""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import os
import re
import time
from functools import cache
from pathlib import Path
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from aptp_ray.config import ConfigError
from aptp_ray.serve.metrics import HttpMeters

logger = logging.getLogger("ray.serve")

_ENVIRONMENT = "env:"
_SAFE = re.compile(r"[^A-Za-z0-9._:/-]")


class ApiKeys:
    """The keys that open the service. They are kept as digests, and are in no message and no log."""

    def __init__(self, source: str) -> None:
        """Reads keys: one a line, or with commas between them; ``#`` begins a comment.

        Args:
            source: ``env:NAME``, or a file.

        Raises:
            ConfigError: if there is no key at all.
        """
        if source.startswith(_ENVIRONMENT):
            name = source.removeprefix(_ENVIRONMENT)
            text = os.environ.get(name)
            if text is None:
                raise ConfigError(f"serve.api_keys: the environment variable {name} is not set where the ingress runs")
        else:
            try:
                text = Path(source).expanduser().read_text(encoding="utf-8")
            except OSError as error:
                raise ConfigError(f"serve.api_keys: cannot read {source} ({error.strerror or error})") from error
        lines = (line.split("#")[0] for line in text.splitlines())
        keys = {key.strip() for line in lines for key in line.split(",") if key.strip()}
        if not keys:
            raise ConfigError(f"serve.api_keys: {source} holds no key; write one a line, or null for a service open to all")
        self._digests = [_digest(key) for key in sorted(keys)]

    def __len__(self) -> int:
        return len(self._digests)

    def admits(self, authorization: str | None) -> bool:
        """Tells whether an Authorization header carries one of the keys; takes the same time whichever it is."""
        scheme, _, key = (authorization or "").partition(" ")
        given = _digest(key.strip())
        found = False
        for digest in self._digests:  # all of them, always
            found |= hmac.compare_digest(given, digest)
        return found and scheme.lower() == "bearer"


def _digest(key: str) -> bytes:
    # Digests are of one length, which is what a comparison in constant time needs.
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


@cache
def _meters() -> HttpMeters:
    return HttpMeters()  # where requests come in, not where the module is imported


class AccessLog:
    """ASGI middleware: one line a request, and its counters. A prompt is in neither.

    Handlers add facts to ``request.state.facts``. ``X-Request-Id`` comes from the client or from Serve, which also sends it back.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun, status = time.perf_counter(), 499  # of a client that left before it was answered
        facts: dict[str, Any] = {}
        scope.setdefault("state", {})["facts"] = facts

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, watched)
        finally:
            milliseconds = 1000 * (time.perf_counter() - begun)
            route = getattr(scope.get("route"), "path", None) or "other"  # a template: few of them, whatever clients send
            _meters().answered(route, status, milliseconds)
            line = {
                "request_id": request_id(scope),
                "method": scope["method"],
                "path": _SAFE.sub("?", scope["path"])[:200],
                "status": status,
                "ms": round(milliseconds, 1),
                **facts,
            }
            # Into the replica's file alone: what it writes to stderr, Ray sends to every driver, and prints once more there.
            logger.info("access %s", json.dumps(line), extra={"log_to_stderr": False})


def request_id(scope: Scope) -> str:
    """Returns the request's id, fit for a log line; Serve has made one where the client sent none."""
    for name, value in scope["headers"]:
        if name.lower() == b"x-request-id":
            return _SAFE.sub("?", value.decode("latin-1"))[:128]
    return ""
