"""Draws every caption with every system that asks for it: Ray actors, images kept as WebDataset shards, resumable.

What is drawn depends on the UNet, the number of steps, the caption and its seed, so systems that share a UNet share its
images: the mixture, random routing and one expert for all draw most of theirs once. The work is cut into shards of captions of
one UNet. An actor draws one UNet's shards until none is left, then takes the next UNet: a pool of its own for each expert
would stand idle whenever that expert has finished.

``evaluation/images/<UNet>-<steps>/``: ``<hash of captions>.tar`` (``<key>.png``, ``.txt``, ``.json``), and ``made_by.json``,
written first, which says what made them: shards of another drawing are never mixed in.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import ray
import torch

from aptp_ray.artifacts import RunDir, RunDirError, versions
from aptp_ray.config import Config
from aptp_ray.core.components import Components, denoiser_dir, load_components, load_unet
from aptp_ray.core.int8 import quantize_weights
from aptp_ray.core.randomness import key_seed
from aptp_ray.core.sampler import Sampler
from aptp_ray.encoding import fingerprint
from aptp_ray.evaluate.drawn_shards import Shard, pack_shard
from aptp_ray.evaluate.systems import Painter
from aptp_ray.tracking import Progress

_MADE_BY = "made_by.json"
_PARTS = ("loading", "sampling", "packing", "writing")
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def image_seed(seed: int, key: str) -> int:
    """Returns the seed of a caption's noise, the same for every system; short enough to be typed into a request."""
    return key_seed(seed, "evaluation", key) % 2**31


def batch_size(config: Config) -> int:
    """Images in one UNet call of an evaluation."""
    return config.evaluation.batch_size or config.serve.max_batch_size or 8


@dataclass(frozen=True)
class Drawn:
    """What drawing cost.

    Attributes:
        images: how many.
        seconds: of the wall clock, from the first actor's readiness to the last shard.
        parts: {part: seconds}, summed over tasks: ``loading`` UNets, ``sampling``, ``packing`` images, ``writing`` shards.
    """

    images: int
    seconds: float
    parts: dict[str, float]


def missing(config: Config, run: RunDir, shards: Sequence[Shard]) -> list[Shard]:
    """Returns the shards that are not there yet.

    Raises:
        RunDirError: if a UNet is not there, or images of another drawing are; before anything is drawn.
    """
    _check(config, run, shards)
    return [shard for shard in shards if not run.exists(*shard.parts)]


@contextmanager
def artists(config: Config, run: RunDir, number: int) -> Iterator[list[Any]]:
    """Starts actors that draw, and ends them with the block; one that dies is started again, and draws its shard again."""
    compute = config.compute
    start = ray.remote(Artist).options(
        num_cpus=min(1.0, compute.cpus_per_worker),
        num_gpus=compute.gpus_per_worker,
        accelerator_type=compute.accelerator_type,
        max_restarts=compute.max_failures,
        max_task_retries=compute.max_failures,
    )
    pool = [start.remote(config, run.uri) for _ in range(number)]
    try:
        yield pool
    finally:
        for artist in pool:
            ray.kill(artist)


def draw(pool: Sequence[Any], shards: Sequence[Shard]) -> Drawn:
    """Draws shards.

    Args:
        pool: from :func:`artists`.
        shards: from :func:`missing`.
    """
    if not shards:
        return Drawn(0, 0.0, {})
    waiting: dict[Painter, list[Shard]] = {}
    for shard in shards:
        waiting.setdefault(shard.painter, []).append(shard)
    return _deal(pool, waiting, sum(len(shard.captions) for shard in shards))


def _deal(pool: Sequence[Any], waiting: dict[Painter, list[Shard]], total: int) -> Drawn:
    """Hands each artist a shard whenever it has none, from when it is ready until none is left.

    None is handed out ahead: it would wait behind a long one while other artists stand idle, and what it saves is a message.
    """
    begun = time.monotonic()
    progress = Progress("draw", total, unit="images")
    running: dict[Any, tuple[Any, Shard | None]] = {artist.ready.remote(): (artist, None) for artist in pool}
    at: dict[Any, Painter] = {}
    images = 0
    parts: dict[str, float] = defaultdict(float)

    def next_for(artist: Any) -> None:
        left = {painter: part for painter, part in waiting.items() if part}
        if not left:
            return
        # Its own UNet first; else the one with most work for each artist that is at it.
        others = [painter for one, painter in at.items() if one is not artist]
        painter = at.get(artist)
        if painter not in left:
            painter = max(left, key=lambda one: sum(len(shard.captions) for shard in left[one]) / (1 + others.count(one)))
        assert painter is not None
        at[artist] = painter
        shard = waiting[painter].pop(0)
        running[artist.draw.remote(shard)] = (artist, shard)

    while images < total:
        (task,), _ = ray.wait(list(running))
        artist, shard = running.pop(task)
        took = ray.get(task)
        if shard is None and not at:
            begun = time.monotonic()  # the first one is ready: what came before was starting up
        next_for(artist)
        if shard is not None:
            images += len(shard.captions)
            for part, seconds in took.items():
                parts[part] += seconds
            progress.update(images, shard.parts[-2])
    return Drawn(images, time.monotonic() - begun, dict(parts))


