"""Bytes from the web become pixels and text, or a reason why not. A fixed list of decoders: content never picks code."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from aptp_ray.data.layout import Limits, one_line

FORMATS = ("JPEG", "PNG", "WEBP", "GIF")
_SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N", "I")


class Unusable(Exception):
    """A sample that cannot be used; the message is the reason."""


def decode_image(data: bytes | None, limits: Limits, kind: str = "image") -> np.ndarray:
    """Decodes an image of any of ``FORMATS``; of an animation the first frame.

    Args:
        data: the file's bytes; None where there is no file.
        limits: what is too large. Told from the header: no pixel is decoded for it.
        kind: what to call the file in a reason, e.g. its extension.

    Returns:
        uint8 [height, width, 3]: RGB as a viewer shows it, upright, on white where it is transparent.

    Raises:
        Unusable: with the reason.
    """
    if data is None:
        raise Unusable("image is missing")
    if not data:
        raise Unusable(f"image is unreadable: the {kind} file is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of broken EXIF data and the like: millions of images would fill the logs
            return _decode(data, limits)
    except Unusable:
        raise
    except UnidentifiedImageError as error:  # its own message holds an address in memory
        raise Unusable(f"image is unreadable: it is none of {', '.join(FORMATS)}, or its header is broken") from error
    except Image.DecompressionBombError as error:  # Pillow's own limit, where max_pixels is above it
        raise Unusable(f"image is too large: {one_line(error)}") from error
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged files (SyntaxError, struct.error, ...)
        raise Unusable(f"image is unreadable: {one_line(error)}") from error


def _decode(data: bytes, limits: Limits) -> np.ndarray:
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        width, height = image.size
        if width * height > limits.max_pixels:
            raise Unusable(f"image is too large: {width} x {height} pixels, data.max_pixels={limits.max_pixels}")
        image.load()
        return np.asarray(_plain(_upright(image)))


def _upright(image: Image.Image) -> Image.Image:
    """Turns the image as its EXIF data says. Broken EXIF data says nothing; the pixels are whole."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # Pillow's EXIF reader raises nearly anything, too
        return image


def _plain(image: Image.Image) -> Image.Image:
    if image.mode in _SIXTEEN_BITS:
        # Gray levels 0..65535; `convert` would clip all above 255 to white. The high byte, as Pillow does for 16-bit colors.
        levels = np.asarray(image).astype(np.int64).clip(0, 65535) >> 8
        return Image.fromarray(levels.astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")  # on white, as browsers show it: what lies under full transparency is arbitrary
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    # Pillow reads CMYK JPEGs as Adobe writes them, inverted, so this is right for CMYK, too.
    return image.convert("RGB")


def decode_caption(value: bytes | str | None, limits: Limits) -> str:
    """Returns a caption without the white space around it.

    Raises:
        Unusable: with the reason.
    """
    if value is None:
        raise Unusable("caption is missing")
    if not isinstance(value, bytes | str):
        raise Unusable(f"caption is a {type(value).__name__}, not a text")
    caption = utf8(value, "caption").removeprefix("\ufeff").strip()
    if not caption:
        raise Unusable("caption is empty")
    if len(caption) > limits.max_caption_characters:
        raise Unusable(
            f"caption is too long: {len(caption)} characters, data.max_caption_characters={limits.max_caption_characters}"
        )
    if "\0" in caption:
        raise Unusable("caption holds a NUL character")
    return caption


def good_captions(values: Sequence[Any], limits: Limits) -> list[str]:
    """Returns those of an image's captions that can be used; the others are left out without a word."""
    found = []
    for value in values:
        try:
            found.append(decode_caption(value, limits))
        except Unusable:
            continue
    return found


def utf8(value: bytes | str, what: str) -> str:
    """Returns text that is UTF-8 throughout.

    Raises:
        Unusable: if it is not; ``str`` may hold lone surrogates, as JSON can spell them.
    """
    try:
        if isinstance(value, str):
            value.encode("utf-8")
            return value
        return value.decode("utf-8")
    except UnicodeError as error:
        raise Unusable(f"{what} is not UTF-8: {error}") from error
