"""A shard as bad as the web: known numbers of every fault, each between good rows, painted so that a caption can be checked."""

from __future__ import annotations

import io
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

SIDE = 32
# What has to be rejected, and what only looks odd.
FAULTS = (
    "unreadable image", "truncated image", "empty image", "missing image", "decompression bomb", "missing caption",
    "empty caption", "caption not UTF-8", "caption of 10,000 characters", "duplicate key",
)  # fmt: skip
ODD = ("L", "CMYK", "RGBA", "P", "I;16", "animated", "rotated")


def write_shard(path: Path, rows: int, faults: int) -> dict[str, int]:
    """Writes a shard with ``rows`` samples, ``faults`` of them faulty, evenly among the kinds and the places.

    Returns:
        how many of each fault there are.
    """
    every = rows // faults
    planted = dict.fromkeys(FAULTS, 0)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        last = 0
        for number in range(rows):
            fault = FAULTS[number // every % len(FAULTS)] if number % every == every // 2 else ""
            odd = ODD[number // 7 % len(ODD)] if number % 7 == 0 else "RGB"
            key = last if fault == "duplicate key" else number
            if fault:
                planted[fault] += 1
            for extension, data in _members(number, fault, odd).items():
                info = tarfile.TarInfo(f"{key:09d}.{extension}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
            # A repeated key next to its first would be read as one sample; this one comes later.
            last = number - 1 if not fault else last
    return planted


def color_of(number: int) -> tuple[int, int, int]:
    """The color that row ``number`` is painted in, coarse enough to survive JPEG."""
    return (number % 16 * 16 + 8, number // 16 % 16 * 16 + 8, number // 256 % 16 * 16 + 8)


def _members(number: int, fault: str, odd: str) -> dict[str, bytes]:
    image, extension = _image(number, odd)
    caption = f"picture number {number}".encode()
    if fault == "unreadable image":
        image = b"<html>404 not found</html>"
    elif fault == "truncated image":
        image = image[: len(image) // 2]
    elif fault == "empty image":
        image = b""
    elif fault == "decompression bomb":
        image, extension = _bomb(), "png"
    elif fault == "empty caption":
        caption = b"  \n"
    elif fault == "caption not UTF-8":
        caption = b"caf\xe9 " + caption
    elif fault == "caption of 10,000 characters":
        caption = b"word " * 2000
    members = {extension: image, "txt": caption}
    if fault == "missing image":
        del members[extension]
    if fault == "missing caption":
        del members["txt"]
    return members


def _image(number: int, odd: str) -> tuple[bytes, str]:
    image = Image.new("RGB", (SIDE, SIDE + 8), color_of(number))
    image.paste((255, 255, 255), (0, 0, 4, 4))
    buffer = io.BytesIO()
    if odd in ("L", "CMYK"):
        image.convert(odd).save(buffer, "JPEG", quality=95)
        return buffer.getvalue(), "jpg"
    if odd == "I;16":
        Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257).save(buffer, "PNG")
        return buffer.getvalue(), "png"
    if odd == "animated":
        image.save(buffer, "WEBP", save_all=True, append_images=[Image.new("RGB", image.size)], lossless=True)
        return buffer.getvalue(), "webp"
    if odd == "rotated":
        exif = Image.Exif()
        exif[0x0112] = 6  # orientation: turn by 90 degrees
        image.save(buffer, "JPEG", quality=95, exif=exif)
        return buffer.getvalue(), "jpg"
    (image if odd == "RGB" else image.convert(odd)).save(buffer, "PNG")
    return buffer.getvalue(), "png"


def _bomb() -> bytes:
    """A PNG of some hundred bytes whose header promises 60,000 x 60,000 pixels."""
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 4096)), (b"IEND", b"")]
    body = b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + body
