"""Images as clients get them: encoded into the answer, or as files in a storage that all ingress replicas share."""

from __future__ import annotations

import base64
import io
import re
import secrets
from typing import Any

import numpy as np
from PIL import Image

from aptp_ray.credentials import revealed
from aptp_ray.storage import file_system

_NAME = re.compile(r"[0-9a-f]{32}\.(png|jpeg|webp)")
# Cheap enough not to hold up an answer; level 6 takes three times as long for 5 % smaller files.
_PNG_LEVEL = 3


def encode_image(pixels: np.ndarray, output_format: str, compression: int) -> bytes:
    """Returns an image file.

    Args:
        pixels: [height, width, 3] uint8.
        output_format: png, jpeg or webp.
        compression: quality of jpeg and webp, 0 to 100; png has no losses.
    """
    buffer = io.BytesIO()
    options = {"compress_level": _PNG_LEVEL} if output_format == "png" else {"quality": compression}
    Image.fromarray(pixels).save(buffer, format=output_format.upper(), **options)
    return buffer.getvalue()


def in_base64(data: bytes) -> str:
    """Returns what JSON can carry."""
    return base64.b64encode(data).decode()


class ImageStore:
    """A folder of images with names that cannot be guessed; whoever has a name may read the image."""

    def __init__(self, uri: str, storage_options: dict[str, Any]) -> None:
        self._fs, root = file_system(uri, revealed(storage_options))
        self._root = root.rstrip("/")
        self._fs.makedirs(self._root, exist_ok=True)

    def put(self, data: bytes, output_format: str) -> str:
        """Writes an image and returns its name."""
        name = f"{secrets.token_hex(16)}.{output_format}"
        self._fs.pipe_file(f"{self._root}/{name}", data)
        return name

    def get(self, name: str) -> bytes | None:
        """Returns an image; None if the name is none of ours or nothing lies there."""
        if not _NAME.fullmatch(name):
            return None
        try:
            return self._fs.cat_file(f"{self._root}/{name}")
        except FileNotFoundError:
            return None
