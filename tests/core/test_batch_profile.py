"""Profiles of made-up devices whose best batch is known, and of a real UNet."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from aptp_ray.core.batch_profile import (
    BatchProfile,
    cached_profile,
    candidate_sizes,
    measure_profile,
    profile_key,
    profile_unet,
)
from tests.core.tiny import tiny_sd21


class Device:
    """Calls take a fixed time, and more for every row beyond those that fit side by side."""

    def __init__(self, rows: int, memory: int = 10**9) -> None:
        self.rows, self.memory, self.now, self.calls = rows, memory, 0.0, 0

    def call(self, rows: int) -> float:
        if rows > self.memory:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")
        self.calls += 1
        first = 1.0 if self.calls == 1 else 0.0  # what is slow once does not count
        took = 0.010 * max(1.0, rows / self.rows)
        self.now += took + first
        return took + first

    def profile(self, limit: int, seconds: float = 5.0, **bounds: float) -> BatchProfile:
        return measure_profile(
            self.call, candidate_sizes(limit), device="made up", seconds=seconds, clock=lambda: self.now, **bounds
        )


@pytest.mark.parametrize(("rows", "best"), [(2, 1), (4, 2), (32, 16), (1000, 64)])
def test_the_batch_grows_until_the_device_is_full(rows: int, best: int) -> None:
    profile = Device(rows).profile(64)
    assert profile.sizes == (1, 2, 4, 8, 16, 32, 64)
    assert profile.best() == best
    assert profile.best(max_step_ms=9.0) == 1  # the least that there is
    assert profile.step_ms(1) == pytest.approx(10.0 if rows > 1 else 20.0)
    assert profile.step_ms(48) == pytest.approx(10 * max(1, 96 / rows), rel=0.35)  # between two sizes
    assert profile.step_ms(8, guided=False) <= profile.step_ms(8)


def test_a_bound_on_the_step_time_wins_over_throughput() -> None:
    profile = BatchProfile("d", (1, 2, 4), (10.0, 12.0, 20.0), (8.0, 10.0, 12.0))
    assert [profile.best(max_step_ms=bound) for bound in (5.0, 15.0, 25.0, None)] == [1, 2, 4, 4]
    assert [profile.best(min_gain=gain) for gain in (0.1, 0.3, 0.9)] == [4, 2, 1]
    hump = BatchProfile("d", (1, 2, 4), (10.0, 20.0, 21.0), (8.0, 10.0, 12.0))
    assert hump.best() == 4  # a bad size between two good ones


def test_memory_and_time_end_the_search() -> None:
    profile = Device(1000, memory=10).profile(64)
    assert profile.sizes == (1, 2, 4) and "memory, at 8 images: CUDA out of memory. Tried to allocate 2 GiB" == profile.stopped
    slow = Device(1)
    profile = slow.profile(64, longest_s=1.5)
    assert profile.sizes[-1] < 64 and "1.5 s" in profile.stopped
    assert slow.now < 1.5 + 4 * 0.010 * 128
    with pytest.raises(torch.OutOfMemoryError):
        Device(1, memory=1).profile(4)
    # A first call that takes longer than all repetitions may leaves no size out.
    hurried = Device(16)
    assert hurried.profile(64, seconds=0.1).sizes == (1, 2, 4, 8, 16, 32, 64) and hurried.calls == 2 * 8


def test_candidates_end_at_the_limit() -> None:
    assert [candidate_sizes(limit) for limit in (1, 2, 3, 8, 12)] == [
        (1,), (1, 2), (1, 2, 3), (1, 2, 4, 8), (1, 2, 4, 8, 12),
    ]  # fmt: skip


def test_json_there_and_back() -> None:
    profile = Device(4).profile(8)
    assert BatchProfile.from_json(profile.to_json()) == profile
    for text in ("", "{}", "[]", profile.to_json().replace("[1, 2, 4, 8]", "[1]"), profile.to_json().replace("10.0", "0.0")):
        with pytest.raises(ValueError):
            BatchProfile.from_json(text)


def test_a_real_unet_is_measured_once_per_folder(tmp_path: Path) -> None:
    unet = tiny_sd21().eval()
    size = int(unet.config.sample_size)
    shapes = {"latent_shape": (int(unet.config.in_channels), size, size), "num_tokens": 7}
    calls: list[int] = []
    hook = unet.register_forward_pre_hook(lambda module, args: calls.append(args[0].shape[0]))
    try:
        first = cached_profile(tmp_path / "profiles", unet, limit=3, **shapes)
        assert {1, 2, 3, 4, 6} == set(calls) and first.sizes == (1, 2, 3)
        calls.clear()
        assert cached_profile(tmp_path / "profiles", unet, limit=3, **shapes) == first and not calls
        (record,) = (tmp_path / "profiles").glob("*.json")
        record.write_text(record.read_text()[:-20])  # not whole
        assert cached_profile(tmp_path / "profiles", unet, limit=3, **shapes).sizes == (1, 2, 3) and calls
        (tmp_path / "file").write_text("")
        assert cached_profile(tmp_path / "file", unet, limit=1, **shapes).sizes == (1,)  # no folder to write to
    finally:
        hook.remove()
    key = profile_key(unet, **shapes)
    assert key == profile_key(tiny_sd21(), **shapes)
    assert key != profile_key(tiny_sd21().to(torch.bfloat16), **shapes)
    assert key != profile_key(unet, latent_shape=(4, 32, 32), num_tokens=7)


def test_larger_batches_take_longer_on_this_machine() -> None:
    unet = tiny_sd21().eval()
    size = int(unet.config.sample_size)
    profile = profile_unet(unet, latent_shape=(int(unet.config.in_channels), size, size), num_tokens=7, limit=32, seconds=1.0)
    assert profile.step_ms(profile.sizes[-1]) > profile.step_ms(1) > 0
    assert profile.best() in profile.sizes
