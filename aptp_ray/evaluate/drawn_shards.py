"""Drawn images on disk: which shard holds what, written and read as WebDataset."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from aptp_ray.artifacts import RunDir, RunDirError
from aptp_ray.evaluate.systems import Caption, Cast, Painter

FOLDER = ("evaluation", "images")


@dataclass(frozen=True)
class Shard:
    """What one task draws, and the file that it writes.

    Attributes:
        painter: who draws.
        parts: of the file, below the run directory.
        captions: what is drawn, in order.
    """

    painter: Painter
    parts: tuple[str, ...]
    captions: tuple[Caption, ...]


def plan(run: RunDir, casts: Sequence[Cast], captions: Sequence[Caption], *, images_per_file: int) -> list[Shard]:
    """Cuts the work into shards: what a system asks of a painter, less what the systems before it asked.

    A shard's name is a hash of its captions, so a system that is added to the end of the list leaves the shards that are there.
    """
    planned: dict[Painter, set[str]] = {}
    shards = []
    for cast in casts:
        asked: dict[Painter, list[Caption]] = {}
        for painter, caption in zip(cast.painters, captions, strict=True):
            if caption.key not in planned.setdefault(painter, set()):
                planned[painter].add(caption.key)
                asked.setdefault(painter, []).append(caption)
        for painter, part in asked.items():
            for start in range(0, len(part), images_per_file):
                some = tuple(part[start : start + images_per_file])
                name = _digest([(one.key, one.text) for one in some])
                shards.append(Shard(painter, (*FOLDER, painter.name(run.uri), f"{name}.tar"), some))
    return shards


def pack_shard(captions: Sequence[Caption], images: Sequence[Image.Image], seeds: Sequence[int]) -> bytes:
    """A WebDataset shard: the same images give the same bytes."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for caption, image, seed in zip(captions, images, seeds, strict=True):
            png = io.BytesIO()
            image.save(png, "PNG", compress_level=1)
            facts = json.dumps({"caption": caption.text, "key": caption.key, "seed": seed, "group": caption.group})
            for kind, content in (("png", png.getvalue()), ("txt", caption.text.encode()), ("json", facts.encode())):
                member = tarfile.TarInfo(f"{caption.key}.{kind}")
                member.size, member.mode = len(content), 0o644
                archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def read_shard(run: RunDir, shard: Shard) -> list[np.ndarray]:
    """Reads a shard's images, uint8 [height, width, 3] each, in the order of its captions.

    Raises:
        RunDirError: if it is not there, or holds other captions than planned.
    """
    found = {}
    with tarfile.open(fileobj=io.BytesIO(run.read_bytes(*shard.parts))) as archive:
        for member in archive:
            if member.name.endswith(".png"):
                content = archive.extractfile(member)
                assert content is not None
                found[member.name.removesuffix(".png")] = np.asarray(Image.open(content).convert("RGB"))
    if list(found) != [caption.key for caption in shard.captions]:
        raise RunDirError(f"{run.address(*shard.parts)} holds other images than planned: remove it, and run again")
    return list(found.values())


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]
