"""How near an image is to what the teacher makes of the same caption and the same noise, pixel by pixel.

Distances between sets see whether images look right at large; this sees each image, needs no encoder, and so tells systems apart
that a small encoder takes for equal. It says what pruning changed, not whether the change is for the worse.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from aptp_ray.artifacts import RunDir
from aptp_ray.evaluate.distances import Score
from aptp_ray.evaluate.drawn_shards import Shard, read_shard
from aptp_ray.evaluate.measures import rmse
from aptp_ray.evaluate.systems import Painter

Errors = dict[tuple[Painter, str], float]


def errors_against(run: RunDir, shards: Sequence[Shard], teacher: Painter) -> Errors:
    """Mean squared errors of all images against the teacher's, in units of white.

    Args:
        run: whose evaluation this is.
        shards: all that were drawn. The teacher's images are held together: 1,000 of 768 x 768 pixels are 1.8 GB.
        teacher: whose images the others are compared with.

    Returns:
        {(painter, key of the caption): error}, without the teacher; empty if the teacher drew nothing.
    """
    theirs: dict[str, np.ndarray] = {}
    for shard in shards:
        if shard.painter == teacher:
            theirs |= zip((caption.key for caption in shard.captions), read_shard(run, shard), strict=True)
    errors: Errors = {}
    for shard in shards:
        if shard.painter == teacher or not theirs:
            continue
        for caption, image in zip(shard.captions, read_shard(run, shard), strict=True):
            if caption.key in theirs:
                errors[shard.painter, caption.key] = rmse(image, theirs[caption.key]) ** 2
    return errors


def psnr_of(errors: np.ndarray) -> Score:
    """Peak signal-to-noise ratio, in dB, of the weighted mean of squared errors [n] in units of white."""

    def score(weights: np.ndarray) -> float:
        mean = float(weights @ errors / weights.sum())
        return -10.0 * float(np.log10(mean)) if mean > 0 else float("inf")

    return score
