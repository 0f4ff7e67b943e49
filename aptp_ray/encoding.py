"""What encoded rows are made of: shapes, types and the encoders that made them, and how tensors become bytes and back.

``encoded/encoding.json`` holds an :class:`Encoding`. Stages that read encoded rows compare it with the encoders that they
hold and with what the config asks for, so that no UNet is trained on another VAE's latents.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from aptp_ray.config import UserError

_STORED = np.dtype("<f2")


class EncodingError(UserError, ValueError):
    """Encoded rows that were not made by the encoders at hand."""


@dataclass(frozen=True)
class Encoding:
    """Shapes of the tensors, fingerprints of the encoders, and how both came about.

    Attributes:
        latent_shape: (channels, height, width).
        text_shape: (tokens, width) of a text's states, whether they are stored or made in training. Of two text encoders
            (Stable Diffusion XL) they stand side by side, with the pooled text in one more row.
        embedding_dim: of the prompt embedding z.
        resolution: pixels of an image's side.
        fingerprints: ``{"vae": ..., "text_encoder": ..., "tokenizer": ..., "prompt_encoder": ...}``, and ``text_encoder_2`` and
            ``tokenizer_2`` where there are two; see :func:`fingerprint`.
        text: "states" or "tokens": what is stored of a caption.
        mode: "offline": rows hold tensors; "online": light rows, whose tensors are made anew in each epoch.
        precision: in which the VAE and the text encoder ran: "fp32", "bf16" or "fp16".
        framing: how an image became a square; the fields of :class:`~aptp_ray.data.rows.Framing`.
        sources: where the encoders came from, and of which class they are. For people: two copies of a model are one encoder.
    """

    latent_shape: tuple[int, int, int]
    text_shape: tuple[int, int]
    embedding_dim: int
    resolution: int
    fingerprints: dict[str, str]
    text: str = "states"
    mode: str = "offline"
    precision: str = "fp32"
    framing: dict[str, Any] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict, compare=False)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Encoding:
        """Reads what :meth:`to_json` wrote; other keys are left alone.

        Raises:
            EncodingError: if a field is missing: another version of this package wrote it.
        """
        missing = [item.name for item in fields(cls) if item.name not in value]
        if missing:
            raise EncodingError(
                f"another version encoded these rows: their {', '.join(missing)} is not known; run jobs/encode.py --overwrite"
            )
        known = {item.name: value[item.name] for item in fields(cls)}
        shapes = {name: tuple(value[name]) for name in ("latent_shape", "text_shape")}
        return cls(**(known | shapes))

    @property
    def num_tokens(self) -> int:
        """Tokens that the model attends to: the rows of a text's states without that of its pooled text."""
        return self.text_shape[0] - (self._text_encoders - 1)

    @property
    def ids_per_text(self) -> int:
        """Token ids of one text, those of all tokenizers."""
        return self._text_encoders * self.num_tokens

    @property
    def _text_encoders(self) -> int:
        return 2 if "text_encoder_2" in self.fingerprints else 1

    def identity(self) -> dict[str, Any]:
        """Returns all that decides what the rows hold, as plain values."""
        return {name: value for name, value in json.loads(json.dumps(self.to_json())).items() if name != "sources"}

    def row_bytes(self, text: str | None = None) -> int:
        """Returns the bytes of one row's tensors; its texts come on top.

        Args:
            text: "states" or "tokens": as if that were stored; None: what is.
        """
        tokens, width = self.text_shape
        z = 4 * self.embedding_dim  # float32
        if self.mode == "online":
            return z
        caption = _STORED.itemsize * tokens * width if (text or self.text) == "states" else 4 * self.ids_per_text  # int32
        # A latent's mean and its standard deviation.
        return 2 * _STORED.itemsize * int(np.prod(self.latent_shape)) + caption + z

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
        """Compares all with what the encoders at hand, run as the config says, would make of an image and a caption.

        Raises:
            EncodingError: if an encoder, a shape, the precision, the framing, or what is stored differs.
        """
        self.check(**at_hand.fingerprints)
        mine = self.identity()
        for name, value in at_hand.identity().items():
            if name != "fingerprints" and mine[name] != value:
                raise EncodingError(
                    f"the encoded rows have {name} {mine[name]}, the config now asks for {value}: run jobs/encode.py --overwrite"
                )


def pack(rows: np.ndarray) -> list[bytes]:
    """[n, ...] floats -> n byte strings of little-endian half floats."""
    return [row.tobytes() for row in np.ascontiguousarray(rows, dtype=_STORED)]


def unpack(column: Iterable[bytes] | np.ndarray, shape: Sequence[int], dtype: str = "<f2") -> np.ndarray:
    """n byte strings -> [n, *shape], writable: float16 tensors, or token ids with ``dtype="<i4"``.

    Raises:
        ValueError: if the bytes are not of that shape.
    """
    items = list(column)
    flat = np.frombuffer(b"".join(items), dtype=dtype)
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
