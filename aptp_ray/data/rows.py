"""What Ray Data's tasks do with rows before and after the encoders.

Imports no torch: tasks run in many worker processes, and each would spend seconds importing what only the actors use.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image
from ray.data import Datasink
from ray.data.block import Block, BlockAccessor

from aptp_ray.data.encoded import ENCODED_SCHEMA, PARQUET_OPTIONS
from aptp_ray.data.schema import ALTERNATES, CAPTION, GROUP, IMAGE, KEY, METADATA, REASON, REJECTED, SHARD

PASSED_ON = (KEY, SHARD, CAPTION, ALTERNATES, GROUP, METADATA)  # columns that encoding leaves as they are
OUTPUT_SCHEMA = ENCODED_SCHEMA.append(pa.field(REASON, pa.string()))
_NOT_AN_IMAGE = "image is not uint8 [height, width, 3]"


def crop_rows(rows: pa.Table, *, resolution: int) -> pa.Table:
    """Resizes the shorter side to ``resolution`` and crops the center; IMAGE becomes raw bytes, null in a rejected row.

    Columns that a Dataset from elsewhere may lack (all but KEY, IMAGE and CAPTION) are filled with empty values.
    """
    filled: dict[str, Any] = {
        name: rows.column(name).cast(OUTPUT_SCHEMA.field(name).type)
        for name in (*PASSED_ON, REASON)
        if name in rows.column_names
    }
    for name in (SHARD, GROUP, METADATA, REASON):
        filled.setdefault(name, pa.array([""] * rows.num_rows, pa.string()))
    filled.setdefault(ALTERNATES, pa.array([[]] * rows.num_rows, pa.list_(pa.string())))
    reasons = filled[REASON].to_pylist()
    cropped: list[bytes | None] = []
    for index, image in enumerate(BlockAccessor.for_block(rows.select([IMAGE])).to_numpy(IMAGE)):
        if not reasons[index] and not (image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3 and image.size):
            reasons[index] = _NOT_AN_IMAGE
        cropped.append(None if reasons[index] else _crop(image, resolution))
    return pa.table(filled | {REASON: pa.array(reasons, pa.string()), IMAGE: pa.array(cropped, pa.binary())})


def _crop(pixels: np.ndarray, resolution: int) -> bytes:
    if pixels.shape == (resolution, resolution, 3):
        return pixels.tobytes()
    image = Image.fromarray(pixels)
    scale = resolution / min(image.size)
    width, height = (max(resolution, round(side * scale)) for side in image.size)
    image = image.resize((width, height), Image.Resampling.LANCZOS)
    left, top = (width - resolution) // 2, (height - resolution) // 2
    return image.crop((left, top, left + resolution, top + resolution)).tobytes()


class EncodedSink(Datasink[dict[str, Any]]):
    """Writes usable rows to Parquet and hands the rejected ones back; one file a task, numbered in row order."""

    def __init__(self, folder: str, storage_options: dict[str, Any], rows_per_file: int) -> None:
        self._folder, self._storage_options, self._rows_per_file = folder, storage_options, rows_per_file
        self.results: list[dict[str, Any]] = []

    @property
    def min_rows_per_write(self) -> int:
        return self._rows_per_file

    def write(self, blocks: Iterable[Block], ctx: Any) -> dict[str, Any]:
        rows = pa.concat_tables([BlockAccessor.for_block(block).to_arrow() for block in blocks])
        accepted = rows.filter(pc.equal(rows.column(REASON), "")).select(ENCODED_SCHEMA.names).cast(ENCODED_SCHEMA)
        rejected = rows.filter(pc.not_equal(rows.column(REASON), "")).select(list(REJECTED))
        if accepted.num_rows:
            # A task that is run again writes the same file again.
            path = f"{self._folder}/part-{ctx.task_idx:06d}.parquet"
            with fsspec.open(path, "wb", **self._storage_options) as stream:
                pq.write_table(accepted, stream, **PARQUET_OPTIONS)
        return {"rows": accepted.num_rows, "rejected": rejected.to_pylist()}

    def on_write_complete(self, write_result: Any) -> None:
        self.results = list(write_result.write_returns)
        self.rows_in = int(write_result.num_rows)
