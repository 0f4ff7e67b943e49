"""Importances as the prune stage measures them: its rows parted among the ranks, each result kept beside the checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load, save
from torch import Tensor

from aptp_ray.core.ablation import AblationPath, ablate
from aptp_ray.core.gates import GatedUNet
from aptp_ray.core.importance import Importance, measure_importance
from aptp_ray.core.macs import MacsModel
from aptp_ray.tracking import Progress
from aptp_ray.train.draws import noised_batch
from aptp_ray.train.worker import Worker


def measured_path(
    worker: Worker, gated: GatedUNet, macs: MacsModel, rows: dict[str, Any], alphas: Tensor, sizes: Sequence[float]
) -> AblationPath:
    """Measures importances on the teacher, and again at each of some MACs ratios on the way down; the same on every rank.

    Args:
        worker: of the prune stage.
        gated: the teacher.
        macs: the MACs of its codes.
        rows: decoded rows; each measurement draws its own noise for them.
        alphas: [train timesteps].
        sizes: MACs ratios; none: the teacher alone is measured.
    """

    def measure(code: Tensor, before: int) -> Importance:
        return _importance(worker, gated, macs, rows, alphas, code, before)

    return ablate(macs, measure, sizes, alignment=worker.config.router.alignment)


def _importance(
    worker: Worker, gated: GatedUNet, macs: MacsModel, rows: dict[str, Any], alphas: Tensor, code: Tensor, before: int
) -> Importance:
    kept = ("train", worker.name, f"importance-{before}.safetensors" if before else "importance.safetensors")
    count, entry_macs = len(rows["mean"]), macs.entry_macs(code)
    if worker.run.exists(*kept):
        return Importance(load(worker.run.read_bytes(*kept))["score"], entry_macs, num_samples=count)
    spec, place = worker.config.prune, worker.place
    mine = slice(place.rank, None, place.world_size)
    batch = noised_batch(rows, spec.loop.seed, alphas, mine, place.device, before)
    size = "" if not before else f" at {float(macs.ratio(code[None].double())[0]):.2f} of the MACs"
    progress: Progress | None = None

    def report(done: int, total: int) -> None:
        nonlocal progress
        progress = progress or Progress(f"importance{size}", total, unit="rows", enabled=place.rank == 0)
        progress.update(done)

    measured = measure_importance(gated, [batch], macs=macs, code=code, chunk=spec.importance_batch, progress=report)
    joined = torch.stack([measured.score * measured.num_samples, torch.full_like(measured.score, measured.num_samples)])
    if place.world_size > 1:
        joined = joined.to(place.device)
        dist.all_reduce(joined)
    score = (joined[0] / joined[1]).cpu()
    if place.rank == 0:
        worker.run.write_bytes(save({"score": score}), *kept)
    return Importance(score, entry_macs, num_samples=count)
