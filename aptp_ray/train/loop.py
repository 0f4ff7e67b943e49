"""The one training loop, for the teacher's VAE and UNet, pruning, and fine-tuning: a script of sections.

A stage hands in its parts (:class:`Parts`); everything else is here: data, steps, logging, checkpoints, resume.
"""

from __future__ import annotations

import math
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import ray.train
import torch
from torch import Tensor, nn

from aptp_ray.config import Loop, Schedule
from aptp_ray.tracking import Progress, Tracker, unet_flop_utilisation
from aptp_ray.train.checkpoints import load_state, save_state
from aptp_ray.train.feed import Feed, RowReader, Rows

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Parts:
    """What one stage gives to the loop.

    Attributes:
        module: ``forward(**inputs) -> (losses, statistics)``; its parameters that require gradients are trained.
        groups: parameter groups of AdamW; each carries ``lr`` and ``weight_decay``.
        weights: weight of each loss in the total; a loss that is not named counts fully.
        inputs: (rows of this rank, step, rows of the global batch before mine) -> keyword arguments of ``module``.
        decode: raw columns -> arrays, for the feed.
        save: writes the stage's outcome; called once, on rank 0, after the last step.
        lr_scale: (step, index of the group) -> factor, on top of the schedule.
        look: (tracker, steps done, statistics), called on rank 0 whenever a step is logged: figures that are dear to compute.
        macs_per_sample: of all UNet passes of a step, for the FLOP utilisation (see ``unet_flop_utilisation``).
    """

    module: nn.Module
    groups: list[dict[str, Any]]
    inputs: Callable[[dict[str, Any], int, slice], dict[str, Any]]
    decode: Callable[[Rows], dict[str, Any]]
    save: Callable[[nn.Module, dict[str, Any]], dict[str, Any]]
    weights: dict[str, float] = field(default_factory=dict)
    lr_scale: Callable[[int, int], float] = lambda step, group: 1.0
    look: Callable[[Tracker, int, dict[str, Any]], None] | None = None
    macs_per_sample: float | None = None


@dataclass(frozen=True)
class Place:
    """Where a worker stands."""

    rank: int
    world_size: int
    device: torch.device


def learning_rate(step: int, steps: int, optimizer: Schedule) -> float:
    """Returns the learning rate of a step, as a fraction of its peak."""
    if step < optimizer.warmup_steps:
        return (step + 1) / optimizer.warmup_steps
    if optimizer.schedule == "constant":
        return 1.0
    begin = steps // 2 if optimizer.schedule == "constant_cosine" else optimizer.warmup_steps
    if step < begin:
        return 1.0
    progress = (step - begin) / max(1, steps - begin)
    low = optimizer.final_lr_fraction
    return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * progress))


def place_of_worker(threads: int) -> Place:
    """Returns rank, world size and device, and sets torch's threads on purpose.

    Ray sets OMP_NUM_THREADS from an actor's num_cpus (1 where that is a fraction), which is not what a CPU worker should use.
    """
    context = ray.train.get_context()
    device = ray.train.torch.get_device()
    if device.type == "cpu":
        torch.set_num_threads(threads)
    return Place(context.get_world_rank(), context.get_world_size(), device)


