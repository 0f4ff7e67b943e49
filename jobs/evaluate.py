"""Draws validation captions with the mixture and what it is compared with, and scores them: everything before -> evaluation/,
and the report's page anew, with the scores in it.

A job that was killed goes on where it was: what is drawn stays.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from aptp_ray.artifacts import RunDir, open_run
from aptp_ray.config import Config, ConfigError
from aptp_ray.data.schema import IMAGE, REASON
from cli import errors_on_one_line, finish, load, parser, ray_session, run_stage, say
from rows import framing, layout_of
from stages import report


def reference_images(config: Config, run: RunDir, captions: list[Any]) -> list[np.ndarray]:
    """The source's square image of each caption, read anew: encoded rows hold latents, and a VAE's image is no reference.

    Raises:
        ConfigError: if the source no longer has one of them.
    """
    from aptp_ray.evaluate.systems import short_names

    layout, frames, side = layout_of(config, run, "validation"), framing(config), config.data.resolution
    wanted: dict[str, dict[int, str]] = {}
    for caption in captions:
        wanted.setdefault(caption.shard, {})[caption.position] = caption.key
    found: dict[str, np.ndarray] = {}
    units = layout.units()
    short = short_names(unit.name for unit in units)
    for unit in units:
        positions = wanted.get(short[unit.name])
        if not positions:
            continue
        for position, row in zip(positions, layout.read(unit, list(positions)), strict=False):
            if not row[REASON] and row[IMAGE].size:
                found[positions[position]] = np.frombuffer(frames.frame(row), np.uint8).reshape(side, side, 3)
    missing = [caption.key for caption in captions if caption.key not in found]
    if missing:
        raise ConfigError(f"data.source no longer has {len(missing)} of the encoded validation images, e.g. {missing[0]}")
    return [found[caption.key] for caption in captions]


def say_table(result: dict[str, Any]) -> None:
    """One line a system, with intervals."""
    for label, text in result["labels"].items():
        say(f"{label}: {text}")
    for name, system in result["systems"].items():
        scores = ", ".join(
            f"{score} {one['value']:.4g} [{one['low']:.4g}, {one['high']:.4g}]" for score, one in system["scores"].items()
        )
        say(f"{name:>20}: {system['macs_per_image'] / 1e9:.2f} GMACs an image, {scores}")


def would_draw(config: Config, run: RunDir, work: Any, overwrite: bool) -> dict[str, Any]:
    """Says what would be drawn, and whether the cluster can.

    Raises:
        ConfigError: if it never can.
    """
    from aptp_ray.evaluate.generation import missing
    from dry_run import Ask, cluster_at_hand

    compute = config.compute
    left = work.shards if overwrite else missing(config, run, work.shards)
    bundle = {"CPU": min(1.0, compute.cpus_per_worker), "GPU": compute.gpus_per_worker}
    ask = Ask("evaluate's actors", config.evaluation.actors or 1, bundle, "evaluation.actors, compute.gpus_per_worker")
    found = {
        "dry_run": True,
        "config": config.masked(),
        "captions": len(work.captions),
        "systems": len(work.casts),
        "images": sum(len(shard.captions) for shard in work.shards),
        "would_draw": sum(len(shard.captions) for shard in left),
        "resources": {ask.what: {"count": ask.count, **bundle, "verdict": cluster_at_hand(config).verdict(ask)}},
    }
    say(config.to_yaml().rstrip())
    say(f"evaluate: {found['would_draw']} of {found['images']} images are still to be drawn")
    return found


def check_experts(config: Config, run: RunDir) -> None:
    """Refuses a run that there is nothing to draw with."""
    if not run.is_done(config, "finetune"):
        raise ConfigError(f"{run.uri} has no fine-tuned experts yet: run jobs/pipeline.py first")


def evaluate_run(config: Config, run: RunDir, *, overwrite: bool = False) -> dict[str, Any]:
    """Draws and scores all systems, and makes the report's page anew; returns what ``scores.json`` holds.

    Raises:
        ConfigError: if the run has no experts, or nothing to score with.
    """
    check_experts(config, run)
    from aptp_ray.evaluate.encoders import Encoders
    from aptp_ray.evaluate.evaluation import device_of, evaluate, prepare

    if overwrite:
        run.remove("evaluation", "images")
    encoders = Encoders.load(config, device=device_of(config))
    work = prepare(config, run)
    references = reference_images(config, run, work.captions)
    total = sum(len(shard.captions) for shard in work.shards)
    say(f"evaluate: {len(work.captions)} captions, {len(work.casts)} systems, {total} images")
    with ray_session(config):
        result = evaluate(config, run, work, encoders, references)
        run_stage("report", report, config, run, overwrite=True)  # its page has a place for the scores
    say_table(result)
    return result


def figures(result: dict[str, Any]) -> dict[str, Any]:
    """What a job's last line says of an evaluation."""
    scores = {
        name: {score: round(one["value"], 4) for score, one in system["scores"].items()}
        for name, system in result["systems"].items()
    }
    return {"drawing": result["drawing"], "scores": scores}


def main() -> None:
    options = parser(__doc__, can_dry_run=True).parse_intermixed_args()
    begun = time.monotonic()
    with errors_on_one_line():
        config = load(options)
        run = open_run(config)
        if options.dry_run:
            from aptp_ray.evaluate.evaluation import prepare

            check_experts(config, run)
            finish({"run_dir": run.uri, "stage": "evaluate", **would_draw(config, run, prepare(config, run), options.overwrite)})
            return
        result = evaluate_run(config, run, overwrite=options.overwrite)
    finish({"run_dir": run.uri, "stage": "evaluate", "seconds": round(time.monotonic() - begun, 1), **figures(result)})


if __name__ == "__main__":
    main()
