"""What images look like to the encoders of an evaluation, and references that are encoded once for good."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from safetensors.torch import load, save

from aptp_ray.artifacts import RunDir, resolve_source
from aptp_ray.config import Config, ConfigError
from aptp_ray.encoding import fingerprint
from aptp_ray.evaluate.facts import Facts
from aptp_ray.evaluate.heads import FACTS, Heads
from aptp_ray.evaluate.image_text import ImageTextModel, resized
from aptp_ray.evaluate.inception import InceptionFeatures

CACHE = ("evaluation", "references")


@dataclass(frozen=True)
class Encoded:
    """A set of images as its encoders see it; arrays are [n, width] and may be missing.

    Attributes:
        features: of the image-text model's image encoder.
        embeddings: of the same, of unit length, in the space of texts.
        inception: Inception's.
    """

    features: np.ndarray | None = None
    embeddings: np.ndarray | None = None
    inception: np.ndarray | None = None


class Encoders:
    """The encoders that a config names, loaded.

    Attributes:
        image_text: None where the config names none.
        heads: of the image-text model, where it has some.
        inception: None where the config names none.
    """

    def __init__(
        self,
        image_text: ImageTextModel | None,
        heads: Heads | None,
        inception: InceptionFeatures | None,
        *,
        identity: str,
    ) -> None:
        self.image_text, self.heads, self.inception = image_text, heads, inception
        self._identity = identity

    @classmethod
    def load(cls, config: Config, *, device: str = "cpu") -> Encoders:
        """Loads them, and refuses what is missing.

        Raises:
            ConfigError: if none is named, or one is not there.
        """
        evaluation = config.evaluation
        if evaluation.encoder is None and evaluation.inception is None:
            raise ConfigError(
                "nothing to score with: set evaluation.encoder to the folder of a CLIP model (the demo's is "
                "package:aptp_ray/demo/weights/scorer), or evaluation.inception to Inception's weights"
            )
        image_text = heads = inception = None
        identity = []
        if evaluation.inception is not None:  # its check comes first: it takes no time
            inception = InceptionFeatures.load(evaluation.inception, device=device)
            identity.append(inception.fingerprint)
        if evaluation.encoder is not None:
            folder = resolve_source(evaluation.encoder, config.storage_options)
            try:
                image_text = ImageTextModel.load(folder, device=device)
                heads = Heads.load(folder)
            except FileNotFoundError as error:
                if FACTS not in str(error):  # a published CLIP has no heads
                    raise ConfigError(f"evaluation.encoder={evaluation.encoder}: {error}") from error
            except ValueError as error:
                raise ConfigError(f"evaluation.encoder={evaluation.encoder}: {error}") from error
            identity.append(fingerprint(folder))
        return cls(image_text, heads, inception, identity=" ".join(identity))

    def labels(self) -> dict[str, str]:
        """{"encoder", "inception"}: how numbers made with each are named."""
        labels = {}
        if self.image_text is not None:
            labels["encoder"] = self.image_text.label
        if self.inception is not None:
            labels["inception"] = self.inception.label
        return labels

    def encode(self, images: Sequence[np.ndarray], side: int) -> Encoded:
        """Encodes images, brought to ``side`` first: references and samples go the same way.

        Args:
            images: uint8 [height, width, 3] each.
            side: pixels of a side, that of the samples.
        """
        same = [resized(image, side) for image in images]
        found: dict[str, Any] = {}
        if self.image_text is not None:
            vectors = self.image_text.images(same)
            found |= {"features": vectors.features.numpy(), "embeddings": vectors.embeddings.numpy()}
        if self.inception is not None:
            found["inception"] = self.inception.features(same).numpy()
        return Encoded(**found)

    def references(self, run: RunDir, images: Sequence[np.ndarray], side: int) -> Encoded:
        """As :meth:`encode`, kept in the run under a hash of the images' content, of the encoders and of the side."""
        digest = hashlib.sha256(f"{self._identity} {side}".encode())
        for image in images:
            digest.update(str(image.shape).encode())
            digest.update(np.ascontiguousarray(image).tobytes())
        parts = (*CACHE, f"{digest.hexdigest()[:24]}.safetensors")
        if run.exists(*parts):
            return Encoded(**{name: tensor.numpy() for name, tensor in load(run.read_bytes(*parts)).items()})
        encoded = self.encode(images, side)
        import torch

        tensors = {name: torch.from_numpy(value.copy()) for name, value in vars(encoded).items() if value is not None}
        run.write_bytes(save(tensors), *parts)
        return encoded

    def answers(self, encoded: Encoded, facts: Sequence[Facts | None]) -> list[dict[str, bool]]:
        """What the heads say of each image; {} for images whose prompts say nothing that can be checked."""
        if self.heads is None or encoded.features is None:
            return [{} for _ in facts]
        import torch

        known = [index for index, one in enumerate(facts) if one is not None]
        found: list[dict[str, bool]] = [{} for _ in facts]
        if known:
            rows = self.heads.answers(torch.from_numpy(encoded.features[known]), [facts[index] for index in known])  # type: ignore[misc]
            for index, row in zip(known, rows, strict=True):
                found[index] = row
        return found
