"""MS-COCO captions, 2014 and 2017: an annotations file beside a folder of images."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from aptp_ray.config import ConfigError
from aptp_ray.data.access import read_range
from aptp_ray.data.decode import Unusable
from aptp_ray.data.layout import ROWS_PER_UNIT, Limits, Unit, once
from aptp_ray.data.records import Record, folder_of, image_folder, inside, read_records, table_info


@dataclass(frozen=True)
class CocoLayout:
    """Units are ranges of images with all of their captions.

    The annotations are parsed once, by the driver; each unit carries its own part of them, compressed (COCO 2017 as a whole
    is 10 MB so). ``captions="all"`` has a row for every annotation, "first" one for every image, that of the smallest id.
    """

    annotations: str
    images: str
    captions: str = "all"
    storage_options: dict[str, Any] = field(default_factory=dict, repr=False)
    limits: Limits = Limits()

    def units(self) -> list[Unit]:
        """Reads the annotations and parts them."""
        _, _, version = table_info(self.annotations, self.storage_options, "data.source.*.annotations")
        image_folder(self.images, self.storage_options, "data.source.*.images")
        units: list[Unit] = []
        part: list[Any] = []
        first = rows = 0
        for entry in [*self._entries(), None]:
            if part and (entry is None or rows >= ROWS_PER_UNIT):
                payload = zlib.compress(json.dumps(part).encode())
                name = f"{self.annotations}[{first}:{first + rows}]"
                units.append(Unit(len(units), name, version, self.annotations, 0, rows, first, payload))
                first, rows, part = first + rows, 0, []
            if entry is not None:
                part.append(entry)
                rows += self._rows_of(entry)
        return units

    def _rows_of(self, entry: list[Any]) -> int:
        return max(1, len(entry[2])) if self.captions == "all" else 1

    def _entries(self) -> list[list[Any]]:
        """[image id, file name, [[annotation id, caption], ...]] of each image, in the file's order."""
        try:
            tree = json.loads(read_range(self.annotations, self.storage_options))
            images, annotations = tree["images"], tree["annotations"]
            entries = {image["id"]: [image["id"], image.get("file_name"), []] for image in images}
            for note in annotations:
                # An annotation of an image that is not listed is kept, to be reported.
                entry = entries.setdefault(note.get("image_id"), [note.get("image_id"), None, []])
                entry[2].append([note["id"], note.get("caption")])
            for entry in entries.values():
                entry[2].sort(key=lambda note: note[0])
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ConfigError(
                f"{self.annotations!r} is no COCO captions file ({type(error).__name__}: {error}): it wants "
                '{"images": [{"id", "file_name"}], "annotations": [{"id", "image_id", "caption"}]}'
            ) from error
        if not annotations:
            raise ConfigError(f"{self.annotations!r} has {len(images)} images and no annotations: take a captions_*.json")
        return list(entries.values())

    def read(self, unit: Unit, positions: Sequence[int] | None = None) -> Iterator[dict[str, Any]]:
        """See :class:`~aptp_ray.data.layout.Layout`."""
        fs, folder = folder_of(self.images, self.storage_options)
        rows = read_records(
            unit, lambda: self._records(unit, folder), positions, open_image=lambda path: (fs, path), limits=self.limits
        )
        return rows if positions is not None else once(unit, rows)

    def _records(self, unit: Unit, folder: str) -> Iterable[Record]:
        position = 0
        for image_id, file_name, notes in json.loads(zlib.decompress(unit.payload)):
            reason, path = "", None
            try:
                path = inside(folder, file_name)
            except Unusable as error:
                reason = "image is not listed, or without a file_name" if file_name is None else str(error)
            if not notes:
                yield Record(position, str(image_id), reason=reason or "caption is missing")
                position += 1
            for index, (note_id, caption) in enumerate(notes if self.captions == "all" else notes[:1]):
                key = f"{image_id}_{note_id}" if self.captions == "all" else str(image_id)
                others = [text for other, (_, text) in enumerate(notes) if other != index]
                yield Record(position, key, path, caption, others, reason)
                position += 1
