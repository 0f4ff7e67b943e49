"""Images whose color says which caption is theirs, so that a shifted caption cannot go unnoticed."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from aptp_ray.data.layout import Layout
from aptp_ray.data.schema import CAPTION, IMAGE, KEY, POSITION, RAW_ROW, REASON, SHARD

FORMATS = {"jpg": "JPEG", "jpeg": "JPEG", "png": "PNG", "webp": "WEBP"}


def color_of(number: int) -> tuple[int, int, int]:
    """Far from that of any number near by."""
    return number * 97 % 256, number * 59 % 256, number * 151 % 256


def caption_of(number: int) -> str:
    return f"thing number {number}"


def picture(number: int, kind: str = "jpg", size: tuple[int, int] = (24, 20)) -> bytes:
    return encoded(Image.new("RGB", size, color_of(number)), FORMATS[kind])


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def number_of(row: dict[str, Any]) -> int:
    """The number in a row's caption, whose color the row's image must have."""
    number = int(row[CAPTION].split()[-1])
    difference = np.abs(row[IMAGE].astype(int) - np.array(color_of(number)))
    assert row[IMAGE].dtype == np.uint8 and difference.max() <= 8, (row[KEY], row[CAPTION])
    return number


def read(layout: Layout) -> list[dict[str, Any]]:
    """All rows of a layout; every usable one has its own caption, and is what its position gives."""
    found = []
    for unit in layout.units():
        rows = list(layout.read(unit))
        for row in rows:
            assert set(row) == set(RAW_ROW) and row[SHARD] == unit.name
            if not row[REASON]:
                number_of(row)
        usable = [row for row in rows if not row[REASON]][::-2]
        if usable:
            same(list(layout.read(unit, [row[POSITION] for row in usable])), usable)
        found += rows
    return found


def same(left: Iterable[dict[str, Any]], right: Iterable[dict[str, Any]]) -> None:
    for one, other in zip(left, right, strict=True):
        assert {**one, IMAGE: 0} == {**other, IMAGE: 0}
        np.testing.assert_array_equal(one[IMAGE], other[IMAGE])


def good(rows: list[dict[str, Any]]) -> list[str]:
    return [row[KEY] for row in rows if not row[REASON]]


def reasons(rows: list[dict[str, Any]]) -> dict[str, str]:
    return {row[KEY]: row[REASON] for row in rows if row[REASON]}


def members(number: int, kind: str = "jpg", key: str | None = None) -> list[tuple[str, bytes]]:
    """A sample as img2dataset writes it."""
    key = f"{number:09d}" if key is None else key
    meta = f'{{"key": "{key}", "caption": "{caption_of(number)}", "status": "success", "width": 24, "height": 20}}'
    return [(f"{key}.{kind}", picture(number, kind)), (f"{key}.txt", caption_of(number).encode()), (f"{key}.json", meta.encode())]


def write_tar(path: Path, files: Iterable[tuple[str, bytes]], tar_format: int = tarfile.USTAR_FORMAT, mode: str = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode, format=tar_format) as archive:  # type: ignore[call-overload]
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def write_shard(path: Path, numbers: Iterable[int]) -> Path:
    return write_tar(path, [item for number in numbers for item in members(number, list(FORMATS)[number % 4])])
