"""The loop around the sampler, without Ray: merging, cancelling, deadlines and failing between steps."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aptp_ray.core.components import load_components, load_unet
from aptp_ray.core.sampler import Sampler
from aptp_ray.serve.drawing import DrawingLoop
from aptp_ray.serve.protocol import DrawJob, Outcome, Partial


@pytest.fixture(params=[None, 1], ids=["in place", "beside"])
def sampler(run_dir: Path, request: pytest.FixtureRequest) -> Sampler:
    components = load_components(run_dir / "teacher")
    unet = load_unet(run_dir / "experts" / "0")
    return Sampler.from_components(unet, components, max_batch_size=2, side_threads=request.param)


@pytest.fixture
def loop(sampler: Sampler) -> Iterator[DrawingLoop]:
    loop = DrawingLoop(sampler)
    yield loop
    loop.close()
    assert not loop.alive


def _job(name: str, steps: int = 3, n: int = 1, **options: Any) -> DrawJob:
    return DrawJob(name, "a red apple", "", n, seed=4, num_inference_steps=steps, guidance_scale=3.0, **options)


async def _collect(loop: DrawingLoop, jobs: list[DrawJob]) -> dict[str, Outcome]:
    return {item.id: item async for item in loop.draw(jobs) if isinstance(item, Outcome)}


async def _until(condition: Callable[[], bool]) -> None:
    for _ in range(20_000):
        if condition():
            return
        await asyncio.sleep(0.001)
    raise AssertionError("it did not happen")


def _counts(loop: DrawingLoop) -> tuple[int, int, int]:
    assert (loop.status()["active"], loop.status()["waiting"]) == (0, 0)
    return tuple(loop.status()[key] for key in ("done", "cancelled", "failed"))  # type: ignore[return-value]


def test_groups_merge_and_short_jobs_leave_first(run_dir: Path, loop: DrawingLoop) -> None:
    async def main() -> tuple[list[str], dict[str, Outcome]]:
        order: list[str] = []

        async def first() -> None:
            async for outcome in loop.draw([_job("long", 40), _job("short", 2)]):
                order.append(outcome.id)

        task = asyncio.create_task(first())
        other = await _collect(loop, [_job("later", 3, n=3)])
        await task
        return order, other

    order, other = asyncio.run(main())
    assert order == ["short", "long"]
    assert len(other["later"].images) == 3 and other["later"].images[0].shape == (16, 16, 3)
    lone = Sampler.from_components(load_unet(run_dir / "experts" / "0"), load_components(run_dir / "teacher"))
    alone = lone.generate(["a red apple"], [4], num_inference_steps=3)[0]
    assert np.abs(np.asarray(alone, dtype=int) - other["later"].images[0]).max() <= 1


def test_cancelling_before_during_and_ahead_of_a_job(sampler: Sampler, loop: DrawingLoop) -> None:
    async def main() -> dict[str, Outcome]:
        loop.cancel(["ahead"])  # overtakes its job
        jobs = [_job("ahead"), _job("during", 900), _job("waits", 900), _job("stays", 3)]
        task = asyncio.create_task(_collect(loop, jobs))
        await _until(lambda: loop.status()["active"] == 2)
        loop.cancel(["during", "waits", "never heard of"])
        return await asyncio.wait_for(task, 30)

    outcomes = asyncio.run(main())
    assert {name: outcome.status for name, outcome in outcomes.items()} == {
        "ahead": 499, "during": 499, "waits": 499, "stays": 200,
    }  # fmt: skip
    assert _counts(loop) == (1, 3, 0)


def test_a_caller_that_leaves_takes_its_jobs_along_and_nobody_elses(loop: DrawingLoop) -> None:
    async def main() -> dict[str, Outcome]:
        leaving = asyncio.create_task(_collect(loop, [_job("a", 900), _job("b", 900)]))
        await _until(lambda: loop.status()["active"] == 2)
        staying = asyncio.create_task(_collect(loop, [_job("b", 3)]))  # tried once more, from elsewhere
        leaving.cancel()
        await asyncio.wait([leaving])
        return await asyncio.wait_for(staying, 30)

    assert asyncio.run(main())["b"].status == 200
    assert _counts(loop) == (1, 2, 0)


def test_a_job_that_cannot_be_drawn_is_answered_with_400_and_the_rest_is_drawn(loop: DrawingLoop) -> None:
    jobs = [_job("steps", steps=5000), _job("size", size=(15, 16)), _job("good")]
    outcomes = asyncio.run(_collect(loop, jobs))
    assert outcomes["steps"].status == 400 and "5000" in (outcomes["steps"].error or "")
    assert outcomes["size"].status == 400 and "multiples of 4" in (outcomes["size"].error or "")
    assert outcomes["good"].error is None and len(outcomes["good"].images) == 1
    assert _counts(loop) == (1, 0, 2)


def test_jobs_whose_deadline_passes_are_dropped_wherever_they_are(loop: DrawingLoop) -> None:
    async def main() -> dict[str, Outcome]:
        past, soon, later = time.time() - 1, time.time() + 0.3, time.time() + 60
        jobs = [_job("drawn", 900, deadline=soon), _job("long", 900), _job("waits", 900, deadline=soon)]
        jobs += [_job("late", deadline=past), _job("good", deadline=later)]
        task = asyncio.create_task(_collect(loop, jobs))
        await _until(lambda: loop.status()["failed"] == 3)
        loop.cancel(["long"])
        return await asyncio.wait_for(task, 30)

    outcomes = asyncio.run(main())
    assert {name: outcome.status for name, outcome in outcomes.items()} == {
        "drawn": 504, "waits": 504, "late": 504, "good": 200, "long": 499,
    }  # fmt: skip
    assert "deadline" in (outcomes["late"].error or "")
    assert _counts(loop) == (1, 1, 3)


def test_timings_add_up_and_name_the_company(loop: DrawingLoop) -> None:
    async def main() -> tuple[dict[str, Outcome], float]:
        began = time.perf_counter()
        outcomes = await _collect(loop, [_job("pair", 6, n=2), _job("next", 4)])
        return outcomes, 1000 * (time.perf_counter() - began)

    outcomes, elapsed = asyncio.run(main())
    pair, following = outcomes["pair"].timings, outcomes["next"].timings
    assert pair is not None and following is not None
    assert pair.batch_size == 2.0 and following.batch_size == 1.0
    for timings in (pair, following):
        assert min(timings.queue_ms, timings.denoise_ms, timings.decode_ms) >= 0
    assert following.queue_ms > pair.queue_ms + 0.9 * pair.denoise_ms  # waited for the pair's places
    total = following.queue_ms + following.denoise_ms + following.decode_ms
    assert 0.5 * elapsed < total <= elapsed
    status = loop.status()
    assert status["max_batch_size"] == 2 and 0 < status["step_ms"] < elapsed


def test_previews_come_in_order_before_the_outcome(loop: DrawingLoop) -> None:
    async def main() -> list[Partial | Outcome]:
        return [item async for item in loop.draw([_job("shown", 8, n=2, partial_images=3)])]

    *partials, outcome = asyncio.run(main())
    assert isinstance(outcome, Outcome) and outcome.error is None
    assert all(isinstance(item, Partial) and item.id == "shown" and item.image.shape == (16, 16, 3) for item in partials)
    for index in range(2):
        assert [item.number for item in partials if isinstance(item, Partial) and item.index == index] == [0, 1, 2]


def test_a_step_that_raises_ends_its_jobs_but_not_the_loop(sampler: Sampler, loop: DrawingLoop) -> None:
    step, broken = sampler.step, [True]

    def fails_once(**options: Any) -> list:
        if sampler.waiting and broken:
            broken.clear()
            raise MemoryError("secret internals")
        return step(**options)

    sampler.step = fails_once  # type: ignore[method-assign]

    async def main() -> tuple[dict[str, Outcome], dict[str, Outcome]]:
        return await _collect(loop, [_job("lost")]), await _collect(loop, [_job("next")])

    lost, following = asyncio.run(main())
    assert lost["lost"].status == 500 and "secret" not in (lost["lost"].error or "")
    assert following["next"].error is None and loop.alive


def test_closing_answers_those_that_are_left(loop: DrawingLoop) -> None:
    async def main() -> dict[str, Outcome]:
        task = asyncio.create_task(_collect(loop, [_job(name, 900) for name in "abc"]))
        await _until(lambda: loop.status()["active"] == 2)
        await asyncio.to_thread(loop.close)
        return await asyncio.wait_for(task, 30)

    assert {outcome.status for outcome in asyncio.run(main()).values()} == {503}
    assert not any(thread.name in ("denoising", "beside-denoising") for thread in threading.enumerate())
