"""The passes of one step and of a validation: a worker's rows in parts, and losses that are the global batch's."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

Losses = dict[str, Tensor]

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """Returns the context in which a stage's forward runs."""
    return torch.autocast(device.type, _AUTOCAST.get(precision), enabled=precision in _AUTOCAST)


def weighted(losses: Losses, weights: dict[str, float]) -> Tensor:
    """Returns the weighted sum of named losses; a loss without a weight counts fully."""
    return torch.stack([weights.get(name, 1.0) * value.float() for name, value in losses.items()]).sum()


def backward(
    wrapped: nn.Module,
    inputs: dict[str, Any],
    *,
    rows: int,
    passes: int,
    weights: dict[str, float],
    share: float,
    scaler: torch.amp.GradScaler,
    context: AbstractContextManager[Any],
) -> tuple[Losses, dict[str, Any]]:
    """Adds the gradients of this rank's rows, in ``passes`` parts, as one pass over all of them would.

    Args:
        wrapped: the module, in DistributedDataParallel where there are several ranks.
        inputs: keyword arguments; what has ``rows`` first entries is cut where there are several passes.
        rows: of this rank.
        passes: at most as many as there are rows.
        weights: of the losses.
        share: this rank's rows over the mean of all ranks', by which DDP's mean over ranks is the mean over rows.
        scaler: of the losses in half precision.
        context: of the forward.

    Returns:
        means over this rank's rows: losses, without a graph, and statistics.
    """
    losses: Losses = {}
    statistics: dict[str, Any] = {}
    passes = min(passes, rows)
    for index, part in enumerate(_parts(inputs, rows, passes)):
        count = (index + 1) * rows // passes - index * rows // passes
        # Ranks exchange gradients once a step, with the last pass.
        quiet = isinstance(wrapped, nn.parallel.DistributedDataParallel) and index < passes - 1
        with wrapped.no_sync() if quiet else nullcontext():  # type: ignore[operator]
            with context:
                found, looked = wrapped(**part)
            scaler.scale(weighted(found, weights) * (share * count / rows)).backward()
        if passes == 1:
            return {name: value.detach() for name, value in found.items()}, looked
        for name, value in found.items():
            losses[name] = losses.get(name, torch.zeros_like(value.detach())) + value.detach() * (count / rows)
        for name, figure in looked.items():
            statistics[name] = statistics.get(name, 0.0) + figure * (count / rows)
    return losses, statistics


@torch.no_grad()
def evaluate(
    module: nn.Module, batches: Iterable[dict[str, Any]], *, share: float, world_size: int, context: AbstractContextManager[Any]
) -> dict[str, float]:
    """Returns the mean losses of some global batches, of which each rank gives its rows; on every rank alike."""
    module.eval()
    try:
        sums: dict[str, float] = {}
        number = 0
        for inputs in batches:
            with context:
                losses, _ = module(**inputs)
            number += 1
            for name, value in global_means(losses, share, world_size).items():
                sums[name] = sums.get(name, 0.0) + value
    finally:
        module.train()
    return {name: total / number for name, total in sums.items()}


def global_means(losses: Losses, share: float, world_size: int) -> dict[str, float]:
    """Returns losses of the global batch: a collective call."""
    values = torch.stack([value.detach().double() for value in losses.values()])
    if world_size > 1:
        values = values * (share / world_size)
        dist.all_reduce(values)
    return dict(zip(losses, values.tolist(), strict=True))


def to_device(inputs: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Moves arrays and tensors; leaves the rest."""

    def moved(value: Any) -> Any:
        if isinstance(value, np.ndarray):
            value = torch.from_numpy(value)
        return value.to(device, non_blocking=True) if isinstance(value, Tensor) else value

    return {name: moved(value) for name, value in inputs.items()}


def _parts(inputs: dict[str, Any], rows: int, count: int) -> Iterator[dict[str, Any]]:
    if count == 1:
        yield inputs
        return
    for index in range(count):
        part = slice(index * rows // count, (index + 1) * rows // count)
        yield {
            name: value[part] if isinstance(value, Tensor) and value.ndim and len(value) == rows else value
            for name, value in inputs.items()
        }
