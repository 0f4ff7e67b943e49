"""Micro-batches before the router, without Ray."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest

from aptp_ray.core.router import PromptRouter
from aptp_ray.serve.routing import Route, RoutingQueue, route_with

PROMPTS = ["a red apple", "?", "green fox in the snow with a long tail", "two plums", "a dragon eats a train", "sky"]


def test_a_list_is_routed_as_each_prompt_alone(run_dir: Path) -> None:
    router = PromptRouter.from_pretrained(run_dir / "router")

    async def main() -> tuple[list[Route], list[Route]]:
        queue = RoutingQueue(route_with(router), max_batch_size=4)
        return await queue.route_many(PROMPTS), [await queue.route(prompt) for prompt in PROMPTS]

    together, alone = asyncio.run(main())
    expected = router.route(PROMPTS)
    assert [route.expert for route in together] == [route.expert for route in alone] == expected.expert.tolist()
    for route, similarity in zip(together, expected.similarity.tolist(), strict=True):
        assert route.similarity == pytest.approx(similarity, abs=1e-5)
        assert max(range(2), key=route.scores.__getitem__) == route.expert
        assert route.scores == pytest.approx([s + p for s, p in zip(route.similarity, router.prices().tolist(), strict=True)])


def test_what_comes_while_a_batch_runs_is_the_next_and_single_prompts_go_first() -> None:
    batches: list[list[str]] = []
    go = threading.Event()

    def work(prompts: list[str]) -> list[Route]:
        batches.append(prompts)
        assert go.wait(10)
        return [Route(len(prompt), [], []) for prompt in prompts]

    async def main() -> list[int]:
        queue = RoutingQueue(work, max_batch_size=3)
        first = asyncio.ensure_future(queue.route("first"))
        while not batches:
            await asyncio.sleep(0.001)
        many = asyncio.ensure_future(queue.route_many(["a", "bbbb", "cc", "ddd"]))
        await asyncio.sleep(0)
        single = [asyncio.ensure_future(queue.route(text)) for text in ("one", "two")]
        leaves = asyncio.ensure_future(queue.route("leaves"))
        await asyncio.sleep(0.01)
        leaves.cancel()
        await asyncio.sleep(0)
        go.set()
        routes = [await first, *await many, *[await task for task in single]]
        assert queue.waiting == 0
        return [route.expert for route in routes]

    assert asyncio.run(main()) == [5, 1, 4, 2, 3, 3, 3]
    assert batches == [["first"], ["one", "two", "a"], ["cc", "ddd", "bbbb"]]


def test_a_batch_that_fails_fails_alone() -> None:
    def work(prompts: list[str]) -> list[Route]:
        if "bad" in prompts:
            raise ValueError("cannot be embedded")
        return [Route(0, [], []) for _ in prompts]

    async def main() -> Route:
        queue = RoutingQueue(work, max_batch_size=3)
        with pytest.raises(ValueError, match="embedded"):
            await queue.route("bad")
        return await queue.route("good")

    assert asyncio.run(main()).expert == 0