class Artist:
    """An actor that draws shards; it holds one UNet at a time."""

    def __init__(self, config: Config, run_uri: str) -> None:
        self._config = config
        self._run = RunDir(run_uri, config.storage_options)
        self._device = "cuda" if config.compute.gpus_per_worker > 0 else "cpu"
        if self._device == "cpu":
            torch.set_num_threads(config.compute.threads_per_worker)
        self._painter: Painter | None = None
        self._sampler: Sampler | None = None
        self._components: dict[str, Components] = {}

    def ready(self) -> None:
        """Returns once the actor stands."""

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Runs a function in this process, which has imported everything; its own UNet is let go first."""
        self._sampler = self._painter = None
        return function(*arguments)

    def draw(self, shard: Shard) -> dict[str, float]:
        """Draws and writes a shard; returns the seconds of each part, named as in :class:`Drawn`."""
        marks = [time.perf_counter()]
        sampler = self._sampler_of(shard.painter)
        marks.append(time.perf_counter())
        config, captions = self._config, shard.captions
        seeds = [image_seed(config.evaluation.seed, one.key) for one in captions]
        images = sampler.generate(
            [one.text for one in captions],
            seeds,
            num_inference_steps=shard.painter.steps,
            guidance_scale=config.sampling.guidance_scale,
        )
        marks.append(time.perf_counter())
        packed = pack_shard(captions, images, seeds)
        marks.append(time.perf_counter())
        self._run.write_bytes(packed, *shard.parts)
        marks.append(time.perf_counter())
        return {part: end - start for part, (start, end) in zip(_PARTS, pairwise(marks), strict=True)}

    def _sampler_of(self, painter: Painter) -> Sampler:
        if self._sampler is None or painter != self._painter:
            self._sampler = None  # the old one's memory first
            home = RunDir(painter.run_uri, self._config.storage_options)
            unet = open_unet(self._config, home, painter, self._device)
            self._sampler = open_sampler(self._config, home, painter, self._device, unet=unet, components=self._components)
            self._painter = painter
        return self._sampler


def open_unet(config: Config, home: RunDir, painter: Painter, device: str) -> torch.nn.Module:
    """Loads a painter's UNet from its run, in the precision that serves."""
    unet = load_unet(_unet_folder(home, painter), dtype=_DTYPES[config.serve.precision], device=device)
    # The teacher is what the experts are compared with: it stays whole.
    return quantize_weights(unet) if config.serve.weights == "int8" and painter.expert is not None else unet


def open_sampler(
    config: Config, home: RunDir, painter: Painter, device: str, *, unet: Any, components: dict[str, Components] | None = None
) -> Sampler:
    """Puts a painter's UNet into the sampler that serves.

    Args:
        config: how to draw.
        home: the painter's run.
        painter: who draws.
        device: where.
        unet: see :func:`open_unet`.
        components: text encoder and VAE by run, kept between calls; None: loaded for this one.
    """
    kept = {} if components is None else components
    if painter.run_uri not in kept:
        kept[painter.run_uri] = load_components(home.local("teacher"), dtype=_DTYPES[config.serve.precision], device=device)
    return Sampler.from_components(
        unet,
        kept[painter.run_uri],
        scheduler=config.sampling.scheduler,
        max_batch_size=batch_size(config),
        resolution=config.data.resolution,
    )


def _check(config: Config, run: RunDir, shards: Sequence[Shard]) -> None:
    """Refuses, before any work, a UNet that is not there and images that something else has drawn."""
    home: dict[str, RunDir] = {}
    for painter, parts in {shard.painter: shard.parts[:-1] for shard in shards}.items():
        where = home.setdefault(painter.run_uri, RunDir(painter.run_uri, config.storage_options))
        if not where.exists(*painter.parts):
            raise RunDirError(f"{where.address(*painter.parts)} is not there: has the stage that writes it run?")
        made_by = {
            "unet": fingerprint(_unet_folder(where, painter)),
            "steps": painter.steps,
            "sampling": config.sampling.model_dump(mode="json", exclude={"num_inference_steps"}),
            "resolution": config.data.resolution,
            "precision": config.serve.precision,
            "seed": config.evaluation.seed,
            "diffusers": versions().get("diffusers"),
        }
        if config.serve.weights != "whole" and painter.expert is not None:
            made_by["weights"] = config.serve.weights
        if run.exists(*parts, _MADE_BY) and run.read_json(*parts, _MADE_BY) != made_by:
            raise RunDirError(
                f"{run.address(*parts)} holds images that other weights or settings made: pass --overwrite to draw them again"
            )
        run.write_json(made_by, *parts, _MADE_BY)


def _unet_folder(home: RunDir, painter: Painter) -> Path:
    if painter.expert is not None:
        return Path(home.local("experts", str(painter.expert)))
    return denoiser_dir(home.local("teacher"))  # a remote teacher is fetched whole, as one folder
