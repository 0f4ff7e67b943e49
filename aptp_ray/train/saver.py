"""When a run's state is kept, and how it gets to storage: beside the training, in the background."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray.train
import torch
import torch.distributed as dist
from ray.train import CheckpointConsistencyMode, CheckpointUploadMode
from torch import Tensor, nn

from aptp_ray.config import Loop
from aptp_ray.train.checkpoints import save_state

# For which a run that is about to fail waits for its last checkpoint to be in storage.
_UPLOAD_SECONDS = 600.0


class Saver:
    """Keeps checkpoints by steps and by minutes; every rank makes one and calls it alike."""

    def __init__(self, loop: Loop, *, rank: int, world_size: int, device: torch.device) -> None:
        """Removes what a killed predecessor on this machine has left of its uploads."""
        self._loop, self._rank, self._world_size, self._device = loop, rank, world_size, device
        self._kept_at = time.monotonic()
        context = ray.train.get_context()
        run = f"{context.get_storage().experiment_fs_path}"
        self._prefix = f"aptp-checkpoint-{hashlib.sha256(run.encode()).hexdigest()[:16]}-"
        if rank == 0:
            for left in Path(tempfile.gettempdir()).glob(f"{self._prefix}*"):
                shutil.rmtree(left, ignore_errors=True)

    def due(self, done: int) -> bool:
        """Tells, on every rank alike, whether a checkpoint is kept after ``done`` steps.

        A collective call where minutes count: clocks differ, so rank 0's decides.
        """
        if done == self._loop.steps or done % self._loop.checkpoint_every_steps == 0:
            return True
        minutes = self._loop.checkpoint_every_minutes
        if minutes is None:
            return False
        late = time.monotonic() - self._kept_at >= 60 * minutes
        if self._world_size == 1:
            return late
        decision = torch.tensor([late], dtype=torch.uint8, device=self._device)
        dist.broadcast(decision, src=0)
        return bool(decision)

    def keep(
        self,
        metrics: dict[str, Any],
        *,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        ema: Mapping[str, Tensor] | None,
        facts: dict[str, Any],
    ) -> None:
        """Reports the state; every rank calls it, rank 0 alone writes (the contract of ``ray.train.report``).

        The state is copied to this machine's disk before training goes on, and from there to storage meanwhile. The last
        one of a run is waited for: what comes after it counts on its being there.
        """
        self._kept_at = time.monotonic()
        last = facts["step"] == self._loop.steps
        mode = CheckpointUploadMode.SYNC if last else CheckpointUploadMode.ASYNC
        if self._rank != 0:
            ray.train.report(metrics, checkpoint_upload_mode=mode)
            return
        folder = tempfile.mkdtemp(prefix=self._prefix)
        save_state(folder, module=module, optimizer=optimizer, ema=ema, facts=facts)
        ray.train.report(
            metrics,
            checkpoint=ray.train.Checkpoint.from_directory(folder),
            checkpoint_upload_mode=mode,
            delete_local_checkpoint_after_upload=True,
        )

    def wait(self) -> None:
        """Waits until what was kept last is in storage, and on record: a worker that fails takes its uploads along."""
        ray.train.get_all_reported_checkpoints(CheckpointConsistencyMode.COMMITTED, timeout_s=_UPLOAD_SECONDS)
