"""Datasets of the Hugging Face library: from the hub, from ``save_to_disk``, streamed, or Parquet and Arrow files.

Parquet is read where it lies (``parquet.py``); for all else there is ``datasets``, which a serving node does without: it is
imported where it is used.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from aptp_ray.config import ConfigError
from aptp_ray.data.access import Unreachable, going_on, patiently
from aptp_ray.data.layout import ROWS_PER_UNIT, Limits, Unit, once, one_line
from aptp_ray.data.parquet import parquet_columns, parquet_rows, parquet_units
from aptp_ray.data.patterns import Found, find
from aptp_ray.data.records import Record, drawn, read_records
from aptp_ray.storage import file_system

_BATCH_ROWS = 32
_STREAMED = b"streamed"  # payload of a stream's units
_SAVED = ("state.json", "dataset_dict.json")  # what save_to_disk writes for a dataset, and for several splits


@dataclass(frozen=True)
class HuggingFaceLayout:
    """Units are ranges of rows, runs of Parquet row groups, or, streamed, the dataset's own shards."""

    path: str
    split: str
    image_column: str = "image"
    caption_column: str = "text"
    key_column: str | None = None
    name: str | None = None
    revision: str | None = None
    streaming: bool = False
    storage_options: dict[str, Any] = field(default_factory=dict, repr=False)
    seed: int = 0
    limits: Limits = Limits()

    def units(self) -> list[Unit]:
        """Opens the dataset, checks its columns, and parts it."""
        files = _files(self.path, self.storage_options)
        if files and files[0].address.endswith(".parquet"):
            return self._parquet_units(files)
        dataset = self._dataset()
        self._check_columns(_columns(dataset))
        label = f"{self.path}:{self.split}"
        if _is_streamed(dataset):
            count = dataset.num_shards
            names = [f"{label}[shard {index} of {count}]" for index in range(count)]
            return [
                Unit(index, name, self.revision or "", start=index, stop=count, payload=_STREAMED)
                for index, name in enumerate(names)
            ]
        if not len(dataset):
            raise ConfigError(f"{label!r} has no rows")
        version = f"{self.revision or ''}-{len(dataset)}-{dataset.info.dataset_size or ''}"
        bounds = [*range(0, len(dataset), ROWS_PER_UNIT), len(dataset)]
        return [
            Unit(index, f"{label}[{start}:{stop}]", version, start=start, stop=stop, first_row=start)
            for index, (start, stop) in enumerate(itertools.pairwise(bounds))
        ]

    def _parquet_units(self, files: list[Found]) -> list[Unit]:
        missing = [file.address for file in files if file.version is None]
        if missing:
            raise ConfigError(f"{len(missing)} of the files that {self.path!r} names are missing, the first is {missing[0]}")
        try:
            columns = patiently(lambda: parquet_columns(files[0].address, self.storage_options))
            self._check_columns(columns)
        except (Unreachable, OSError) as error:
            raise ConfigError(f"cannot read {files[0].address!r} as Parquet: {one_line(error)}") from error
        units = parquet_units(files, self.storage_options, lambda total: _sliced(self.split, total))
        if not units:
            raise ConfigError(f"{self.path!r} has no rows in {self.split!r}: it matched {len(files)} files")
        return units

    def _check_columns(self, columns: Sequence[str]) -> None:
        for knob in ("image_column", "caption_column", "key_column"):
            column = getattr(self, knob)
            if column is not None and column not in columns:
                raise ConfigError(f"{self.path!r} has no column {column!r}, but {', '.join(columns)}: set data.source.{knob}")

    def _dataset(self) -> Any:
        """The dataset, opened once a process.

        Raises:
            ConfigError: if ``datasets`` is not installed, or cannot open it.
        """
        options = json.dumps(self.storage_options, sort_keys=True, default=str)
        try:
            return _open(self.path, self.name, self.revision, self.split, self.streaming, options)
        except ConfigError:
            raise
        except ImportError as error:
            raise ConfigError(
                f"data.source.kind=huggingface needs the datasets package ({error}): pip install 'datasets>=4'"
            ) from error
        except Exception as error:  # the library raises nearly anything: of the hub, of builders, of Arrow
            raise ConfigError(
                f"cannot open the dataset {self.path!r}, split {self.split!r}: {one_line(error)}; check data.source's path, "
                "split, name and revision"
            ) from error

    def _chosen(self, dataset: Any) -> Any:
        """Only the columns that are read, images as the bytes they came in: the decoders are ours."""
        import datasets

        dataset = dataset.select_columns(self._wanted())
        features = dataset.features or {}
        if isinstance(features.get(self.image_column), datasets.Image):
            dataset = dataset.cast_column(self.image_column, datasets.Image(decode=False))
        return dataset

    def _wanted(self) -> list[str]:
        return list(dict.fromkeys(filter(None, (self.image_column, self.caption_column, self.key_column))))

    def read(self, unit: Unit, positions: Sequence[int] | None = None) -> Iterator[dict[str, Any]]:
        """See :class:`~aptp_ray.data.layout.Layout`."""
        wanted = None if positions is None else list(dict.fromkeys(positions))
        start_at = functools.partial(self._rows, unit, wanted)

        def records() -> Iterator[Record]:
            return (self._record(unit, position, row) for position, row in going_on(start_at))

        def open_image(path: str) -> tuple[Any, str]:
            return file_system(_image_address(unit.address, path), self.storage_options)

        rows = read_records(unit, records, positions, open_image=open_image, limits=self.limits)
        return rows if positions is not None else once(unit, rows)

    def _rows(self, unit: Unit, wanted: list[int] | None, skip: int) -> Iterator[tuple[int, dict[str, Any]]]:
        """(position, row) of a unit, without the first ``skip`` of them."""
        if unit.address:
            return parquet_rows(unit, self._wanted(), self.storage_options, wanted, skip)
        dataset = self._chosen(self._dataset())
        if unit.payload == _STREAMED:
            return _streamed_rows(dataset.shard(num_shards=unit.stop, index=unit.start), wanted, skip)
        places = range(unit.stop - unit.start) if wanted is None else wanted
        return _indexed_rows(dataset, unit.start, places[skip:])

    def _record(self, unit: Unit, position: int, row: dict[str, Any]) -> Record:
        # Unique in the split; a stream's shard does not know how many rows came before it.
        number = f"{unit.start}-{position}" if unit.payload == _STREAMED else str(unit.first_row + position)
        key = row.get(self.key_column) if self.key_column else None
        name = number if key is None else str(key)
        caption, others = drawn(row.get(self.caption_column), self.limits, self.seed, name)
        image = row.get(self.image_column)
        if isinstance(image, dict):  # datasets' Image feature, undecoded
            image = image.get("path") if image.get("bytes") is None else image["bytes"]
        if image is not None and not isinstance(image, bytes | str):
            return Record(position, name, reason=f"image is a {type(image).__name__}, not bytes or a path")
        return Record(position, name, image, caption, others)


