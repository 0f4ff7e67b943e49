"""Do fewer multiply-accumulates take less time? Experts cut from a UNet of Stable Diffusion 2.1's shape, against that UNet.

The codes are drawn at random, so what stays is spread over all sites and depths; time depends on how much stays, not on which.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from aptp_ray.core.budget import meet_budget
from aptp_ray.core.macs import MacsModel
from aptp_ray.core.prune import prune_unet
from aptp_ray.core.randomness import keyed_generator
from aptp_ray.core.running import run_unet
from aptp_ray.core.space import ArchitectureSpace
from benchmarks.sd21 import RESOLUTION, TOKENS, sd21_unet

_RATIOS, _BATCH, _REPEATS = (0.8, 0.65, 0.5), 2, 5
_ALIGNMENTS = (8, 1)  # kept channels are a multiple of it; 1 takes any number of groups, heads and chunks


def measure(say: Callable[[str], None]) -> dict[str, Any]:
    """Times the teacher and each expert in turns; returns speed-ups over what the MACs promise, by MACs ratio."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(0)  # weights alone: no figure depends on them
    teacher = sd21_unet().eval().requires_grad_(False)
    side = RESOLUTION // 8
    macs = MacsModel.measure(teacher, latent_size=(side, side), num_tokens=TOKENS)
    generator = keyed_generator(0, "benchmark", "experts")
    inputs = (
        torch.randn(_BATCH, 4, side, side, generator=generator),
        torch.tensor([500, 20]),
        torch.randn(_BATCH, TOKENS, 1024, generator=generator),
    )
    x = torch.randn(macs.space.dim, generator=generator, dtype=torch.float64)
    say(f"teacher: {macs.total / 1e9:.1f} GMACs at {side}x{side} latents, batch {_BATCH}, {torch.get_num_threads()} threads")
    found = {
        (ratio, alignment): compared(teacher, code_at(x, macs, ratio, alignment), macs, inputs, say, f"alignment {alignment}")
        for ratio in _RATIOS
        for alignment in _ALIGNMENTS
    }
    aligned, free = _ALIGNMENTS
    return {
        "speedup_vs_macs": {str(ratio): found[ratio, aligned]["speedup_vs_macs"] for ratio in _RATIOS},
        "speedup_vs_macs_unaligned": {str(ratio): found[ratio, free]["speedup_vs_macs"] for ratio in _RATIOS},
        "speedup": {str(ratio): found[ratio, aligned]["speedup"] for ratio in _RATIOS},
        "teacher_ms": found[_RATIOS[0], aligned]["teacher_ms"],
    }


def code_at(x: Tensor, macs: MacsModel, ratio: float, alignment: int) -> Tensor:
    """Returns the code that keeps the largest of ``x`` within a share of the teacher's MACs."""
    return meet_budget(x[None], macs.space, macs, budget=ratio, alignment=alignment).codes[0]


def compared(
    teacher: UNet2DConditionModel,
    code: Tensor,
    macs: MacsModel,
    inputs: tuple[Tensor, Tensor, Tensor],
    say: Callable[[str], None],
    label: str,
) -> dict[str, float]:
    """Times the teacher and one expert, a step of each by turns, so that a machine that changes its pace favors neither."""
    expert = prune_unet(teacher, code, ArchitectureSpace.of(teacher))
    seconds: dict[str, list[float]] = {"teacher": [], "expert": []}
    with torch.inference_mode():
        for number in range(_REPEATS + 1):
            for name, unet in (("teacher", teacher), ("expert", expert)):
                begun = time.perf_counter()
                run_unet(unet, *inputs, None)
                if number:  # the first call makes buffers and picks kernels
                    seconds[name].append(time.perf_counter() - begun)
    taken = {name: median(values) for name, values in seconds.items()}
    ratio, speedup = float(macs.ratio(code)), taken["teacher"] / taken["expert"]
    say(
        f"MACs ratio {ratio:.3f}, {label}: {1000 * taken['expert']:.0f} ms against {1000 * taken['teacher']:.0f} ms, "
        f"{speedup:.2f}x; the MACs promise {1 / ratio:.2f}x"
    )
    return {
        "speedup_vs_macs": round(speedup * ratio, 3),
        "speedup": round(speedup, 3),
        "teacher_ms": round(1000 * taken["teacher"], 1),
    }
