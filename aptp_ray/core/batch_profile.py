"""How long one UNet call takes by the number of images in it, measured, and the largest batch that still pays."""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

# Of the GPU's memory, what the largest batch may leave in use: VAE decodes and other shapes need some, too.
_MEMORY_SHARE = 0.8
# A large model on a CPU takes minutes for all sizes. Below this, every size is measured: one that was left out because the
# machine was busy with something else, such as a start-up, would be missing from the record for good.
_LONGEST_S = 15.0


@dataclass(frozen=True)
class BatchProfile:
    """Step times by batch size.

    Attributes:
        device: on which they were measured.
        sizes: images in a call, growing; the call has twice as many rows under guidance.
        guided_ms: of a call with classifier-free guidance for all images, one a size.
        plain_ms: without guidance.
        stopped: why no larger size was measured.
    """

    device: str
    sizes: tuple[int, ...]
    guided_ms: tuple[float, ...]
    plain_ms: tuple[float, ...]
    stopped: str = ""

    def best(self, *, min_gain: float = 0.05, max_step_ms: float | None = None) -> int:
        """Returns the largest batch that pays: the last size that drew more images a second than all before it, by enough.

        Images in a batch wait for one another, so a size that adds next to no throughput only adds latency. But a batch grows
        only when images wait in line, and these would wait longer still.

        Args:
            min_gain: what doubling the batch must add to the images per second, as a fraction; in proportion for other
                ratios of sizes.
            max_step_ms: longest step to accept; the smallest size is taken in any case.
        """
        chosen = 0
        for index in range(1, len(self.sizes)):
            if max_step_ms is not None and self.guided_ms[index] > max_step_ms:
                break
            gain = self.images_per_step_second(index) / self.images_per_step_second(chosen)
            # A size that fails does not end the search: kernels change with the size, and the next may be faster again.
            if gain >= (1 + min_gain) ** math.log2(self.sizes[index] / self.sizes[chosen]):
                chosen = index
        return self.sizes[chosen]

    def images_per_step_second(self, index: int) -> float:
        """Guided images that take a step, per second, at the size of this index."""
        return 1000 * self.sizes[index] / self.guided_ms[index]

    def step_ms(self, images: int, *, guided: bool = True) -> float:
        """Returns the time of a call with so many images, linear between the measured sizes and beyond the last."""
        times = self.guided_ms if guided else self.plain_ms
        if images <= self.sizes[0] or len(self.sizes) == 1:
            return times[0] * max(images, self.sizes[0]) / self.sizes[0]
        upper = next((i for i, size in enumerate(self.sizes) if size >= images), len(self.sizes) - 1)
        size0, size1 = self.sizes[upper - 1], self.sizes[upper]
        return times[upper - 1] + (times[upper] - times[upper - 1]) * (images - size0) / (size1 - size0)

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> BatchProfile:
        """Raises: ValueError: if the text is no profile."""
        try:
            value = json.loads(text)
            profile = cls(
                device=str(value["device"]),
                sizes=tuple(int(v) for v in value["sizes"]),
                guided_ms=tuple(float(v) for v in value["guided_ms"]),
                plain_ms=tuple(float(v) for v in value["plain_ms"]),
                stopped=str(value["stopped"]),
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a batch profile: {error!r}") from error
        lengths = {len(profile.sizes), len(profile.guided_ms), len(profile.plain_ms)}
        if lengths == {0} or len(lengths) != 1 or min((*profile.guided_ms, *profile.plain_ms)) <= 0:
            raise ValueError("not a batch profile: its sizes and times do not fit together")
        return profile


def candidate_sizes(limit: int) -> tuple[int, ...]:
    """1, 2, 4, ... below the limit, and the limit itself."""
    return (*(size for size in (2**k for k in range(limit.bit_length())) if size < limit), limit)


def measure_profile(
    time_call: Callable[[int], float],
    sizes: Sequence[int],
    *,
    device: str = "",
    seconds: float = 2.0,
    longest_s: float = _LONGEST_S,
    clock: Callable[[], float] = time.perf_counter,
) -> BatchProfile:
    """Times calls at growing sizes: twice each, and again, round by round, while there is time.

    Args:
        time_call: rows of a UNet call -> its seconds. May raise ``torch.OutOfMemoryError`` or ``MemoryError``.
        sizes: images, growing.
        device: its name, for the record.
        seconds: after which no further round begins. The least of a size's times counts.
        longest_s: after which no larger size begins.
        clock: in seconds.
    """
    began = clock()
    best: dict[int, float] = {}  # rows -> seconds
    measured: list[int] = []
    stopped = "all sizes measured"
    for size in sizes:
        if measured and clock() - began > longest_s:
            stopped = f"{longest_s:g} s were over"
            break
        try:
            for rows in (size, 2 * size):
                if rows not in best:  # twice: the first call of a shape pays for choosing its kernels
                    best[rows] = min(time_call(rows), time_call(rows))
        except (torch.OutOfMemoryError, MemoryError) as error:
            if not measured:
                raise
            stopped = f"memory, at {size} images: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
            break
        measured.append(size)
    rounds = sorted({rows for size in measured for rows in (size, 2 * size)})
    # Another round costs about as much as what is known so far says.
    while clock() - began + sum(best[rows] for rows in rounds) <= seconds:
        for rows in rounds:
            best[rows] = min(best[rows], time_call(rows))
    return BatchProfile(
        device=device,
        sizes=tuple(measured),
        guided_ms=tuple(1000 * best[2 * size] for size in measured),
        plain_ms=tuple(1000 * best[size] for size in measured),
        stopped=stopped,
    )


@torch.inference_mode()
def profile_unet(
    unet: Any, *, latent_shape: tuple[int, int, int], num_tokens: int, limit: int, seconds: float = 2.0
) -> BatchProfile:
    """Measures a UNet on its device, with the thread count that the caller has set.

    Args:
        unet: UNet2DConditionModel or PrunedUNet2DConditionModel.
        latent_shape: (channels, height, width).
        num_tokens: of a prompt.
        limit: largest number of images.
        seconds: about how long it takes where the calls are quick; see :func:`measure_profile`.
    """
    weight = next(unet.parameters())
    device, cuda = weight.device, weight.device.type == "cuda"
    # One thread's own time leaves out what other processes take from it, which during a start-up is much.
    clock = time.thread_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter

    def time_call(rows: int) -> float:
        sample = torch.zeros(rows, *latent_shape, device=device, dtype=weight.dtype)
        times = torch.linspace(1, 999, rows, device=device)
        states = torch.zeros(rows, num_tokens, int(unet.config.cross_attention_dim), device=device, dtype=weight.dtype)
        if cuda:
            torch.cuda.reset_peak_memory_stats(device)
            torch.cuda.synchronize(device)
        began = clock()
        unet(sample, times, encoder_hidden_states=states, return_dict=False)
        if cuda:
            torch.cuda.synchronize(device)
            free, total = torch.cuda.mem_get_info(device)
            held_back = torch.cuda.memory_reserved(device) - torch.cuda.max_memory_allocated(device)
            if total - free - held_back > _MEMORY_SHARE * total:
                raise MemoryError(f"{_MEMORY_SHARE:.0%} of the GPU's memory are in use")
        return clock() - began

    time_call(2)  # libraries load, the device wakes up
    return measure_profile(time_call, candidate_sizes(limit), device=device_name(device), seconds=seconds)


def device_name(device: torch.device) -> str:
    """Names the hardware."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} {platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


def profile_key(unet: Any, *, latent_shape: tuple[int, int, int], num_tokens: int) -> str:
    """Names a profile: the same for UNets of the same shapes on the same device, precision, thread count and torch."""
    weight = next(unet.parameters())
    parts = [
        *(f"{name}{tuple(p.shape)}" for name, p in unet.named_parameters()),
        repr(sorted((key, repr(value)) for key, value in unet.config.items() if not key.startswith("_"))),
        device_name(weight.device),
        f"{weight.dtype} {torch.get_num_threads()} {torch.__version__} {latent_shape} {num_tokens}",
    ]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:24]


def cached_profile(folder: Path, unet: Any, *, latent_shape: tuple[int, int, int], num_tokens: int, limit: int) -> BatchProfile:
    """Returns the profile on record in a folder, or measures one and records it.

    Processes that share the folder measure one after another: side by side they would measure each other.

    Args:
        folder: made if it is not there; where it cannot be written, the profile is measured every time.
        unet: as for :func:`profile_unet`, like the rest.
    """
    shapes: dict[str, Any] = {"latent_shape": latent_shape, "num_tokens": num_tokens}
    file = folder / f"{profile_key(unet, **shapes)}-{limit}.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "lock").open("a")
    except OSError:
        return profile_unet(unet, limit=limit, **shapes)
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # ends with the file, also if this process is killed
        try:
            return BatchProfile.from_json(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):  # not there, or not whole
            profile = profile_unet(unet, limit=limit, **shapes)
        temporary = file.with_suffix(".tmp")
        temporary.write_text(profile.to_json(), encoding="utf-8")
        temporary.replace(file)
    return profile