@functools.lru_cache(maxsize=4)
def _open(path: str, name: str | None, revision: str | None, split: str, streaming: bool, options: str) -> Any:
    import datasets

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    storage_options = json.loads(options)
    more = {"split": split, "streaming": streaming, "storage_options": storage_options or None}
    base = split.partition("[")[0]
    files = _files(path, storage_options)
    if files:
        return datasets.load_dataset("arrow", data_files={base: [file.address for file in files]}, **more)
    if not _is_saved(path, storage_options):
        return datasets.load_dataset(path, name=name, revision=revision, **more)
    # A folder of save_to_disk is memory-mapped where it lies: there is nothing to be streamed.
    saved = datasets.load_from_disk(path, storage_options=storage_options or None)
    if isinstance(saved, datasets.DatasetDict):
        if base not in saved:
            raise ConfigError(f"{path!r} has no split {base!r}, but {', '.join(saved)}: set data.source's split")
        saved = saved[base]
    start, stop = _sliced(split, len(saved))
    return saved if (start, stop) == (0, len(saved)) else saved.select(range(start, stop))


def _sliced(split: str, total: int) -> tuple[int, int]:
    """First row and end of a split such as ``train[:95%]``, by the library's own rules."""
    if "[" not in split:
        return 0, total
    import datasets

    try:
        (part,) = datasets.ReadInstruction.from_spec(split).to_absolute({split.partition("[")[0]: total})
    except (ValueError, AssertionError) as error:
        raise ConfigError(f"split {split!r} is not understood, e.g. train[:95%]: {error}") from error
    return part.from_ or 0, total if part.to is None else part.to


def _files(path: str, storage_options: dict[str, Any]) -> list[Found]:
    """The Parquet or Arrow files that a path names; none where it is a dataset's name or folder."""
    if not path.endswith((".parquet", ".arrow")) and not any(sign in path for sign in "*?[{"):
        return []
    files = find(path, storage_options, what="Parquet or Arrow file")
    kinds = {file.address.rpartition(".")[2] for file in files}
    if len(kinds) > 1 or not kinds <= {"parquet", "arrow"}:
        raise ConfigError(f"{path!r} matches {len(files)} files of kinds {', '.join(sorted(kinds))}: name *.parquet or *.arrow")
    return files


def _is_saved(path: str, storage_options: dict[str, Any]) -> bool:
    if "://" not in path and not os.path.isdir(path):
        return False  # a name on the hub
    fs, folder = file_system(path, storage_options)
    return any(patiently(functools.partial(fs.exists, f"{folder}/{name}")) for name in _SAVED)


def _is_streamed(dataset: Any) -> bool:
    import datasets

    return isinstance(dataset, datasets.IterableDataset)


def _columns(dataset: Any) -> list[str]:
    if dataset.column_names is None:  # of a stream that does not say: its first row does
        return list(next(iter(dataset), {}))
    return list(dataset.column_names)


def _image_address(table: str, path: str) -> str:
    """A path in a Parquet file is taken from the file's folder, unless it is whole."""
    whole = "://" in path or path.startswith("/") or not table
    return path if whole else f"{table.rpartition('/')[0]}/{path}"


def _indexed_rows(dataset: Any, start: int, places: Sequence[int]) -> Iterator[tuple[int, dict[str, Any]]]:
    for first in range(0, len(places), _BATCH_ROWS):
        some = places[first : first + _BATCH_ROWS]
        columns = dataset[[start + place for place in some]]
        for index, place in enumerate(some):
            yield place, {name: values[index] for name, values in columns.items()}


def _streamed_rows(dataset: Any, wanted: list[int] | None, skip: int) -> Iterator[tuple[int, dict[str, Any]]]:
    if wanted is None:
        yield from enumerate(dataset.skip(skip) if skip else dataset, start=skip)
        return
    left, found = set(wanted), 0
    for place, row in enumerate(dataset):
        if place in left:
            left.discard(place)
            if found >= skip:
                yield place, row
            found += 1
            if not left:
                return
