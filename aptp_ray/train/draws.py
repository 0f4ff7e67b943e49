"""What a denoising step is made of: encoded rows as tensors, and draws keyed by (seed, purpose, step) over the global batch.

Every rank draws for all ranks and takes its own rows: 1, 2 or 4 workers over the same global batch see the same noise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aptp_ray.core.importance import ImportanceBatch
from aptp_ray.core.randomness import keyed_generator
from aptp_ray.data import schema
from aptp_ray.encoding import Encoding, unpack
from aptp_ray.train.feed import Rows


@dataclass(frozen=True)
class Draws:
    """Draws latents, noise, timesteps and dropped captions of a stage.

    Attributes:
        seed, purpose: the key, together with the step.
        global_batch_size: rows of a step over all ranks.
        encoding: shapes of the rows.
        num_timesteps: of the scheduler's training.
        caption_dropout: share of captions replaced by the empty one, for guidance.
        empty_states: [tokens, width], the empty caption's; needed where captions are dropped.
    """

    seed: int
    purpose: str
    global_batch_size: int
    encoding: Encoding
    num_timesteps: int
    caption_dropout: float = 0.0
    empty_states: Tensor | None = None

    def __call__(self, rows: dict[str, Any], step: int, mine: slice) -> dict[str, Any]:
        """Returns ``latents, noise, timesteps, text_states`` of this rank's rows (``decode_encoded``'s)."""
        generator = keyed_generator(self.seed, self.purpose, step)
        size = (self.global_batch_size, *self.encoding.latent_shape)
        noise = torch.randn(size, generator=generator)[mine]
        posterior = torch.randn(size, generator=generator)[mine]
        timesteps = torch.randint(0, self.num_timesteps, (self.global_batch_size,), generator=generator)[mine]
        dropped = (torch.rand(self.global_batch_size, generator=generator) < self.caption_dropout)[mine]
        states: Tensor = rows["text_states"]
        if self.empty_states is not None:
            states = torch.where(dropped.view(-1, 1, 1).to(states.device), self.empty_states.to(states.device), states)
        return {
            "latents": torch.from_numpy(rows["mean"]) + torch.from_numpy(rows["std"]) * posterior,
            "noise": noise,
            "timesteps": timesteps,
            "text_states": states,
        }


# Makes text states of token ids: int64 [n, ids of a text] and the number of real ones [n] -> float32 [n, tokens, width].
TextStates = Callable[[Tensor, Tensor], Tensor]


def training_columns(encoding: Encoding, *, embedding: bool = False) -> tuple[str, ...]:
    """Returns the columns that :func:`decode_encoded` takes, and z where it is asked for; no stage reads any other."""
    text = (schema.TEXT_STATES,) if encoding.text == "states" else (schema.TEXT_TOKENS, schema.TEXT_LENGTH)
    return (schema.LATENT_MEAN, schema.LATENT_STD, *text, *((schema.EMBEDDING,) if embedding else ()))


def decode_encoded(rows: Rows, encoding: Encoding, text_states: TextStates | None = None) -> dict[str, Any]:
    """Raw columns of encoded rows -> float32 ``mean, std`` (arrays), ``text_states`` (Tensor), ``embedding`` where it was read.

    Args:
        rows: the columns of :func:`training_columns`.
        encoding: what they are made of.
        text_states: makes states of token ids, where rows hold those; on whatever device it likes.

    Raises:
        ValueError: if rows hold token ids and there is nothing that makes states of them, or columns are not of their shape.
    """
    decoded: dict[str, Any] = {
        "mean": _unpacked(rows[schema.LATENT_MEAN], encoding.latent_shape, "<f2").astype(np.float32),
        "std": _unpacked(rows[schema.LATENT_STD], encoding.latent_shape, "<f2").astype(np.float32),
    }
    if encoding.text == "states":
        decoded["text_states"] = torch.from_numpy(
            _unpacked(rows[schema.TEXT_STATES], encoding.text_shape, "<f2").astype(np.float32)
        )
    elif text_states is None:
        raise ValueError("the rows hold token ids (encode.text=tokens): decoding them takes the text encoder")
    else:
        tokens = _unpacked(rows[schema.TEXT_TOKENS], (encoding.ids_per_text,), "<i4").astype(np.int64)
        lengths = np.asarray(rows[schema.TEXT_LENGTH], dtype=np.int64)
        decoded["text_states"] = text_states(torch.from_numpy(tokens), torch.from_numpy(lengths))
    if schema.EMBEDDING in rows:
        decoded["embedding"] = np.stack(list(rows[schema.EMBEDDING])).astype(np.float32)
    return decoded


def _unpacked(column: np.ndarray, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """Bytes of n tensors, one string each or uint8 [n, bytes] -> [n, *shape]; the latter without a copy."""
    if column.dtype == object:
        return unpack(column, shape, dtype)
    each = int(np.prod(shape)) * np.dtype(dtype).itemsize
    if column.shape[1:] != (each,):
        raise ValueError(f"stored tensors have {column.shape[1:]} bytes, not {each} for {shape}: encoding.json is not theirs")
    return np.ascontiguousarray(column).view(dtype).reshape(len(column), *shape)


def noised_batch(
    rows: dict[str, Any], seed: int, alphas: Tensor, mine: slice, device: torch.device, before: int = 0
) -> ImportanceBatch:
    """Noises rows at timesteps spread evenly over the schedule (the middle of equal strata); anew after those ``before``."""
    count = len(rows["mean"])
    generator = keyed_generator(seed, "importance", *([before] if before else []))
    noise = torch.randn(rows["mean"].shape, generator=generator)
    timesteps = ((torch.arange(count) + 0.5) / count * len(alphas)).long()[torch.randperm(count, generator=generator)]
    scale = alphas[timesteps].view(-1, 1, 1, 1)
    noised = scale.sqrt() * torch.from_numpy(rows["mean"]) + (1 - scale).sqrt() * noise
    sample, timesteps, states = (part[mine].to(device) for part in (noised, timesteps, rows["text_states"]))
    return ImportanceBatch(sample=sample, timesteps=timesteps, text_states=states)
