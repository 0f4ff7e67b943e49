"""The sampler alone, in processes of its own: no Ray, all models loaded and warm before anything is timed, nothing written."""

from __future__ import annotations

import multiprocessing
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from aptp_ray.artifacts import RunDir
from aptp_ray.config import Config
from aptp_ray.core.components import Components
from aptp_ray.core.sampler import Sampler
from aptp_ray.evaluate.drawn_shards import Shard
from aptp_ray.evaluate.generation import batch_size, image_seed, open_sampler, open_unet
from aptp_ray.evaluate.systems import Painter

# For one process: painter, texts and seeds of one call of the sampler.
Piece = tuple[Painter, list[str], list[int]]


@dataclass
class Bare:
    """What the processes did.

    Attributes:
        images: how many.
        images_per_second: the sum over processes of each one's own, so that none pays for waiting for another.
        seconds: of all processes.
        cpu_seconds: likewise.
        parts: of these, in each model.
    """

    images: int = 0
    images_per_second: float = 0.0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    parts: dict[str, float] = field(default_factory=lambda: defaultdict(float))


class Processes:
    """Processes that draw; see :func:`bare_processes`."""

    def __init__(self, config: Config, painters: Sequence[Painter], number: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._config, self._pipes, self._processes = config, [], []
        for _ in range(number):
            here, there = context.Pipe()
            process = context.Process(target=_run, args=(there, config, list(painters)), daemon=True)
            process.start()
            there.close()  # so that a process that ends is noticed
            self._pipes.append(here)
            self._processes.append(process)
        for pipe in self._pipes:
            pipe.recv()

    def draw(self, shards: Sequence[Shard]) -> Bare:
        """Draws what the shards hold, in whole batches as far as possible, dealt evenly."""
        shares = dealt(self._config, shards, len(self._pipes))
        for pipe, share in zip(self._pipes, shares, strict=True):
            pipe.send(share)
        found = Bare()
        for pipe, share in zip(self._pipes, shares, strict=True):
            seconds, cpu, parts = pipe.recv()
            images = sum(len(texts) for _, texts, _ in share)
            found.images += images
            found.images_per_second += images / seconds
            found.seconds += seconds
            found.cpu_seconds += cpu
            for name, taken in parts.items():
                found.parts[name] += taken
        return found

    def stop(self) -> None:
        """Ends the processes."""
        for process in self._processes:
            process.terminate()
            process.join()


@contextmanager
def bare_processes(config: Config, painters: Sequence[Painter], number: int) -> Iterator[Processes]:
    """Starts processes that hold all models of these painters, and ends them with the block."""
    processes = Processes(config, painters, number)
    try:
        yield processes
    finally:
        processes.stop()


def dealt(config: Config, shards: Sequence[Shard], number: int) -> list[list[Piece]]:
    """Deals the batches of each painter to ``number`` processes, the next one first where another painter begins."""
    size = batch_size(config)
    captions: dict[Painter, list[Any]] = defaultdict(list)
    for shard in shards:
        captions[shard.painter] += shard.captions
    shares: list[list[Piece]] = [[] for _ in range(number)]
    turn = 0
    for painter, some in captions.items():
        mine: list[list[Any]] = [[] for _ in range(number)]
        for start in range(0, len(some), size):
            mine[turn % number] += some[start : start + size]
            turn += 1
        for share, part in zip(shares, mine, strict=True):
            if part:
                seeds = [image_seed(config.evaluation.seed, one.key) for one in part]
                share.append((painter, [one.text for one in part], seeds))
    return shares


def _run(pipe: Any, config: Config, painters: list[Painter]) -> None:
    torch.set_num_threads(config.compute.threads_per_worker)
    seconds: dict[str, float] = defaultdict(float)
    components: dict[str, Components] = {}
    samplers: dict[Painter, Sampler] = {}
    for painter in painters:
        home = RunDir(painter.run_uri, config.storage_options)
        unet = open_unet(config, home, painter, "cpu")
        samplers[painter] = open_sampler(config, home, painter, "cpu", unet=unet, components=components)
        _timed(unet, "UNet", seconds)
        samplers[painter].generate(["warm up"], [0], num_inference_steps=2)
    for parts in components.values():
        _timed(parts.text_encoder, "text encoder", seconds)
        _timed(parts.vae.decoder, "VAE", seconds)
    pipe.send(None)
    while True:
        try:
            share = pipe.recv()
        except EOFError:
            return
        seconds.clear()
        begun, cpu = time.perf_counter(), time.process_time()
        for painter, texts, seeds in share:
            samplers[painter].generate(
                texts, seeds, num_inference_steps=painter.steps, guidance_scale=config.sampling.guidance_scale
            )
        pipe.send((max(time.perf_counter() - begun, 1e-9), time.process_time() - cpu, dict(seconds)))


def _timed(module: nn.Module, name: str, seconds: dict[str, float]) -> None:
    """Adds the time of a module's calls to ``seconds[name]``."""
    begun: list[float] = []
    module.register_forward_pre_hook(lambda *_: begun.append(time.perf_counter()))

    def after(*_: Any) -> None:
        seconds[name] += time.perf_counter() - begun.pop()

    module.register_forward_hook(after)
