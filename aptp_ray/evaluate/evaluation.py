"""The evaluation of a run: draw, encode, score, time, and write ``evaluation/scores.json``."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import ray
import torch

from aptp_ray.artifacts import RunDir, versions
from aptp_ray.config import Config, ConfigError
from aptp_ray.evaluate import distances
from aptp_ray.evaluate.bootstrap import differences, draws, estimate, traffic_weights
from aptp_ray.evaluate.captions import write_captions
from aptp_ray.evaluate.drawn_shards import Shard, plan, read_shard
from aptp_ray.evaluate.encoders import Encoded, Encoders
from aptp_ray.evaluate.generation import Drawn, artists, draw, missing
from aptp_ray.evaluate.latency import measure_costs
from aptp_ray.evaluate.likeness import errors_against
from aptp_ray.evaluate.scores import HIGHER_IS_BETTER, Sample, parts_of, questions_of, replicated, scores_of
from aptp_ray.evaluate.seeds import over_seeds, pairs
from aptp_ray.evaluate.systems import Caption, Cast, Painter, cast_systems, read_captions
from aptp_ray.evaluate.trained import trained_figures

SCORES = ("evaluation", "scores.json")


@dataclass(frozen=True)
class Work:
    """What an evaluation is about to do; made before anything is drawn, so that mistakes are found first."""

    captions: list[Caption]
    casts: list[Cast]
    shards: list[Shard]


def prepare(config: Config, run: RunDir) -> Work:
    """Picks captions, casts systems and cuts the drawing into shards.

    Raises:
        ConfigError, RunDirError: if a system cannot be drawn.
    """
    captions = read_captions(run, images=config.evaluation.images, seed=config.evaluation.seed)
    if len({caption.key for caption in captions}) < len(captions):
        raise ConfigError("two validation rows have one key in one shard: encode again, rows with a duplicate key are rejected")
    casts = cast_systems(config, run, captions)
    return Work(captions, casts, plan(run, casts, captions, images_per_file=config.evaluation.images_per_file))


def actors_of(config: Config) -> int:
    """How many actors draw at once: the config's, or one for each GPU, or each core of a cluster without any."""
    if config.evaluation.actors:
        return config.evaluation.actors
    have = ray.cluster_resources()
    if config.compute.gpus_per_worker > 0:
        return max(1, int(have.get("GPU", 0) / config.compute.gpus_per_worker))
    # A local Ray pretends to have four CPUs at least.
    cores = int(have.get("CPU", 1)) if len(ray.nodes()) > 1 else min(int(have.get("CPU", 1)), os.cpu_count() or 1)
    return max(1, cores // config.compute.threads_per_worker)


def evaluate(config: Config, run: RunDir, work: Work, encoders: Encoders, references: Sequence[np.ndarray]) -> dict[str, Any]:
    """Draws what is missing, scores every system and writes ``evaluation/captions.parquet``, then ``evaluation/scores.json``.

    Args:
        config: the whole tree.
        run: the run directory.
        work: from :func:`prepare`.
        encoders: that look at the images.
        references: uint8 [height, width, 3] each, the source's image of each caption.

    Returns:
        what was written.

    Raises:
        ValueError: if references and captions differ in number.
    """
    if len(references) != len(work.captions):
        raise ValueError(f"{len(references)} references of {len(work.captions)} captions")
    marks = {"begun": time.monotonic()}
    left = missing(config, run, work.shards)
    actors = max(1, min(actors_of(config), len(left)))
    with artists(config, run, actors) as pool:
        drawn = draw(pool, left)
        marks["drawing"] = time.monotonic()
        costs = measure_costs(config, run, list(dict.fromkeys(shard.painter for shard in work.shards)), pool)
    marks["costs"] = time.monotonic()
    found_before = sum(len(shard.captions) for shard in work.shards) - drawn.images
    side = config.data.resolution
    reference = encoders.references(run, references, side)
    texts = None if encoders.image_text is None else encoders.image_text.texts([one.text for one in work.captions]).numpy()
    seen = {shard: encoders.encode(read_shard(run, shard), side) for shard in work.shards}
    marks["encoding"] = time.monotonic()
    places = {(shard.painter, caption.key): (shard, row) for shard in work.shards for row, caption in enumerate(shard.captions)}
    errors = errors_against(run, work.shards, Painter(run.uri, None, config.sampling.num_inference_steps))
    counts = draws(len(work.captions), config.evaluation.replicates, seed=config.evaluation.seed)
    found: dict[str, dict[str, tuple[float, np.ndarray]]] = {}
    systems, image_text = {}, {}
    for cast in work.casts:
        encoded = _gather(work.captions, cast, seen, places)
        facts = [one.facts for one in work.captions]
        order = list(cast.shares)
        weights = traffic_weights([order.index(painter) for painter in cast.painters], list(cast.shares.values()))
        wrong = [errors.get((painter, one.key)) for painter, one in zip(cast.painters, work.captions, strict=True)]
        sample = Sample(encoded, encoders.answers(encoded, facts), weights, None if None in wrong else np.array(wrong))
        name = cast.system.name
        if texts is not None and encoded.embeddings is not None:
            image_text[name] = distances.clip_score(encoded.embeddings, texts)
        found[name] = replicated(scores_of(reference, sample, texts), counts, weights)
        systems[name] = {
            **describe(cast, costs),
            "trained": trained_figures(RunDir(cast.painters[0].run_uri, config.storage_options))
            if cast.system.kind == "mixture"
            else None,  # not a run of its own
            "scores": {score: estimate(*value).to_json() for score, value in found[name].items()},
            "facts": questions_of(
                [answers for answers, one in zip(sample.answers, facts, strict=True) if one is not None],
                [one.held_out is not None for one in facts if one is not None],
            ),
            "by_group": _parts(config, reference, sample, texts, [one.group for one in work.captions]),
            "by_expert": _parts(
                config, reference, sample, texts, ["teacher" if p.expert is None else str(p.expert) for p in cast.painters]
            ),
        }
    listed = [cast.system for cast in work.casts]
    marks["scoring"] = time.monotonic()
    result = {
        "name": config.name,
        "labels": encoders.labels(),
        "images": len(work.captions),
        "systems": systems,
        "differences": _differences(work.casts, found),
        "seeds": over_seeds(listed, found, _own(work.casts)) if any(system.seed_of for system in listed) else None,
        "pairs": pairs(listed, found),
        "drawing": {"found": found_before, **drawing_figures(drawn, actors)},
        # Of the wall clock, actors' start among the drawing.
        "seconds": {name: end - begun for (_, begun), (name, end) in pairwise(marks.items())},
        "sampling": config.sampling.model_dump(mode="json") | {"resolution": side},
        "evaluation": config.evaluation.model_dump(mode="json", exclude={"scorer"}),
        "better": {name: "higher" if higher else "lower" for name, higher in HIGHER_IS_BETTER.items()},
        "versions": versions(),
    }
    write_captions(run, work.captions, work.casts, places=places, errors=errors, image_text=image_text)
    run.write_json(_finite(result), *SCORES)
    return result


def describe(cast: Cast, costs: dict[Painter, dict[str, Any]]) -> dict[str, Any]:
    """What a system is and costs; its MACs and step times are means over its traffic."""
    experts = []
    for painter, share in cast.shares.items():
        who = {"run_dir": painter.run_uri, "expert": painter.expert, "steps": painter.steps, "share": share}
        experts.append(who | {"images": cast.painters.count(painter)} | costs[painter])
    sizes = experts[0]["step_ms"]
    return {
        "kind": cast.system.kind,
        "steps": experts[0]["steps"],
        "macs_per_step": sum(one["share"] * one["macs"] for one in experts),
        # Of all denoising steps, without guidance's second row, which every system pays alike.
        "macs_per_image": sum(one["share"] * one["macs"] * one["steps"] for one in experts),
        "step_ms": {size: sum(one["share"] * one["step_ms"][size] for one in experts) for size in sizes},
        # What the denoising alone allows at each batch size, on one device.
        "images_per_second": {
            size: 1000 * int(size) / sum(one["share"] * one["step_ms"][size] * one["steps"] for one in experts) for size in sizes
        },
        "peak_memory_mb": max(one["peak_memory_mb"] for one in experts),
        "unets": experts,
    }


def drawing_figures(drawn: Drawn, actors: int) -> dict[str, Any]:
    """How fast images were drawn in all, and on what the actors spent their time, as shares that add up to one."""
    figures: dict[str, Any] = {"images": drawn.images, "seconds": drawn.seconds, "actors": actors}
    if drawn.images:
        shares = {part: seconds / (drawn.seconds * actors) for part, seconds in drawn.parts.items()}
        shares["idle"] = 1.0 - sum(shares.values())
        figures |= {"images_per_second": drawn.images / drawn.seconds, "shares": shares}
    return figures


def _gather(
    captions: Sequence[Caption], cast: Cast, seen: dict[Shard, Encoded], places: dict[tuple[Painter, str], tuple[Shard, int]]
) -> Encoded:
    """A system's rows in the captions' order, from the shards that hold them."""
    found = [places[painter, caption.key] for painter, caption in zip(cast.painters, captions, strict=True)]
    arrays: dict[str, Any] = {}
    for name in ("features", "embeddings", "inception"):
        if getattr(seen[found[0][0]], name) is not None:
            arrays[name] = np.stack([getattr(seen[shard], name)[row] for shard, row in found])
    return Encoded(**arrays)


def _parts(config: Config, reference: Encoded, sample: Sample, texts: np.ndarray | None, labels: list[str]) -> dict[str, Any]:
    if len(set(labels)) < 2:
        return {}  # the whole, which has its scores already
    # Parts are many, and smaller: half the replicates will do.
    replicates = max(1, config.evaluation.replicates // 2)
    return parts_of(reference, sample, texts, labels, replicates=replicates, seed=config.evaluation.seed)


def _differences(casts: Sequence[Cast], found: dict[str, dict[str, tuple[float, np.ndarray]]]) -> dict[str, Any]:
    """{score: {system: paired difference, system minus the run's own mixture}}."""
    own = _own(casts)
    # The teacher has no likeness to itself.
    of = {score: {name: values[score] for name, values in found.items() if score in values} for score in found[own]}
    return {"against": own, "scores": {score: differences(values, own) for score, values in of.items()}}


def _own(casts: Sequence[Cast]) -> str:
    """Name of the run's own mixture."""
    return next(cast.system.name for cast in casts if cast.system.kind == "mixture" and cast.system.run_dir is None)


def _finite(value: Any) -> Any:
    """JSON has no NaN: what could not be estimated is null."""
    if isinstance(value, dict):
        return {str(key): _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def device_of(config: Config) -> str:
    """Where the encoders run: on this process's GPU, where there is one and the run uses any."""
    return "cuda" if config.compute.gpus_per_worker > 0 and torch.cuda.is_available() else "cpu"
