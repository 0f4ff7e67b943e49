"""How long a denoising step takes by the images in it: measured (a batch profile), or estimated from MACs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from aptp_ray.plan.fleet import Device, Fleet
from aptp_ray.section import ConfigError

if TYPE_CHECKING:  # it imports torch, which only a measured profile needs
    from aptp_ray.core.batch_profile import BatchProfile


@dataclass(frozen=True)
class StepTimes:
    """Seconds of a step under classifier-free guidance.

    Attributes:
        seconds: [limit] of a step with 1, 2, ... images.
        measured: whether on this very model, or estimated.
        beside_s: of it, for each image, what is not the step's own work.
    """

    seconds: tuple[float, ...]
    measured: bool = True
    beside_s: float = 0.0

    @property
    def limit(self) -> int:
        """The largest batch."""
        return len(self.seconds)

    @property
    def images_steps_per_s(self) -> float:
        """Images that take a step, per second, in full batches: the most that a device alone can do."""
        return self.limit / self.seconds[-1]

    def scaled(self, factor: float) -> StepTimes:
        """Returns the times of a model of so many times the work, as if time went with work: an estimate."""
        return StepTimes(tuple(factor * value for value in self.seconds), measured=False)

    def plus(self, seconds_per_image: float) -> StepTimes:
        """Returns the times with something added for each image in the step."""
        extra = [seconds_per_image * images for images in range(1, self.limit + 1)]
        seconds = tuple(a + b for a, b in zip(self.seconds, extra, strict=True))
        return StepTimes(seconds, self.measured, self.beside_s + seconds_per_image)

    @property
    def steps_alone(self) -> tuple[float, ...]:
        """Seconds of a step with 1, 2, ... images, without what :meth:`plus` has added."""
        return tuple(value - self.beside_s * images for images, value in enumerate(self.seconds, 1))


@dataclass(frozen=True)
class Model:
    """An expert, or the teacher, as the planner sees it.

    Attributes:
        name: of its deployment, ``expert-0`` or ``teacher``.
        share: of the traffic.
        macs_ratio: its MACs over the teacher's.
        memory_gb: of one replica.
    """

    name: str
    share: float
    macs_ratio: float
    memory_gb: float


def from_profile(profile: BatchProfile, limit: int) -> StepTimes:
    """Returns a profile's times up to the batch that an engine would choose: the last that pays, ``limit`` at most."""
    # As DrawingLoop's replicas choose it; what was not measured up to the limit is not extrapolated.
    most = min(limit, profile.best())
    return StepTimes(tuple(profile.step_ms(images) / 1000 for images in range(1, most + 1)))


def estimated(macs: int, tflops: float, launch_ms: float, limit: int) -> StepTimes:
    """Returns a formula's times: a constant and the work, ``launch + images * 2 rows * 2 FLOPs * MACs / speed``.

    Args:
        macs: of one UNet call with one row.
        tflops: that the device reaches.
        launch_ms: of a step, whatever is in it.
        limit: largest batch.
    """
    image = 4 * macs / (tflops * 1e12)
    return StepTimes(tuple(launch_ms / 1000 + images * image for images in range(1, limit + 1)), measured=False)


def step_times(model: Model, device: Device, fleet: Fleet, teacher_macs: int) -> StepTimes:
    """Returns a model's times on a device, with what else an image takes from the device spread over its steps.

    Raises:
        ConfigError: if a profile cannot be read.
    """
    own = device.profiles.get(model.name)
    teacher = device.profiles.get("teacher")
    if own is not None:
        times = from_profile(read_profile(own), fleet.max_batch_size)
    elif teacher is not None:
        times = from_profile(read_profile(teacher), fleet.max_batch_size).scaled(model.macs_ratio)
    else:
        assert device.tflops is not None  # a validator's promise
        times = estimated(round(teacher_macs * model.macs_ratio), device.tflops, device.launch_ms, fleet.max_batch_size)
    mean_steps = sum(count * share for count, share in fleet.load.mix().items())
    return times.plus(fleet.replica.side_ms / 1000 / mean_steps)


def read_profile(path: str) -> BatchProfile:
    """Raises: ConfigError: if the file is not there, or is no profile."""
    from aptp_ray.core.batch_profile import BatchProfile

    try:
        return BatchProfile.from_json(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read the batch profile {path}: {error}; replicas write them below APTP_CACHE") from error
