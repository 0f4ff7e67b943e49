"""Weights & Biases on rank 0, offline where there is no key, and progress lines on standard error."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

from aptp_ray.config import Config


class Tracker:
    """Logs metrics of one stage to Weights & Biases; on ranks other than 0 it does nothing.

    Metric names are those of the losses (``loss/denoising`` ...), plus ``lr``, ``samples_per_second`` and the like. The config
    is logged without its secrets (``Config.masked``).
    """

    def __init__(
        self,
        *,
        project: str,
        name: str,
        config: Config,
        entity: str | None = None,
        mode: str = "auto",
        directory: str | None = None,
        rank: int = 0,
        run_id: str | None = None,
    ) -> None:
        self._run = None
        if rank != 0 or mode == "disabled":
            return
        import wandb

        if mode == "auto":
            mode = "online" if os.environ.get("WANDB_API_KEY") else "offline"
        folder = Path(directory or "~/.cache/aptp_ray/wandb").expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        # A run that goes on after a kill goes on as the same W&B run (resume="allow" with the same id).
        self._run = wandb.init(
            project=project,
            entity=entity,
            name=name,
            id=run_id,
            resume="allow" if run_id else None,
            config=config.masked(),
            mode=mode,  # type: ignore[arg-type]
            dir=str(folder),
            settings=wandb.Settings(silent=True, console="off"),
        )

    def log(self, metrics: dict[str, Any], step: int) -> None:
        if self._run is not None:
            self._run.log(metrics, step=step)

    def finish(self) -> None:
        if self._run is not None:
            self._run.finish()
            self._run = None


class Progress:
    """Prints one line a second at most, with rate and time left; silent where standard error is no terminal.

    Set ``APTP_PROGRESS=1`` to print anyway, once every ten seconds (logs of a cluster).
    """

    def __init__(self, label: str, total: int, *, unit: str = "steps", start: int = 0, enabled: bool = True) -> None:
        self._label, self._total, self._unit, self._start = label, total, unit, start
        terminal = sys.stderr.isatty()
        self._interval = 1.0 if terminal else 10.0
        self._enabled = enabled and (terminal or os.environ.get("APTP_PROGRESS") == "1")
        self._begun = self._last = time.monotonic()

    def update(self, done: int, note: str = "") -> None:
        now = time.monotonic()
        if not self._enabled or (now - self._last < self._interval and done < self._total):
            return
        self._last = now
        rate = (done - self._start) / max(now - self._begun, 1e-9)
        left = (self._total - done) / rate if rate > 0 else float("inf")
        eta = f"{left:.0f} s left" if left < 1e6 else "-"
        line = f"[{self._label}] {done}/{self._total} {self._unit}, {rate:.1f}/s, {eta} {note}"
        print(line.rstrip(), file=sys.stderr, flush=True)
