"""Captioned images as Ray Datasets of raw rows, from any of the layouts that they come in, on any fsspec file system.

Each layout is a small picklable object that lists its units and reads one of them (see ``layout.py``); each has a function
here that makes it a Dataset. A sample that cannot be used becomes a row with a reason: no row disappears unseen.
"""

from __future__ import annotations

import itertools
import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import pyarrow as pa
import ray
from ray.data import Dataset
from ray.data.extensions import ArrowVariableShapedTensorArray

from aptp_ray import sections
from aptp_ray.config import ConfigError
from aptp_ray.credentials import revealed
from aptp_ray.data.coco import CocoLayout
from aptp_ray.data.conceptual import ConceptualCaptionsLayout
from aptp_ray.data.folder import ImageFolderLayout
from aptp_ray.data.huggingface import HuggingFaceLayout
from aptp_ray.data.layout import NO_IMAGE, Layout, Limits, Unit
from aptp_ray.data.patterns import expand
from aptp_ray.data.schema import ALTERNATES, IMAGE, POSITION, RAW_ROW
from aptp_ray.data.tar import WebDatasetLayout

__all__ = [
    "NO_IMAGE",
    "Layout",
    "Limits",
    "Unit",
    "coco",
    "conceptual_captions",
    "expand",
    "huggingface",
    "image_folder",
    "open_layout",
    "ordered",
    "raw_rows",
    "raw_table",
    "webdataset",
]

_BLOCK_ROWS = 64  # rows decoded before they are handed on; bounds a reader's memory


def open_layout(
    source: sections.Layout,
    split: str,
    *,
    storage_options: dict[str, Any] | None = None,
    seed: int = 0,
    limits: Limits = Limits(),  # noqa: B008  # frozen
) -> Layout:
    """Makes the reader of one split.

    Args:
        source: a section of ``data.source``.
        split: "train" or "validation".
        storage_options: for fsspec, with secrets as they are; None: those of the section.
        seed: of captions drawn from lists.
        limits: what is too large to be decoded.

    Raises:
        ConfigError: if a secret of the section's options is not in the environment, or the demo's source is given.
    """
    if storage_options is None:
        storage_options = revealed(getattr(source, "storage_options", {}), "data.source.storage_options")
    part: Any = getattr(source, split, None)
    if isinstance(source, sections.WebDataset):
        return WebDatasetLayout(part, storage_options, limits)
    if isinstance(source, sections.ConceptualCaptions):
        return ConceptualCaptionsLayout(part.tsv, part.images, storage_options, limits)
    if isinstance(source, sections.Coco):
        return CocoLayout(part.annotations, part.images, source.captions, storage_options, limits)
    if isinstance(source, sections.ImageFolder):
        return ImageFolderLayout(part, source.caption_column, storage_options, seed, limits)
    if isinstance(source, sections.HuggingFace):
        columns = {name: getattr(source, name) for name in ("image_column", "caption_column", "key_column")}
        origin = {name: getattr(source, name) for name in ("name", "revision", "streaming")}
        more: dict[str, Any] = columns | origin | {"storage_options": storage_options, "seed": seed, "limits": limits}
        return HuggingFaceLayout(part.path, part.split, **more)
    raise ConfigError(f"data.source.kind={getattr(source, 'kind', source)!r} is no layout that can be opened by itself")


def webdataset(source: sections.WebDataset, split: str, **options: Any) -> Dataset:
    """Raw rows of tar shards; options are those of :func:`open_layout`."""
    return raw_rows(open_layout(source, split, **options))


def conceptual_captions(source: sections.ConceptualCaptions, split: str, **options: Any) -> Dataset:
    """Raw rows of a TSV and its folder of images; options are those of :func:`open_layout`."""
    return raw_rows(open_layout(source, split, **options))


def coco(source: sections.Coco, split: str, **options: Any) -> Dataset:
    """Raw rows of COCO captions; options are those of :func:`open_layout`."""
    return raw_rows(open_layout(source, split, **options))


def huggingface(source: sections.HuggingFace, split: str, **options: Any) -> Dataset:
    """Raw rows of a dataset that the ``datasets`` library reads; options are those of :func:`open_layout`."""
    return raw_rows(open_layout(source, split, **options))


def image_folder(source: sections.ImageFolder, split: str, **options: Any) -> Dataset:
    """Raw rows of a folder with metadata; options are those of :func:`open_layout`."""
    return raw_rows(open_layout(source, split, **options))


def raw_rows(layout: Layout, units: Sequence[Unit] | None = None) -> Dataset:
    """Streams the raw rows of a layout, in order: one task, and one sequential read, a unit.

    Args:
        layout: what :func:`open_layout` gives.
        units: those of ``layout.units()`` that are read; None: all.

    Returns:
        A lazy Dataset with the columns ``RAW_ROW``. REASON is ``""`` for a usable row; otherwise it says what is wrong with
        the row, and IMAGE holds one black pixel.

    Raises:
        ConfigError: if there is nothing to read, before anything is read.
    """
    units = layout.units() if units is None else units
    rows = ordered(ray.data.from_items([asdict(unit) for unit in units], override_num_blocks=len(units)))
    return rows.map_batches(
        _read_units,  # type: ignore[arg-type]  # Ray's type knows no keyword-only arguments
        batch_size=None,
        batch_format="pyarrow",
        fn_kwargs={"layout": layout},
    )


def ordered(dataset: Dataset) -> Dataset:
    """Makes a Dataset keep its row order, and keep quiet where standard error is no terminal; returns it."""
    context = dataset.context
    context.execution_options.preserve_order = True
    if not sys.stderr.isatty():
        context.enable_progress_bars = False
        logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # it warns that there are no bars
        for handler in logging.getLogger("ray.data").handlers:
            # Ray Data's other handlers write files of Ray's session, which stay complete.
            if type(handler).__name__ == "PlainRayHandler":
                handler.setLevel(logging.WARNING)
    return dataset


def _read_units(units: pa.Table, *, layout: Layout) -> Iterator[pa.Table]:
    for unit in units.to_pylist():
        rows = layout.read(Unit(**unit))
        while part := list(itertools.islice(rows, _BLOCK_ROWS)):
            yield raw_table(part)


def raw_table(rows: Sequence[dict[str, Any]]) -> pa.Table:
    """Returns raw rows as an Arrow table."""
    # Types are given, never inferred: a block whose lists are all empty must have the schema of any other.
    kinds: dict[str, pa.DataType] = {ALTERNATES: pa.list_(pa.string()), POSITION: pa.int64()}
    columns: dict[str, Any] = {
        name: pa.array([row[name] for row in rows], kinds.get(name, pa.string())) for name in RAW_ROW if name != IMAGE
    }
    columns[IMAGE] = ArrowVariableShapedTensorArray.from_numpy([row[IMAGE] for row in rows])
    return pa.table({name: columns[name] for name in RAW_ROW})
