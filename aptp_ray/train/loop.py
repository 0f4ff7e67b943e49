"""The one training loop, for the teacher's VAE and UNet, pruning, and fine-tuning: a script of sections.

A stage hands in its parts (:class:`Parts`); everything else is here: data, steps, logging, checkpoints, resume.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import ray.train
import torch
from torch import nn

from aptp_ray.config import Loop, Schedule
from aptp_ray.tracking import Progress, Tracker, unet_flop_utilisation
from aptp_ray.train.checkpoints import load_state
from aptp_ray.train.feed import Feed, RowReader, Rows
from aptp_ray.train.passes import Losses, autocast, backward, evaluate, global_means, to_device
from aptp_ray.train.saver import Saver


@dataclass
class Parts:
    """What one stage gives to the loop.

    Attributes:
        module: ``forward(**inputs) -> (losses, statistics)``; its parameters that require gradients are trained.
        groups: parameter groups of AdamW; each carries ``lr`` and ``weight_decay``.
        weights: weight of each loss in the total; a loss that is not named counts fully.
        inputs: (rows of this rank, step, which rows of the global batch they are) -> keyword arguments of ``module``.
        validation_inputs: the same for held-out rows, with the number of the batch and then of the steps done; None: ``inputs``
            of negative steps, whose draws no training step has.
        decode: raw columns -> arrays, for the feed.
        save: writes the stage's outcome; called once, on rank 0, after the last step.
        lr_scale: (step, index of the group) -> factor, on top of the schedule.
        look: (tracker, steps done, statistics), called on rank 0 whenever a step is logged: figures that are dear to compute.
        draw: (tracker, steps done), called on rank 0 after each validation, with the weights that would be saved then.
        by_row: whether losses are means over rows, which ``Loop.accumulation`` may then take in parts.
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
    draw: Callable[[Tracker, int], None] | None = None
    macs_per_sample: float | None = None
    by_row: bool = True
    validation_inputs: Callable[[dict[str, Any], int, slice, int], dict[str, Any]] | None = None


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
    validation: RowReader | None = None,
) -> None:
    """Trains to ``loop.steps``, from the newest checkpoint of this run where there is one."""
    # -- state ---------------------------------------------------------------------------------------------------------------
    module, settings = parts.module.to(place.device), loop.optimizer
    learned = [p for p in module.parameters() if p.requires_grad]
    peaks = [group["lr"] for group in parts.groups]
    optimizer = torch.optim.AdamW(parts.groups, betas=settings.betas, fused=True)
    scaler = torch.amp.GradScaler(place.device.type, enabled=loop.precision == "fp16")
    ema = None
    if settings.ema_decay is not None:
        ema = {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}
    start, spent, metrics = 0, 0.0, dict[str, Any]()
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is not None:
        with checkpoint.as_directory() as folder:
            facts = load_state(folder, module=module, optimizer=optimizer, ema=ema)
        start, spent, metrics = facts["step"], facts["seconds"], facts["metrics"]
        scaler.load_state_dict(facts["scaler"])
    wrapped: nn.Module = module
    if place.world_size > 1:
        wrapped = nn.parallel.DistributedDataParallel(
            module, device_ids=[place.device] if place.device.type == "cuda" else None, forward_sync_buffers=False
        )
    saver = Saver(loop, rank=place.rank, world_size=place.world_size, device=place.device)
    context = autocast(place.device, loop.precision)

    # -- data ----------------------------------------------------------------------------------------------------------------
    feed = make_feed(reader, loop, place, parts)
    mine, rows_here = feed.mine, feed.mine.stop - feed.mine.start
    share = rows_here * place.world_size / loop.global_batch_size
    if place.rank == 0:
        epochs = loop.steps * loop.global_batch_size / feed.epoch_rows
        print(
            f"[{label}] {reader.num_rows} rows in {loop.num_lanes()} lanes; {feed.padding} of them are seen twice in an epoch; "
            f"{loop.steps} steps are {epochs:.3g} epochs",
            file=sys.stderr,
            flush=True,
        )
        tracker.log({"data/rows": reader.num_rows, "data/padding": feed.padding, "data/epochs": epochs}, step=start)

    def validated(done: int) -> dict[str, float]:
        if validation is None:
            return {}
        with _averaged(module, ema):
            batches = held_out(parts, make_feed(validation, loop, place, parts), loop.validation_batches, done, place)
            found = evaluate(module, batches, share=share, world_size=place.world_size, context=context)
            if parts.draw is not None and place.rank == 0:
                parts.draw(tracker, done)
        tracker.log({f"validation/{name}": value for name, value in found.items()}, step=done)
        return found

    # -- steps ---------------------------------------------------------------------------------------------------------------
    progress = Progress(label, loop.steps, start=start, enabled=place.rank == 0)
    begun = logged_at = time.monotonic()
    logged_step = start
    stream = feed.batches(start) if start < loop.steps else iter(())
    for step, rows in zip(range(start, loop.steps), stream, strict=False):
        for index, group in enumerate(optimizer.param_groups):
            group["lr"] = peaks[index] * learning_rate(step, loop.steps, settings) * parts.lr_scale(step, index)
        inputs = to_device(parts.inputs(rows, step, mine), place.device)
        optimizer.zero_grad(set_to_none=True)
        losses, statistics = backward(
            wrapped,
            inputs,
            rows=rows_here,
            passes=loop.accumulation if parts.by_row else 1,
            weights=parts.weights,
            share=share,
            scaler=scaler,
            context=context,
        )
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(learned, settings.clip_norm)
        problem = _divergence(losses, norm, step, label, peaks, loop.precision)
        if problem is not None:  # on every rank: gradients are those of all
            saver.wait()
            raise FloatingPointError(problem)
        scaler.step(optimizer)
        scaler.update()
        if ema is not None:
            _average(ema, module, settings.ema_decay or 0.0, step)

        # -- log, validate, checkpoint -----------------------------------------------------------------------------------------
        done = step + 1
        last = done == loop.steps
        if done % loop.log_every_steps == 0 or last:
            now = time.monotonic()
            means = global_means(losses, share, place.world_size)
            metrics = {f"loss/{name}": value for name, value in means.items()} | {
                "loss/total": sum(parts.weights.get(name, 1.0) * value for name, value in means.items()),
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
        if loop.validate_every_steps is not None and done % loop.validate_every_steps == 0 and not last:
            validated(done)
        if saver.due(done):
            facts = {"step": done, "seconds": spent + time.monotonic() - begun}
            kept = facts | {"metrics": metrics, "scaler": scaler.state_dict()}
            saver.keep(metrics | facts, module=module, optimizer=optimizer, ema=ema, facts=kept)

    # -- outcome -------------------------------------------------------------------------------------------------------------
    # Also where a run was killed after its last step: what a step leaves is in the checkpoint.
    outcome: dict[str, Any] = {}
    final = validated(loop.steps)
    if place.rank == 0:
        if final:
            figures = ", ".join(f"{name} {value:.5g}" for name, value in final.items())
            print(f"[{label}] validation after step {loop.steps}: {figures}", file=sys.stderr, flush=True)
        if ema is not None:
            _swap(module, ema)
        seconds = spent + time.monotonic() - begun
        outcome = {"steps": loop.steps, "train_seconds": round(seconds, 1), **metrics}
        outcome = parts.save(module, outcome | {f"validation/{name}": value for name, value in final.items()})
        tracker.summary({name: value for name, value in outcome.items() if isinstance(value, (int, float))})
    # Every worker reports equally often (the contract of ray.train.report), so all of them report the outcome's turn.
    ray.train.report({"outcome": outcome, "step": loop.steps})
    tracker.finish()


def make_feed(reader: RowReader, loop: Loop, place: Place, parts: Parts) -> Feed:
    """Returns this rank's feed over a reader."""
    return Feed(
        reader,
        global_batch_size=loop.global_batch_size,
        rank=place.rank,
        world_size=place.world_size,
        seed=loop.seed,
        window=loop.shuffle_window,
        lanes=loop.num_lanes(),
        decode=parts.decode,
    )


def held_out(parts: Parts, feed: Feed, count: int, done: int, place: Place) -> Iterator[dict[str, Any]]:
    """Yields the inputs of the same global batches, with the same draws, each time."""
    for index, rows in enumerate(islice(feed.batches(), count)):
        if parts.validation_inputs is not None:
            inputs = parts.validation_inputs(rows, index, feed.mine, done)
        else:
            inputs = parts.inputs(rows, -1 - index, feed.mine)
        yield to_device(inputs, place.device)


def _divergence(losses: Losses, norm: torch.Tensor, step: int, label: str, peaks: list[float], precision: str) -> str | None:
    """Says what is not finite, with the step and the losses by name; None where all is well."""
    sound = torch.stack([torch.isfinite(value).all() for value in losses.values()]).all()
    # With fp16, gradients that overflow are a matter of the scaler, which leaves such a step out.
    if bool(sound & (torch.isfinite(norm) | (precision == "fp16"))):
        return None
    values = {name: float(value) for name, value in losses.items()}
    broken = [name for name, value in values.items() if not math.isfinite(value)]
    what = f"loss {', '.join(broken)} is" if broken else "the gradient is"
    return (
        f"[{label}] {what} not finite at step {step} (losses {values}): lower the learning rate "
        f"({', '.join(map(str, peaks))}) or use precision fp32; the last checkpoint is kept"
    )


@torch.no_grad()
def _average(ema: dict[str, torch.Tensor], module: nn.Module, decay: float, step: int) -> None:
    # The usual ramp, so that the average forgets the random start: min(decay, (1 + n) / (10 + n)).
    decay = min(decay, (1 + step) / (10 + step))
    current: list[torch.Tensor] = [p for p in module.parameters() if p.requires_grad]
    torch._foreach_lerp_(list(ema.values()), current, 1 - decay)


@contextmanager
def _averaged(module: nn.Module, ema: dict[str, torch.Tensor] | None) -> Iterator[None]:
    """Puts the averaged weights, those that are saved in the end, in place for the time of the block."""
    if ema is None:
        yield
        return
    _swap(module, ema)
    try:
        yield
    finally:
        _swap(module, ema)


@torch.no_grad()
def _swap(module: nn.Module, ema: dict[str, torch.Tensor]) -> None:
    for name, parameter in module.named_parameters():
        if name in ema:
            kept = parameter.detach().clone()
            parameter.copy_(ema[name])
            ema[name].copy_(kept)


def _flat(statistics: dict[str, Any]) -> dict[str, float]:
    """Statistics by name; the items of a list are numbered."""
    flat: dict[str, float] = {}
    for name, value in statistics.items():
        if isinstance(value, (list, tuple)):
            flat |= {f"stat/{name}/{index}": float(item) for index, item in enumerate(value)}
        else:
            flat[f"stat/{name}"] = float(value)
    return flat
