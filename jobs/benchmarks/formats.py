"""Formats of an expert: as it is, channels last, compiled, with eight-bit weights; step times and what each does to the output.

The expert is cut from a UNet with the widths of Stable Diffusion 2.1's first two blocks, one layer each, and random weights.
What a layer costs depends on its shape alone; the error of eight-bit weights is that of weights as they are initialised.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from copy import deepcopy
from statistics import median
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from aptp_ray.core.int8 import quantize_weights, weight_bytes
from aptp_ray.core.macs import count_macs
from aptp_ray.core.prune import prune_unet
from aptp_ray.core.randomness import keyed_generator
from aptp_ray.core.space import ArchitectureSpace

_BATCHES, _REPEATS = (1, 2, 8), 3
_SIDE, _TOKENS, _WIDTH = 16, 77, 1024  # latents of 128 pixels
_KEEP = 0.65

Say = Callable[[str], None]


def measure(say: Say) -> dict[str, Any]:
    """Times all formats in turns; returns time ratios to the eager model (below 1: faster) and relative errors of the output."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    eager = expert().to(device)
    macs = count_macs(eager, (_SIDE, _SIDE), _TOKENS)
    say(f"expert: {macs / 1e9:.1f} GMACs a row, {weight_bytes(eager) / 1e6:.0f} MB, {torch.get_num_threads()} threads, {device}")
    formats: dict[str, Any] = {
        "eager": eager,
        "channels_last": deepcopy(eager).to(memory_format=torch.channels_last),
        "int8": quantize_weights(deepcopy(eager)),
    }
    begun = time.monotonic()
    formats["compile"] = torch.compile(eager)
    figures: dict[str, Any] = {"time_vs_eager": {}, "eager_ms": {}}
    errors: dict[str, float] = {}
    for batch in _BATCHES:  # growing: the second size compiles once more, for any batch
        inputs = inputs_for(batch, device)
        taken, outputs = in_turns(formats, inputs)
        figures["eager_ms"][str(batch)] = round(1000 * taken["eager"], 1)
        for name, seconds in taken.items():
            figures["time_vs_eager"].setdefault(name, {})[str(batch)] = round(seconds / taken["eager"], 3)
            errors[name] = max(errors.get(name, 0.0), relative_error(outputs[name], outputs["eager"]))
        say(f"batch {batch}: " + ", ".join(f"{name} {1000 * seconds:.0f} ms" for name, seconds in taken.items()))
    say(f"all of it, compilation included: {time.monotonic() - begun:.0f} s")
    sizes = {name: weight_bytes(formats[name]) for name in ("eager", "int8")}
    figures["time_vs_eager"].pop("eager")
    return {
        **figures,
        "output_error": {name: float(f"{error:.2g}") for name, error in errors.items() if name != "eager"},
        "int8_bytes_vs_eager": round(sizes["int8"] / sizes["eager"], 3),
        "expert": {"gmacs": round(macs / 1e9, 2), "megabytes": round(sizes["eager"] / 1e6, 1)},
        "device": device,
        "threads": torch.get_num_threads(),
    }


def expert() -> Any:
    """A pruned UNet, frozen."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        teacher = UNet2DConditionModel(
            sample_size=_SIDE,
            block_out_channels=(320, 640),
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            layers_per_block=1,
            attention_head_dim=(5, 10),
            cross_attention_dim=_WIDTH,
            use_linear_projection=True,
        )
    space = ArchitectureSpace.of(teacher)
    code = space.random_code(keep=_KEEP, generator=keyed_generator(0, "benchmark", "formats"))
    code[space.num_width :] = True  # width alone: a block that is gone takes no time in any format
    return prune_unet(teacher.requires_grad_(False).eval(), code, space)


def inputs_for(batch: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, timesteps, text states."""
    generator = keyed_generator(0, "benchmark", "formats", batch)
    sample = torch.randn(batch, 4, _SIDE, _SIDE, generator=generator)
    states = torch.randn(batch, _TOKENS, _WIDTH, generator=generator)
    return sample.to(device), torch.linspace(1, 999, batch).to(device), states.to(device)


def in_turns(formats: dict[str, Any], inputs: tuple[Tensor, Tensor, Tensor]) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Median seconds of a step, and its output, by format; they take turns, so that a machine that slows down slows all."""
    seconds: dict[str, list[float]] = {name: [] for name in formats}
    outputs: dict[str, Tensor] = {}
    for number in range(_REPEATS + 1):
        for name, model in formats.items():
            with torch.no_grad():  # inference mode would compile once more
                begun = time.perf_counter()
                outputs[name] = model(*inputs, return_dict=False)[0]
                if outputs[name].is_cuda:
                    torch.cuda.synchronize()
            if number:  # the first call compiles and picks kernels
                seconds[name].append(time.perf_counter() - begun)
    return {name: median(values) for name, values in seconds.items()}, outputs


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Root mean square of the difference over that of the value."""
    return float((found - expected).norm() / expected.norm())