def run_loop(
    parts: Parts,
    loop: Loop,
    *,
    place: Place,
    reader: RowReader,
    tracker: Tracker,
    label: str,
    peak_flops: float | None = None,
) -> None:
    """Trains to ``loop.steps``, from the newest checkpoint of this run where there is one."""
    # -- state ---------------------------------------------------------------------------------------------------------------
    module, settings = parts.module.to(place.device), loop.optimizer
    learned = [p for p in module.parameters() if p.requires_grad]
    peaks = [group["lr"] for group in parts.groups]
    optimizer = torch.optim.AdamW(parts.groups, betas=settings.betas, fused=True)
    ema = None
    if settings.ema_decay is not None:
        ema = {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}
    start, spent = 0, 0.0
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is not None:
        with checkpoint.as_directory() as folder:
            facts = load_state(folder, module=module, optimizer=optimizer, ema=ema)
        start, spent = facts["step"], facts["seconds"]
    wrapped: nn.Module = module
    if place.world_size > 1:
        wrapped = nn.parallel.DistributedDataParallel(
            module, device_ids=[place.device] if place.device.type == "cuda" else None, forward_sync_buffers=False
        )
    scaler = torch.amp.GradScaler(place.device.type, enabled=loop.precision == "fp16")

    # -- data ----------------------------------------------------------------------------------------------------------------
    feed = Feed(
        reader,
        global_batch_size=loop.global_batch_size,
        rank=place.rank,
        world_size=place.world_size,
        seed=loop.seed,
        window=loop.shuffle_window,
        lanes=loop.num_lanes(),
        decode=parts.decode,
    )
    local = loop.global_batch_size // place.world_size
    mine = slice(place.rank * local, (place.rank + 1) * local)
    if place.rank == 0:
        epochs = loop.steps * loop.global_batch_size / feed.epoch_rows
        print(
            f"[{label}] {reader.num_rows} rows in {loop.num_lanes()} lanes; {feed.padding} of them are seen twice in an epoch; "
            f"{loop.steps} steps are {epochs:.3g} epochs",
            file=sys.stderr,
            flush=True,
        )
        tracker.log({"data/rows": reader.num_rows, "data/padding": feed.padding, "data/epochs": epochs}, step=start)

    # -- steps ---------------------------------------------------------------------------------------------------------------
    progress = Progress(label, loop.steps, start=start, enabled=place.rank == 0)
    begun = logged_at = time.monotonic()
    logged_step, metrics = start, {}
    stream = feed.batches(start) if start < loop.steps else iter(())
    for step, rows in zip(range(start, loop.steps), stream, strict=False):
        for index, group in enumerate(optimizer.param_groups):
            group["lr"] = peaks[index] * learning_rate(step, loop.steps, settings) * parts.lr_scale(step, index)
        inputs = {k: _to(v, place.device) for k, v in parts.inputs(rows, step, mine).items()}
        with torch.autocast(place.device.type, _AUTOCAST.get(loop.precision), enabled=loop.precision in _AUTOCAST):
            losses, statistics = wrapped(**inputs)
        total = weighted(losses, parts.weights)
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(total).backward()
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(learned, settings.clip_norm)
        if not torch.isfinite(norm) and loop.precision != "fp16":
            raise FloatingPointError(
                f"[{label}] the gradient is not finite at step {step} (losses {_floats(losses)}): lower the learning rate "
                f"({', '.join(map(str, peaks))}) or use precision fp32; the last checkpoint is kept"
            )
        scaler.step(optimizer)
        scaler.update()
        if ema is not None:
            _average(ema, module, settings.ema_decay or 0.0, step)

        # -- log, checkpoint -------------------------------------------------------------------------------------------------
        done = step + 1
        last = done == loop.steps
        if done % loop.log_every_steps == 0 or last:
            now = time.monotonic()
            metrics = {f"loss/{name}": value for name, value in _floats(losses).items()} | {
                "loss/total": float(total.detach()),
                "gradient_norm": float(norm),
                "lr": optimizer.param_groups[0]["lr"],
                "samples_per_second": (done - logged_step) * loop.global_batch_size / max(now - logged_at, 1e-9),
                **_flat(statistics),
            }
            if parts.macs_per_sample is not None and peak_flops is not None:
                rate = metrics["samples_per_second"]
                metrics["unet_flop_utilisation"] = unet_flop_utilisation(parts.macs_per_sample, rate, peak_flops)
            logged_step, logged_at = done, now
            tracker.log(metrics, step=done)
            if parts.look is not None and place.rank == 0:
                parts.look(tracker, done, statistics)
            progress.update(done, f"loss {metrics['loss/total']:.4f}")
        if done % loop.checkpoint_every_steps == 0 or last:
            facts = {"step": done, "seconds": spent + time.monotonic() - begun}
            _report(metrics | facts, module, optimizer, ema, place)

    # -- outcome -------------------------------------------------------------------------------------------------------------
    outcome: dict[str, Any] = {}
    if place.rank == 0:
        if ema is not None:
            _swap(module, ema)
        seconds = spent + time.monotonic() - begun
        outcome = parts.save(module, {"steps": loop.steps, "train_seconds": round(seconds, 1), **metrics})
    # Every worker reports equally often (the contract of ray.train.report), so all of them report the outcome's turn.
    ray.train.report({"outcome": outcome, "step": loop.steps})
    tracker.finish()


def weighted(losses: dict[str, Tensor], weights: dict[str, float]) -> Tensor:
    """Returns the weighted sum of named losses; a loss without a weight counts fully."""
    return torch.stack([weights.get(name, 1.0) * value.float() for name, value in losses.items()]).sum()


def _report(metrics: dict[str, Any], module: nn.Module, optimizer: Any, ema: Any, place: Place) -> None:
    if place.rank != 0:
        ray.train.report(metrics)
        return
    with tempfile.TemporaryDirectory() as folder:
        facts = {"step": metrics["step"], "seconds": metrics["seconds"]}
        save_state(folder, module=module, optimizer=optimizer, ema=ema, facts=facts)
        ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder))


@torch.no_grad()
def _average(ema: dict[str, Tensor], module: nn.Module, decay: float, step: int) -> None:
    # The usual ramp, so that the average forgets the random start: min(decay, (1 + n) / (10 + n)).
    decay = min(decay, (1 + step) / (10 + step))
    current: list[Tensor] = [p for p in module.parameters() if p.requires_grad]
    torch._foreach_lerp_(list(ema.values()), current, 1 - decay)


@torch.no_grad()
def _swap(module: nn.Module, ema: dict[str, Tensor]) -> None:
    for name, parameter in module.named_parameters():
        if name in ema:
            kept = parameter.detach().clone()
            parameter.copy_(ema[name])
            ema[name].copy_(kept)


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(value)
    return value.to(device, non_blocking=True) if isinstance(value, Tensor) else value


def _floats(losses: dict[str, Tensor]) -> dict[str, float]:
    return {name: float(value.detach()) for name, value in losses.items()}


def _flat(statistics: dict[str, Any]) -> dict[str, float]:
    """Statistics by name; the items of a list are numbered."""
    flat: dict[str, float] = {}
    for name, value in statistics.items():
        if isinstance(value, (list, tuple)):
            flat |= {f"stat/{name}/{index}": float(item) for index, item in enumerate(value)}
        else:
            flat[f"stat/{name}"] = float(value)
    return flat
