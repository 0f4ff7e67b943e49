"""The loop around the sampler, without Ray: merging, cancelling and failing between steps."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest

from aptp_ray.core.components import load_components, load_unet
from aptp_ray.core.sampler import Sampler
from aptp_ray.serve.expert import DrawingLoop
from aptp_ray.serve.protocol import DrawJob, Outcome


@pytest.fixture
def sampler(run_dir: Path) -> Sampler:
    components = load_components(run_dir / "teacher")
    return Sampler.from_components(load_unet(run_dir / "experts" / "0"), components, max_batch_size=2)


def _job(name: str, steps: int = 3, n: int = 1) -> DrawJob:
    return DrawJob(name, "a red apple", "", n, seed=4, num_inference_steps=steps, guidance_scale=3.0)


async def _collect(loop: DrawingLoop, jobs: list[DrawJob]) -> dict[str, Outcome]:
    return {outcome.id: outcome async for outcome in loop.draw(jobs)}


def test_groups_merge_and_short_jobs_leave_first(sampler: Sampler) -> None:
    async def main() -> tuple[list[str], dict[str, Outcome]]:
        loop = DrawingLoop(sampler)
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
    alone = sampler.generate(["a red apple"], [4], num_inference_steps=3)[0]
    assert np.abs(np.asarray(alone, dtype=int) - other["later"].images[0]).max() <= 1


def test_cancelling_before_during_and_ahead_of_a_job(sampler: Sampler) -> None:
    async def main() -> tuple[dict[str, Outcome], dict[str, int]]:
        loop = DrawingLoop(sampler)
        loop.cancel(["ahead"])  # overtakes its job
        jobs = [_job("ahead"), _job("during", 200), _job("waits", 200), _job("stays", 3)]
        task = asyncio.create_task(_collect(loop, jobs))
        while sampler.active < 2:
            await asyncio.sleep(0.001)
        loop.cancel(["during", "waits", "never heard of"])
        outcomes = await asyncio.wait_for(task, 30)
        return outcomes, loop.status()

    outcomes, status = asyncio.run(main())
    assert {name: outcome.status for name, outcome in outcomes.items()} == {
        "ahead": 499, "during": 499, "waits": 499, "stays": 200,
    }  # fmt: skip
    assert status == {"active": 0, "done": 1, "cancelled": 2, "failed": 0}


def test_a_caller_that_leaves_takes_its_jobs_along(sampler: Sampler) -> None:
    async def main() -> dict[str, int]:
        loop = DrawingLoop(sampler)
        task = asyncio.create_task(_collect(loop, [_job("a", 200), _job("b", 200)]))
        while sampler.active < 2:
            await asyncio.sleep(0.001)
        task.cancel()
        await asyncio.wait([task])
        await _collect(loop, [_job("c")])
        return loop.status()

    assert asyncio.run(main()) == {"active": 0, "done": 1, "cancelled": 2, "failed": 0}


def test_a_job_that_cannot_be_drawn_is_answered_with_400_and_the_rest_is_drawn(sampler: Sampler) -> None:
    async def main() -> dict[str, Outcome]:
        return await _collect(DrawingLoop(sampler), [_job("bad", steps=5000), _job("good")])

    outcomes = asyncio.run(main())
    assert outcomes["bad"].status == 400 and "5000" in (outcomes["bad"].error or "")
    assert outcomes["good"].error is None and len(outcomes["good"].images) == 1


def test_a_step_that_raises_ends_its_jobs_but_not_the_loop(sampler: Sampler) -> None:
    step, broken = sampler.step, [True]

    def fails_once() -> list:
        if broken.pop() if broken else False:
            raise MemoryError("secret internals")
        return step()

    sampler.step = fails_once  # type: ignore[method-assign]

    async def main() -> tuple[dict[str, Outcome], dict[str, Outcome], bool]:
        loop = DrawingLoop(sampler)
        return await _collect(loop, [_job("lost")]), await _collect(loop, [_job("next")]), loop.alive

    lost, following, alive = asyncio.run(main())
    assert lost["lost"].status == 500 and "secret" not in (lost["lost"].error or "")
    assert following["next"].error is None and alive
