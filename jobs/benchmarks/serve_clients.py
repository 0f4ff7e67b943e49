"""Clients that cost little, since they share the cores with what they measure: bare HTTP/1.1 on one event loop."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from benchmarks.serve_run import demo_prompts

GENERATE = "/v1/images/generations"
STEPS = (10, 20, 30)  # of the mixed requests, equally often


@dataclass(frozen=True)
class Ask:
    """One request for one image.

    Attributes:
        at: seconds after the trace begins.
        prompt: what to draw.
        steps: denoising steps.
        seed: of the noise.
    """

    at: float
    prompt: str
    steps: int
    seed: int

    @property
    def body(self) -> dict[str, Any]:
        return {"prompt": self.prompt, "num_inference_steps": self.steps, "seed": self.seed}


def backlog(count: int, first: int = 0) -> list[Ask]:
    """Requests that are all there at the beginning, from the ``first`` of one endless list on."""
    steps = np.random.default_rng(1).choice(STEPS, first + count).tolist()
    prompts = demo_prompts("validation", first + count)
    return [Ask(0.0, prompts[index], steps[index], index) for index in range(first, first + count)]


def poisson(rate: float, seconds: float, seed: int) -> list[Ask]:
    """Arrivals at random, ``rate`` a second: the same ones for every system."""
    generator = np.random.default_rng(seed)
    gaps = generator.exponential(1 / rate, size=int(2 * rate * seconds) + 100)
    times = [float(t) for t in gaps.cumsum() if t < seconds]
    steps = generator.choice(STEPS, len(times)).tolist()
    prompts = demo_prompts("validation", len(times))
    return [Ask(at, prompts[index], steps[index], index) for index, at in enumerate(times)]


@dataclass(frozen=True)
class Answer:
    """What came back of an ask.

    Attributes:
        ask: the request.
        seconds: from the time at which it should have been sent to the end of its answer.
        late: of these, what passed before it was sent: the client's own fault.
        facts: the answer's ``aptp``.
    """

    ask: Ask
    seconds: float
    late: float
    facts: dict[str, Any]


class Client:
    """Posts JSON over connections that are kept open."""

    def __init__(self, address: str) -> None:
        parts = urlsplit(address)
        self._host, self._port = str(parts.hostname), int(parts.port or 80)
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def post(self, path: str, value: dict[str, Any]) -> dict[str, Any]:
        """Returns the answer's body.

        Raises:
            RuntimeError: if the status is not 200.
        """
        body = json.dumps(value).encode()
        if self._idle:
            reader, writer = self._idle.pop()
        else:
            reader, writer = await asyncio.open_connection(self._host, self._port)
        head = (f"POST {path} HTTP/1.1", f"Host: {self._host}", "Content-Type: application/json", f"Content-Length: {len(body)}")
        writer.write("\r\n".join((*head, "", "")).encode() + body)
        lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        fields = dict(line.lower().split(": ", 1) for line in lines[1:] if line)
        answer = await reader.readexactly(int(fields["content-length"]))
        self._idle.append((reader, writer))
        if lines[0].split()[1] != "200":
            raise RuntimeError(f"{path}: {lines[0]} {answer[:300]!r}")
        return json.loads(answer)

    async def replay(self, asks: Sequence[Ask]) -> list[Answer]:
        """Sends every request at its time, whatever has become of those before it."""
        begun = time.perf_counter()

        async def one(ask: Ask) -> Answer:
            await asyncio.sleep(ask.at - (time.perf_counter() - begun))
            sent = time.perf_counter() - begun
            facts = (await self.post(GENERATE, ask.body))["aptp"]
            return Answer(ask, time.perf_counter() - begun - ask.at, sent - ask.at, facts)

        try:
            return await asyncio.gather(*(one(ask) for ask in asks))
        finally:
            self.close()

    def close(self) -> None:
        """Closes what is not in use."""
        for _, writer in self._idle:
            writer.close()
        self._idle.clear()
