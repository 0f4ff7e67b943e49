"""What a denoising step draws, keyed by (seed, purpose, step) over the whole global batch.

Every rank draws for all ranks and takes its own rows: 1, 2 or 4 workers over the same global batch see the same noise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

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

    def __call__(self, rows: Rows, step: int, mine: slice) -> dict[str, Any]:
        """Returns ``latents, noise, timesteps, text_states`` of this rank's rows (``decode_encoded``'s)."""
        generator = keyed_generator(self.seed, self.purpose, step)
        size = (self.global_batch_size, *self.encoding.latent_shape)
        noise = torch.randn(size, generator=generator)[mine]
        posterior = torch.randn(size, generator=generator)[mine]
        timesteps = torch.randint(0, self.num_timesteps, (self.global_batch_size,), generator=generator)[mine]
        dropped = (torch.rand(self.global_batch_size, generator=generator) < self.caption_dropout)[mine]
        states = torch.from_numpy(rows["text_states"])
        if self.empty_states is not None:
            states = torch.where(dropped.view(-1, 1, 1), self.empty_states, states)
        return {
            "latents": torch.from_numpy(rows["mean"]) + torch.from_numpy(rows["std"]) * posterior,
            "noise": noise,
            "timesteps": timesteps,
            "text_states": states,
        }


def decode_encoded(rows: Rows, encoding: Encoding) -> Rows:
    """Raw columns of encoded rows -> float32 arrays ``mean, std, text_states``, and ``embedding`` where it was read."""
    decoded = {
        "mean": unpack(rows[schema.LATENT_MEAN], encoding.latent_shape).astype(np.float32),
        "std": unpack(rows[schema.LATENT_STD], encoding.latent_shape).astype(np.float32),
        "text_states": unpack(rows[schema.TEXT_STATES], encoding.text_shape).astype(np.float32),
    }
    if schema.EMBEDDING in rows:
        decoded["embedding"] = np.stack(list(rows[schema.EMBEDDING])).astype(np.float32)
    if schema.GROUP in rows:
        decoded["group"] = rows[schema.GROUP]
    return decoded
