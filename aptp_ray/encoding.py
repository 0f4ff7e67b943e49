"""What encoded rows are made of: shapes, types and the encoders that made them, and how tensors become bytes and back.

``encoded/encoding.json`` holds an :class:`Encoding`. Stages that read encoded rows compare its fingerprints with the
encoders that they hold, so that no UNet is trained on another VAE's latents.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from aptp_ray.config import UserError

_STORED = np.dtype("<f2")


class EncodingError(UserError, ValueError):
    """Encoded rows that were not made by the encoders at hand."""


@dataclass(frozen=True)
class Encoding:
    """Shapes of the stored tensors and fingerprints of the encoders.

    Attributes:
        latent_shape: (channels, height, width).
        text_shape: (tokens, width).
        embedding_dim: of the prompt embedding z.
        resolution: pixels of an image's side.
        fingerprints: ``{"vae": ..., "text_encoder": ..., "tokenizer": ..., "prompt_encoder": ...}``; see :func:`fingerprint`.
    """

    latent_shape: tuple[int, int, int]
    text_shape: tuple[int, int]
    embedding_dim: int
    resolution: int
    fingerprints: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Encoding:
        return cls(
            latent_shape=tuple(value["latent_shape"]),
            text_shape=tuple(value["text_shape"]),
            embedding_dim=value["embedding_dim"],
            resolution=value["resolution"],
            fingerprints=dict(value["fingerprints"]),
        )

    def check(self, **expected: str) -> None:
        """Compares fingerprints.

        Raises:
            EncodingError: if an encoder differs from the one that made these rows.
        """
        for name, value in expected.items():
            found = self.fingerprints.get(name, "none")
            if found != value:
                raise EncodingError(
                    f"the encoded rows were made by another {name} (fingerprint {found[:16]}, the one at hand has {value[:16]}): "
                    "run jobs/encode.py --overwrite, or point the config at the encoder that made them"
                )

    def check_same(self, at_hand: Encoding) -> None:
        """Compares all with what the encoders at hand would make of an image and a caption.

        Raises:
            EncodingError: if an encoder, or a shape, differs.
        """
        self.check(**at_hand.fingerprints)
        for name, value in at_hand.to_json().items():
            found = self.to_json()[name]
            if name != "fingerprints" and found != value:
                raise EncodingError(
                    f"the encoded rows have {name} {found}, the config now asks for {value}: run jobs/encode.py --overwrite"
                )


def pack(rows: np.ndarray) -> list[bytes]:
    """[n, ...] floats -> n byte strings of little-endian half floats."""
    return [row.tobytes() for row in np.ascontiguousarray(rows, dtype=_STORED)]


def unpack(column: Iterable[bytes] | np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """n byte strings -> float16 [n, *shape], writable.

    Raises:
        ValueError: if the bytes are not of that shape.
    """
    items = list(column)
    flat = np.frombuffer(b"".join(items), dtype=_STORED)
    if flat.size != len(items) * int(np.prod(shape)):
        raise ValueError(
            f"{len(items)} stored tensors hold {flat.size} values, not {tuple(shape)} each: encoding.json is not theirs"
        )
    return flat.reshape(len(items), *shape).copy()


def fingerprint(folder: str | Path) -> str:
    """Returns a hash of a model folder's weights and configs (names and contents; 16 hex digits).

    Raises:
        FileNotFoundError: if the folder has no such files.
    """
    digest = hashlib.sha256()
    files = sorted(p for p in Path(folder).iterdir() if p.suffix in {".safetensors", ".json", ".txt", ".model", ".bin"})
    if not files:
        raise FileNotFoundError(f"{folder} holds no model files (*.safetensors, *.json)")
    for file in files:
        digest.update(file.name.encode())
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 22):
                digest.update(chunk)
    return digest.hexdigest()[:16]
