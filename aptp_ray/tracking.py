"""Weights & Biases on rank 0, offline where there is no key, and progress lines on standard error.

Nothing here ever stops training: what Weights & Biases refuses is warned about once, and the run goes on without it.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from aptp_ray.config import Config

_LOG = logging.getLogger(__name__)

# Seconds that the end of a run waits for the last uploads; what is left stays on disk, for `wandb sync`.
FINISH_TIMEOUT = 120.0

# Dense peak of tensor cores in half precision with accumulation in 32 bits, in TFLOP/s, from NVIDIA's data sheets. The first
# name that a device's name holds counts.
_PEAK_TFLOPS = {
    "B200": 2250.0,
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "A10G": 70.0,
    "L4": 121.0,
    "V100": 125.0,
    "T4": 65.0,
}


class Tracker:
    """Logs one stage, or one expert, to Weights & Biases; on ranks other than 0 it does nothing.

    Metric names are those of the losses (``loss/denoising`` ...), plus ``lr``, ``samples_per_second``,
    ``unet_flop_utilisation`` and the like. The config is logged without its secrets (``Config.masked``), with the revision of
    the working tree that the code comes from. Run names are ``<config.name>-<stage>``; runs of one ``config.name`` are a group.
    """

    def __init__(
        self,
        *,
        project: str,
        name: str,
        config: Config,
        entity: str | None = None,
        group: str | None = None,
        mode: str = "auto",
        directory: str | None = None,
        rank: int = 0,
        run_id: str | None = None,
        revision: str | None = None,
    ) -> None:
        """Begins the run, or goes on with it.

        Args:
            project: of Weights & Biases.
            name: of the run.
            config: logged, masked.
            entity: of Weights & Biases; null: the account's own.
            group: what runs belong together; by default ``config.name``.
            mode: "auto" is online where ``WANDB_API_KEY`` is set, else offline; or "online", "offline", "disabled".
            directory: of the offline files; by default a cache in the home directory.
            rank: of this worker.
            run_id: the same for all attempts at one stage: a run that goes on after a kill goes on as the same W&B run.
            revision: of the code; by default that of the working tree around this file, if it is one.
        """
        self._run: Any = None
        self._mode, self._warned = mode, set[str]()
        if rank != 0 or mode == "disabled":
            return
        if mode == "auto":
            mode = "online" if os.environ.get("WANDB_API_KEY") else "offline"
        arguments = {
            "project": project,
            "entity": entity,
            "name": name,
            "group": group or config.name,
            "id": run_id,
            "config": config.masked() | {"git_revision": revision or git_revision()},
        }
        # An outage when a run begins: what it logs is kept on disk, for `wandb sync`.
        for attempt in dict.fromkeys((mode, "offline")):
            self._run = self._try(f"begin the {attempt} run", partial(_begin, attempt, directory, arguments))
            if self._run is not None:
                self._mode = attempt
                return

    @classmethod
    def of(cls, config: Config, stage: str, **others: Any) -> Tracker:
        """Begins the run of one stage, or one expert, where and as the config says; ``others`` as in the constructor."""
        own = config.tracking
        name = f"{config.name}-{stage}"
        return cls(config=config, name=name, project=own.project, entity=own.entity, mode=own.mode, **others)

    @property
    def enabled(self) -> bool:
        """Whether anything is logged: for what is dear to compute and would go nowhere."""
        return self._run is not None

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        """Logs scalars by name; those of one step may come in several calls."""
        self._log(dict(metrics), step)

    def log_bars(self, name: str, values: Sequence[float] | Mapping[str, float], step: int) -> None:
        """Logs one bar for each expert (a sequence) or each named thing, as a chart and its table ``<name>_table``."""
        named = dict(values) if isinstance(values, Mapping) else {str(index): value for index, value in enumerate(values)}
        rows = [[label, float(value)] for label, value in named.items()]

        def chart() -> dict[str, Any]:
            import wandb

            return {name: wandb.plot.bar(wandb.Table(columns=["label", "value"], data=rows), "label", "value", title=name)}

        self._log(chart, step)

    def log_heatmap(self, name: str, matrix: Any, step: int, labels: Sequence[str] | None = None) -> None:
        """Logs a matrix [n, n] of values in -1..1, as a picture (blue: negative, red: positive) and a table ``<name>_table``.

        Raises:
            ValueError: if it is no matrix.
        """
        values = np.asarray(matrix, dtype=np.float64)
        if values.ndim != 2:
            raise ValueError(f"a heat map needs a matrix, got shape {list(values.shape)}")
        names = [str(label) for label in labels or range(max(values.shape))]
        rows = [[names[row], *map(float, line)] for row, line in enumerate(values)]

        def picture() -> dict[str, Any]:
            import wandb

            table = wandb.Table(columns=["", *names[: values.shape[1]]], data=rows)
            return {name: wandb.Image(heatmap(values), caption=name), f"{name}_table": table}

        self._log(picture, step)

    def log_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int) -> None:
        """Logs a table, of prompts and their experts for instance."""

        def table() -> dict[str, Any]:
            import wandb

            return {name: wandb.Table(columns=list(columns), data=[list(row) for row in rows])}

        self._log(table, step)

    def log_images(self, name: str, images: Sequence[Any], step: int, captions: Sequence[str] | None = None) -> None:
        """Logs pictures: PIL images, or uint8 arrays [height, width, 3]."""
        texts: Sequence[str | None] = captions if captions is not None else [None] * len(images)

        def pictures() -> dict[str, Any]:
            import wandb

            return {name: [wandb.Image(image, caption=text) for image, text in zip(images, texts, strict=True)]}

        self._log(pictures, step)

    def log_page(self, name: str, html: str, step: int) -> None:
        """Logs a self-contained page."""

        def page() -> dict[str, Any]:
            import wandb

            return {name: wandb.Html(html, inject=False)}

        self._log(page, step)

    def summary(self, values: Mapping[str, Any]) -> None:
        """Sets the run's final figures."""
        if self._run is not None:
            self._try("set the summary", lambda: self._run.summary.update(dict(values)))

    def finish(self) -> None:
        """Ends the run; waits for its last uploads, but not for ever."""
        run, self._run = self._run, None
        if run is None:
            return
        self._try("end the run", run.finish)
        if self._mode == "offline":  # finish() returns before the last block is on disk, and Ray may kill this process next
            self._try("write the run", _write_out)

    def _log(self, metrics: dict[str, Any] | Callable[[], dict[str, Any]], step: int) -> None:
        if self._run is not None:
            self._try("log", lambda: self._run.log(metrics() if callable(metrics) else metrics, step=step))

    def _try(self, what: str, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except Exception as error:  # of whatever kind, wandb's or the network's: metrics are not worth a training run
            if what not in self._warned:
                self._warned.add(what)
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                _LOG.warning("Weights & Biases could not %s, and training goes on without: %s", what, reason)
            return None


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


def unet_flop_utilisation(macs_per_sample: float, samples_per_second: float, peak_flops: float) -> float:
    """Returns the share of the devices' peak that the UNets' matrix products and convolutions use.

    Args:
        macs_per_sample: of all UNet passes of a step: a forward counts once, a backward to the inputs alone once more, one to
            the weights as well twice. With masks that is the whole UNet: a masked channel is computed all the same.
        samples_per_second: over all workers.
        peak_flops: of all workers' devices together, in FLOP/s.

    Raises:
        ValueError: if the peak is not positive.
    """
    if not peak_flops > 0:
        raise ValueError(f"peak_flops must be positive, got {peak_flops}: set tracking.peak_tflops to one device's peak")
    return 2 * macs_per_sample * samples_per_second / peak_flops  # a multiply-accumulate is two operations


def known_peak_tflops(device_name: str, precision: str) -> float | None:
    """Returns the peak of a known GPU (``torch.cuda.get_device_name()``) in bf16 or fp16, else None."""
    if precision not in ("bf16", "fp16"):
        return None  # fp32 is one figure with TF32 and another without
    return next((peak for name, peak in _PEAK_TFLOPS.items() if name in device_name), None)


def git_revision(folder: str | Path | None = None) -> str | None:
    """Returns the commit of the working tree that holds this package, with ``+changes`` where files differ from it.

    None where the package does not stand in a working tree that tracks it (it was installed), or there is no git.
    """
    here = Path(folder) if folder is not None else Path(__file__).parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        if not git("ls-files", "."):  # a virtual environment inside some other repository
            return None
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def heatmap(values: np.ndarray, cell: int = 24) -> Image.Image:
    """Draws a matrix of values in -1..1: white is 0, red 1, blue -1, grey no number."""
    clipped = np.nan_to_num(values, nan=0.0).clip(-1, 1)[..., None]
    red, blue, white = np.array([178, 24, 43]), np.array([33, 102, 172]), np.array([255, 255, 255])
    colors = white + np.where(clipped > 0, clipped * (red - white), -clipped * (blue - white))
    colors = np.where(np.isfinite(values)[..., None], colors, 160)
    rows, columns = values.shape
    drawing = Image.fromarray(colors.round().astype(np.uint8)).resize((columns * cell, rows * cell), Image.Resampling.NEAREST)
    lines = ImageDraw.Draw(drawing)
    for index in range(1, max(rows, columns)):
        lines.line([(index * cell, 0), (index * cell, rows * cell)], fill=(220, 220, 220))
        lines.line([(0, index * cell), (columns * cell, index * cell)], fill=(220, 220, 220))
    return drawing


def _write_out() -> None:
    import wandb

    wandb.teardown()


def _begin(mode: str, directory: str | None, arguments: dict[str, Any]) -> Any:
    import wandb

    folder = Path(directory or "~/.cache/aptp_ray/wandb").expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    # The command line and the remote's address, which wandb would record, may hold secrets; the revision is in the config.
    settings: dict[str, Any] = {"silent": True, "console": "off", "disable_git": True, "x_disable_meta": True}
    if "finish_timeout" in wandb.Settings.model_fields:  # not in the oldest versions that we allow
        settings["finish_timeout"] = FINISH_TIMEOUT
    # Offline there is nothing to ask; the second attempt's files have the same id, and syncing joins them.
    resume = "allow" if arguments["id"] and mode == "online" else None
    given: dict[str, Any] = arguments | {"mode": mode, "resume": resume, "dir": str(folder)}
    return wandb.init(**given, settings=wandb.Settings(**settings))
