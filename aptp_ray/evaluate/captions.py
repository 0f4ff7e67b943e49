"""What an evaluation measured of each caption, kept so that a report can ask which captions are hard."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from aptp_ray.artifacts import RunDir
from aptp_ray.evaluate.drawn_shards import Shard
from aptp_ray.evaluate.likeness import Errors
from aptp_ray.evaluate.systems import Caption, Cast, Painter

# One row a caption: KEY, TEXT; of each system "who draws" (index into the system's UNets in scores.json, in their order),
# "file" (below the run directory), and, where they could be had, "error" and "image_text", named as column() says.
CAPTIONS = ("evaluation", "captions.parquet")
KEY, TEXT = "key", "text"
UNET, FILE, ERROR, IMAGE_TEXT = "unet", "file", "error", "image_text"


def column(what: str, system: str) -> str:
    """Name of a system's column: ``unet``, ``file``, ``error`` (mean squared, against the teacher's image) or ``image_text``."""
    return f"{what}:{system}"


def write_captions(
    run: RunDir,
    captions: Sequence[Caption],
    casts: Sequence[Cast],
    *,
    places: dict[tuple[Painter, str], tuple[Shard, int]],
    errors: Errors,
    image_text: dict[str, np.ndarray],
) -> None:
    """Writes ``evaluation/captions.parquet``, whole or not at all.

    Args:
        run: whose evaluation this is.
        captions: of the evaluation.
        casts: its systems.
        places: where each image lies.
        errors: against the teacher's images.
        image_text: {system: [captions] image-text scores}; empty without an image-text model.
    """
    columns: dict[str, Any] = {KEY: [one.key for one in captions], TEXT: [one.text for one in captions]}
    for cast in casts:
        name, order = cast.system.name, list(cast.shares)
        drawn = list(zip(cast.painters, (one.key for one in captions), strict=True))
        columns[column(UNET, name)] = pa.array([order.index(painter) for painter in cast.painters], pa.int32())
        columns[column(FILE, name)] = pa.array(["/".join(places[one][0].parts) for one in drawn]).dictionary_encode()
        wrong = [errors.get(one) for one in drawn]
        if None not in wrong:
            columns[column(ERROR, name)] = pa.array(wrong, pa.float64())
        if name in image_text:
            columns[column(IMAGE_TEXT, name)] = pa.array(image_text[name], pa.float32())
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer)
    run.write_bytes(buffer.getvalue(), *CAPTIONS)


def read_evaluated(run: RunDir) -> pa.Table | None:
    """Reads what :func:`write_captions` wrote; None if the run has not been evaluated since there is such a file."""
    return pq.read_table(io.BytesIO(run.read_bytes(*CAPTIONS))) if run.exists(*CAPTIONS) else None
