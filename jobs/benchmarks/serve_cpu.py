"""Which part of a service takes the CPU: times of its processes, from Linux's /proc."""

from __future__ import annotations

import os
import re
import resource
from pathlib import Path

from aptp_ray.serve.run import APP_NAME

_REPLICA = f"ray::ServeReplica:{APP_NAME}:"
_TICKS = os.sysconf("SC_CLK_TCK")


def cpu_seconds() -> dict[str, float]:
    """Returns the CPU time so far of the service's parts, all threads and replicas of each, and of this process (clients)."""
    import ray

    session = ray._private.worker.global_worker.node.session_name
    own = resource.getrusage(resource.RUSAGE_SELF)
    found = {"clients": own.ru_utime + own.ru_stime}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            part = _part((process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace"))
            # Of a title in brackets, which may hold anything: state, parent, ..., utime (12th), stime.
            fields = (process / "stat").read_text().rpartition(")")[2].split()
            if part is None or session not in Path(f"/proc/{fields[1]}/cmdline").read_text(errors="replace"):
                continue
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended meanwhile
        found[part] = found.get(part, 0.0) + (int(fields[11]) + int(fields[12])) / _TICKS
    return found


def _part(title: str) -> str | None:
    if title.startswith(_REPLICA):
        name = re.split("[ #.]", title.removeprefix(_REPLICA))[0]
        return "experts" if name.startswith("expert-") else name
    return {"ray::ProxyActor": "proxy", "ray::ServeController": "controller"}.get(title.split(".")[0].strip())
