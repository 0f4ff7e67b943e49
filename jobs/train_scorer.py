"""Trains an image-text encoder and heads for facts on a config's captioned images: shards -> scorer/.

For data that no published CLIP has seen, such as the demo's drawings. A training that was killed goes on where it was.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from aptp_ray.artifacts import RunDir, open_run
from aptp_ray.config import Config, ConfigError
from aptp_ray.data.schema import ALTERNATES, CAPTION, METADATA, REASON
from aptp_ray.tracking import Progress
from cli import errors_on_one_line, finish, load, parser, say
from rows import framing, layout_of


def captioned_images(config: Config, run: RunDir, split: str) -> Any:
    """Reads a split into memory; rows that do not say what they show are left out.

    Raises:
        ConfigError: if no row says what it shows.
    """
    from aptp_ray.evaluate.contrastive import CaptionedImages
    from aptp_ray.evaluate.facts import read_facts

    layout, frames, side = layout_of(config, run, split), framing(config), config.data.resolution
    images, captions, facts = [], [], []
    for unit in layout.units():
        for row in layout.read(unit):
            known = None if row[REASON] else read_facts(row[METADATA])
            if known is not None:
                images.append(np.frombuffer(frames.frame(row), np.uint8).reshape(side, side, 3))
                captions.append([row[CAPTION], *row[ALTERNATES]])
                facts.append(known)
    if not facts:
        raise ConfigError(f"no {split} row says in its metadata what it shows (subjects, colors, style, kind, count)")
    return CaptionedImages(np.stack(images), captions, facts)


def main() -> None:
    options = parser(__doc__).parse_intermixed_args()
    begun = time.monotonic()
    with errors_on_one_line():
        config = load(options)
        settings = config.evaluation.scorer
        if settings is None:
            raise ConfigError("evaluation.scorer is empty: say there how to train, as jobs/configs/openmoji_scorer.yaml does")
        run = open_run(config)
        if not run.is_local:
            raise ConfigError(f"run_dir={run.uri}: the scorer is trained on one machine; name a local folder")
        run.prepare(config)
        if options.overwrite:
            run.remove("scorer_state")
        figures = train(config, run)
    finish({"run_dir": run.uri, "stage": "train_scorer", "seconds": round(time.monotonic() - begun, 1), **figures})


def train(config: Config, run: RunDir) -> dict[str, Any]:
    """Trains, measures on held-out combinations, and writes ``scorer/``."""
    from aptp_ray.evaluate.contrastive import Trainer, save_scorer
    from aptp_ray.evaluate.evaluation import device_of
    from aptp_ray.evaluate.facts import head_classes
    from aptp_ray.evaluate.heads import fit_heads
    from aptp_ray.evaluate.image_text import ImageTextModel
    from aptp_ray.evaluate.scorer import scorer_figures

    settings = config.evaluation.scorer
    assert settings is not None
    torch.set_num_threads(settings.threads)
    rows, held = (captioned_images(config, run, split) for split in ("train", "validation"))
    say(f"scorer: {len(rows)} training images, {len(held)} for validation")
    classes = head_classes(rows.facts)
    trainer = Trainer(rows, classes, settings, Path(run.path("scorer_state")), device=device_of(config))
    bar = Progress("scorer", settings.steps, start=trainer.step)

    def report(step: int, losses: dict[str, float]) -> None:
        note = ", ".join(f"{name} {value:.4g}" for name, value in losses.items())
        bar.update(step, note)

    trainer.train(report=report)
    model = trainer.averaged()
    preparation = {"size": settings.image_size, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    encoder = ImageTextModel(model, trainer.tokenizer, preparation, label="")
    say("scorer: heads on frozen features")
    heads = fit_heads(encoder.images(rows.images).features, rows.facts, classes, steps=settings.head_steps, seed=settings.seed)
    figures = scorer_figures(encoder, heads, held, gallery=settings.gallery)
    facts = {
        "label": f"{config.name} encoder (trained on this data; not comparable with published CLIP or FID numbers)",
        "made_by": f"python jobs/train_scorer.py, {settings.steps} steps of {settings.batch_size} on {len(rows)} images",
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        **figures,
    }
    size = save_scorer(model, trainer.tokenizer, heads, facts, Path(run.path("scorer")))
    say(json.dumps(figures, indent=1))
    return {"bytes": size, **figures}


if __name__ == "__main__":
    main()
