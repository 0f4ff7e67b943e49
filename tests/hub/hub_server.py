"""The part of the Hugging Face hub's HTTP interface that pushing and pulling a model repository takes, on loopback."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

_COMMIT = "c0ffee" * 6 + "c0ff"  # 40 hexadecimal digits: one revision is enough


class Hub(ThreadingHTTPServer):
    """Repositories in memory.

    Attributes:
        repos: name -> {path: content}.
        made: name -> what the client said of it when it made it.
        downloads: paths that were fetched, in order.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[str, dict[str, bytes]] = {}
        self.made: dict[str, dict[str, Any]] = {}
        self.downloads: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Says nothing."""

    def do_POST(self) -> None:  # noqa: N802
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = self.path.split("?")[0].strip("/").split("/")
        if parts == ["api", "repos", "create"]:
            told = json.loads(body)
            repo = "/".join(filter(None, [told.get("organization"), told["name"]]))
            self.server.repos.setdefault(repo, {})
            self.server.made[repo] = told
            self._json({"url": f"{self.server.url}/{repo}"})
        elif parts[1] == "validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif "preupload" in parts:
            files = json.loads(body)["files"]
            self._json({"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]})
        elif "commit" in parts:
            repo = "/".join(parts[2:4])
            for line in body.decode().splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    self.server.repos[repo][entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            self._json({"success": True, "commitOid": _COMMIT, "commitUrl": f"{self.server.url}/{repo}/commit/{_COMMIT}"})
        else:
            self.send_error(404)

    def do_HEAD(self) -> None:  # noqa: N802
        self._file(body=False)

    def do_GET(self) -> None:  # noqa: N802
        parts = self.path.split("?")[0].strip("/").split("/")
        if parts[:2] != ["api", "models"]:
            self._file(body=True)
            return
        repo = "/".join(parts[2:4])
        if repo not in self.server.repos:
            self._missing("RepoNotFound")
            return
        siblings = [{"rfilename": path} for path in sorted(self.server.repos[repo])]
        if parts[4:5] == ["tree"]:
            self._json([{"type": "file", "path": s["rfilename"], "size": 1, "oid": "0"} for s in siblings])
        else:
            self._json({"id": repo, "sha": _COMMIT, "siblings": siblings, "tags": [], "private": True, "downloads": 0})

    def _file(self, *, body: bool) -> None:
        owner, name, _, _, *rest = self.path.split("?")[0].strip("/").split("/")
        content = self.server.repos.get(f"{owner}/{name}", {}).get("/".join(rest))
        if content is None:
            self._missing("EntryNotFound")
            return
        self.send_response(200)
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", _COMMIT)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.server.downloads.append("/".join(rest))
            self.wfile.write(content)

    def _json(self, value: Any) -> None:
        content = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _missing(self, code: str) -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()


@contextmanager
def serving() -> Iterator[Hub]:
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()
