"""The evaluation's drawing, measured: one system's images by the job's actors, against the bare sampler in as many processes.

Both sides draw the same captions with the same seeds, experts, batch size and threads, in turns, a round of shards each; files
are smaller than the job's, so that a round has nearly as many as a whole drawing. The bare side is at its best: its processes
hold all models before the clock starts, share each expert's captions evenly, write nothing, and none waits for another. What
the job needs beside the images (captions, references, costs, scores) is timed once.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import ray

from aptp_ray.artifacts import RunDir, load_run
from aptp_ray.config import Config, ConfigError, load_config
from aptp_ray.evaluate.drawn_shards import Shard
from aptp_ray.evaluate.encoders import Encoders
from aptp_ray.evaluate.evaluation import actors_of, device_of, drawing_figures, evaluate, prepare
from aptp_ray.evaluate.generation import Drawn, artists, batch_size, draw, missing
from benchmarks.evaluate_bare import Bare, bare_processes
from cli import ray_session
from evaluate import reference_images

_IMAGES, _ROUNDS = 1000, 3
# What an evaluation reads of a run.
_READ = (
    "config.yaml",
    "manifest.json",
    "routing.json",
    "teacher",
    "experts",
    "encoded/encoding.json",
    "encoded/validation",
    "assigned/validation.parquet",
    "shards",
)

Say = Callable[[str], None]


def measure(say: Say, run_dir: str | None = None, images: int = _IMAGES) -> dict[str, Any]:
    """Draws and scores the mixture, and draws it once more without the job.

    Args:
        say: writes a line for people.
        run_dir: a finished run; only read.
        images: how many captions, at most; fewer for a trial, in which actors are idle for longer at the end of each round.

    Raises:
        ConfigError: if there is no run.
    """
    if run_dir is None:
        raise ConfigError("this topic measures a finished run: name it with --run-dir")
    # Ray's workers are nice by 15: whatever else this machine does would come before the actors, but not before bare processes.
    os.environ["RAY_worker_niceness"] = "0"
    with tempfile.TemporaryDirectory() as folder:
        config, run = copied(run_dir, f"{folder}/run", images)
        laps = Laps()
        work = prepare(config, run)
        laps("captions")
        left = missing(config, run, work.shards)
        laps("checks")
        with ray_session(config):
            laps("starting Ray")
            number = max(1, min(actors_of(config), len(left)))
            with artists(config, run, number) as pool:
                ray.get([artist.ready.remote() for artist in pool])
                laps("starting actors")
                drawing = in_turns(config, pool, left, say)
            laps()
            encoders = Encoders.load(config, device=device_of(config))
            laps("loading encoders")
            references = reference_images(config, run, work.captions)
            laps("references")
            scored = evaluate(config, run, work, encoders, references)  # draws nothing: all images are there
            laps()
    seconds = laps.seconds | {"drawing": drawing.pop("seconds")}
    seconds["checks"] += scored["seconds"].pop("drawing")
    seconds |= scored["seconds"]  # for the costs, an actor is started once more: a little more than the job itself would take
    whole = sum(seconds.values())
    return {
        "drawing_vs_sampler": drawing.pop("ratio"),
        f"seconds_for_{len(work.captions)}_images": round(whole, 1),
        **drawing,
        "seconds_of": {name: round(value, 2) for name, value in seconds.items()},
        "images": len(work.captions),
        "steps": config.sampling.num_inference_steps,
        "cores": os.cpu_count(),
    }


class Laps:
    """A stop watch."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._since = time.monotonic()

    def __call__(self, name: str | None = None) -> None:
        """Takes the time since the last call under a name, or forgets it."""
        now = time.monotonic()
        if name is not None:
            self.seconds[name] = now - self._since
        self._since = now


def copied(run_dir: str, target: str, images: int) -> tuple[Config, RunDir]:
    """Copies what an evaluation reads; returns the config of an evaluation of the mixture alone."""
    source, config = load_run(run_dir)
    for part in _READ:
        if source.exists(part):
            place = Path(target, part)
            place.parent.mkdir(parents=True, exist_ok=True)
            single = source.fs.isfile(source.path(part))
            source.fs.get(source.path(part) + ("" if single else "/"), f"{place}{'' if single else '/'}", recursive=not single)
    # A round is a small drawing: with files of the job's size, its few shards would keep actors idle at its end as no job does.
    share = config.evaluation.images_per_file * min(images, _IMAGES) / (_IMAGES * _ROUNDS)
    per_file = math.ceil(share / batch_size(config)) * batch_size(config)  # in whole batches, as those of the job
    changes = {
        "run_dir": target,
        "evaluation.systems": [{"name": "mixture", "kind": "mixture"}],
        "evaluation.images": images,
        "evaluation.images_per_file": per_file,
    }
    config = load_config(f"{target}/config.yaml", [f"{name}={json.dumps(value)}" for name, value in changes.items()])
    return config, RunDir(target)


def cpu_seconds(pool: Sequence[Any]) -> float:
    """CPU time of the actors so far, all threads."""
    return sum(ray.get([artist.call.remote(time.process_time) for artist in pool]))


def in_turns(config: Config, pool: Sequence[Any], shards: Sequence[Shard], say: Say) -> dict[str, Any]:
    """Draws a part of the shards with the actors, and the same without them; then the next part, the other way first."""
    painters = list(dict.fromkeys(shard.painter for shard in shards))
    rounds = min(_ROUNDS, len(shards))
    drawn: list[Drawn] = []
    bare: list[Bare] = []
    begun = cpu_seconds(pool)
    with bare_processes(config, painters, len(pool)) as processes:
        for number in range(rounds):
            part = shards[number::rounds]
            if number % 2:
                bare.append(processes.draw(part))
            drawn.append(draw(pool, part))
            if not number % 2:
                bare.append(processes.draw(part))
            rate = drawn[-1].images / drawn[-1].seconds
            say(f"{bare[-1].images} images, images/s: actors {rate:.2f}, bare {bare[-1].images_per_second:.2f}")
    cpu = cpu_seconds(pool) - begun
    rates = {"actors": [one.images / one.seconds for one in drawn], "bare": [one.images_per_second for one in bare]}
    parts = {name: sum(one.parts[name] for one in drawn) for name in drawn[0].parts}
    whole = Drawn(sum(one.images for one in drawn), sum(one.seconds for one in drawn), parts)
    theirs = {name: sum(one.parts[name] for one in bare) / sum(one.seconds for one in bare) for name in bare[0].parts}
    figures = drawing_figures(whole, len(pool))
    return {
        "ratio": round(median(a / b for a, b in zip(rates["actors"], rates["bare"], strict=True)), 3),
        "seconds": whole.seconds,
        "rounds": {name: [round(rate, 3) for rate in some] for name, some in rates.items()},
        # The same images' time in the samplers of both sides: what Ray's own processes take of the cores, or other work does.
        "sampling_vs_bare": round(parts["sampling"] / sum(one.seconds for one in bare), 3),
        # Everything that the actors do, in CPU time, which other work on the machine hardly changes.
        "cpu_vs_bare": round(cpu / sum(one.cpu_seconds for one in bare), 3),
        "actors": len(pool),
        "actors_shares": {name: round(share, 4) for name, share in figures["shares"].items()},
        "sampler_shares": {name: round(share, 4) for name, share in (theirs | {"rest": 1 - sum(theirs.values())}).items()},
    }
